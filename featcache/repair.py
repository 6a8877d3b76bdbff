"""Mending what `verify` finds: copies restored, derived files and bad rows made again.

A good row never changes: a shard is written from its own bytes, and only the rows that are not what
was written are encoded once more, in the batches that their plan gave them. Every file is
published whole, and what a stopped repair has not done the next one finds and does.

RAM: two buffers of a shard, and what `verify` takes.
"""

from __future__ import annotations

import functools
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from featcache import layout
from featcache.codecs import get_codec
from featcache.encode import ShardEncoder, calibrate
from featcache.encoders import RANDOM_REVISION, Encoder, fit_of, load_encoder
from featcache.errors import FeatcacheError, StoreError
from featcache.files import publish
from featcache.fingerprint import fingerprint, require_same
from featcache.index import compile_index, remove_old
from featcache.journal import Commit, Journal, Plan, RowRecord, key_of, locked
from featcache.layout import Status, StoreInfo, array_checksum, write_array
from featcache.mend import Records, mend
from featcache.object_path import StorePath
from featcache.planning import RETRIED
from featcache.sources import Sources
from featcache.store import blank_spec, codecs_before, form_of, shard_spec
from featcache.tasks import ShardTask, task_of
from featcache.tiles import Tiling, with_tiles
from featcache.verify import (
    RECOMPILE,
    Inspection,
    OnProgress,
    VerifyProgress,
    VerifyReport,
    inspect,
    require_folder,
)
from featcache.writer import ShardBuffer, write_error


def repair(
    root: Path,
    *,
    workers: int = 2,
    model: str | None = None,
    images: StorePath | None = None,
    on_progress: OnProgress = lambda _: None,
) -> VerifyReport:
    """Verify the store at `root` and mend what can be mended.

    model: the store's encoder by another name or folder; it must be the same one. images: where
    the images lie now, if elsewhere than at the latest extraction. The encoder is loaded only where
    a row must be encoded.

    Raises StoreError as `verify`, and where the store cannot be written.
    """
    start = time.monotonic()
    if (form := form_of(root)).one_file:
        raise StoreError(f"{root} is an HDF5 file, which cannot be mended; {form.cure}")
    require_folder(root)
    try:
        with locked(root):
            report = _repair(root, workers, model, images, on_progress)
    except OSError as error:
        raise write_error(root, error) from error
    return replace(report, seconds=time.monotonic() - start)


def _repair(
    root: Path, workers: int, model: str | None, images: StorePath | None, on_progress: OnProgress
) -> VerifyReport:
    found = inspect(root, workers, on_progress)
    info = found.info
    if info is None or not found.problems:
        if info is not None and info.index and (root / "index").is_dir():
            remove_old(root, info)
        return found.report(0.0)
    # The description comes first: with it a stopped repair goes on.
    for path, content in found.contents.items():
        publish(root / path, [content])
    reasons: dict[int | str | None, str] = {}
    notes: list[str] = []
    lost: list[str] = []
    if found.plans_whole:
        # Before any commit record is replaced: from here on the index can stand in for one.
        _compile(found, info)
        with _ShardRepair(found, info, workers, model, images) as work:
            if found.channels:
                try:
                    work.measure(list(found.channels))
                except FeatcacheError as error:
                    for layer in found.channels:
                        path = layout.channels_path(layer)
                        reasons[path] = reasons[layout.copy_path(path)] = str(error)
            for done, (shard, plan) in enumerate(sorted(found.shards.items())):
                on_progress(VerifyProgress("repair", done, len(found.shards)))
                try:
                    work.mend(plan, shard)
                except FeatcacheError as error:
                    if isinstance(error.__cause__, OSError):
                        raise
                    reasons[shard] = str(error)
            on_progress(VerifyProgress("repair", len(found.shards), len(found.shards)))
        notes, lost = work.notes, work.lost
    after = inspect(root, workers, only=frozenset(found.shards))
    if after.index_known and any(problem.cure == RECOMPILE for problem in after.problems):
        _compile(after, info)
        after = inspect(root, workers, only=frozenset(found.shards))
    left = []
    for problem in after.problems:
        why = reasons.get(problem.shard) or reasons.get(problem.where)
        what = f"{problem.what}; it cannot be mended: {why}" if why else problem.what
        left.append(replace(problem, what=what))
    still = {problem.where for problem in left}
    report = found.report(0.0)
    return replace(
        report,
        problems=tuple(left),
        mended=tuple(problem for problem in found.problems if problem.where not in still),
        lost=tuple(lost),
        notes=(*notes, *after.notes),
        images=after.images,
    )


def _compile(found: Inspection, info: StoreInfo) -> None:
    """The index anew, where the journal can tell it and it is wrong."""
    if found.index_known and any(problem.cure == RECOMPILE for problem in found.problems):
        records = functools.partial(Commit.load_record, found.root)
        compile_index(found.root, info, Journal.gather(found.finished, records))


class _ShardRepair:
    """Writes damaged shards again. Use as a context manager.

    lost: a line for each damaged row that could not be encoded again; notes: for each that is not
    what it was for another reason.
    """

    def __init__(
        self,
        found: Inspection,
        info: StoreInfo,
        workers: int,
        model: str | None,
        images: StorePath | None,
    ) -> None:
        self._root, self._info, self._plans = found.root, info, found.plans
        self._workers, self._model, self._images = workers, model, images
        self._records = Records(found.root, info, found.plans)
        self._encoder: Encoder | FeatcacheError | None = None
        self._work: ShardEncoder | None = None
        self._stack = ExitStack()
        self.notes: list[str] = []
        self.lost: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def mend(self, plan: Plan, shard: int) -> None:
        """Write a shard again.

        Raises FeatcacheError where that cannot be done; the shard then stays as it is.
        """
        task = task_of(self._sources, plan, shard, self._records.of(plan, shard))
        if task.was is None:
            self._encode_all(task)
            return
        _, damaged = mend(self._root, self._buffer, task, self._ready)
        for slot, record in damaged.items():
            self._tell(shard * plan.shard_images + slot, record)

    def _encode_all(self, task: ShardTask) -> None:
        """Nothing proves what is there: all of it is encoded again, or it stays as it is."""
        buffer, planned = self._buffer, len(task.images)
        buffer.clear(task.shard)
        self._ready().again(task, buffer, range(planned))
        lost = [slot for slot in range(planned) if buffer.rows[slot].status in RETRIED]
        if lost:
            row = buffer.rows[lost[0]]
            raise StoreError(
                "its commit record is lost, so that nothing proves its rows, and "
                f"{len(lost)} of its images cannot be found to encode them again (first: "
                f"{Status(row.status).reason}: {row.detail})"
            )
        buffer.publish(self._root)

    def _tell(self, row: int, record: RowRecord) -> None:
        """What became of a damaged row, where it is not what it was."""
        where = f"row {row} ({key_of(self._plans, row)})"
        made_of = ", ".join(codecs_before(self._info.source))
        if record.status != Status.OK:
            self.lost.append(
                f"{where} was damaged and has no features any more: "
                f"{Status(record.status).reason}: {record.detail}"
            )
        elif made_of:
            self.notes.append(
                f"{where} was encoded from its image; the store was converted, so its other rows "
                f"also carry the rounding of {made_of}"
            )

    def measure(self, layers: list[str]) -> None:
        """Measure the channel values of these layers again and write them, twice.

        Raises FeatcacheError where they come out as others than they were, as they do where one of
        the images that they were measured on is not there any more.
        """
        made_of = codecs_before(self._info.source)
        if made_of:
            raise StoreError(
                f"it was measured on features in {made_of[0]}, not on images; convert that again"
            )
        codec = get_codec(self._info.codec)
        measured = calibrate(self._load(), codec, self._plans, self._sources, self._workers)
        for layer in layers:
            path = layout.channels_path(layer)
            values = measured[layer].numpy() if layer in measured else np.zeros(0)
            if array_checksum(values) != self._info.checksums[path]:
                raise StoreError(
                    "measured again, it comes out otherwise; one of the first images is gone, or "
                    "this machine rounds differently"
                )
            for place in (layout.copy_path(path), path):
                write_array(self._root / place, values)

    def _load(self) -> Encoder:
        """The store's encoder, loaded when it is first needed. Raises FeatcacheError."""
        if self._encoder is None:
            try:
                encoder = encoder_of(self._info, self._model)
                require_same(
                    self._info.fingerprint,
                    with_tiles(fingerprint(encoder), Tiling.of(self._info.fingerprint)),
                    left_name=str(self._root),
                    right_name="the encoder as it is here",
                    cure="name the right one with --model",
                )
                self._encoder = encoder
            except FeatcacheError as error:
                self._encoder = error
        if isinstance(self._encoder, FeatcacheError):
            raise self._encoder
        return self._encoder

    @functools.cached_property
    def _sources(self) -> Sources:
        return sources_of(self._info, self._plans, self._images)

    @functools.cached_property
    def _buffer(self) -> ShardBuffer:
        """Reused by each shard."""
        return ShardBuffer(blank_spec(self._info))

    def _ready(self) -> ShardEncoder:
        """What encodes rows. Raises FeatcacheError."""
        if self._work is None:
            encoder, spec = self._load(), shard_spec(self._root, self._info)
            work = ShardEncoder(self._root, encoder, spec, self._workers)
            self._work = self._stack.enter_context(work)
        return self._work


def encoder_of(info: StoreInfo, model: str | None, device: str | None = None) -> Encoder:
    """The encoder that a store's fingerprint names, or `model`, on the same kind of device.

    Raises FeatcacheError where it cannot be loaded.
    """
    made = info.fingerprint.get("encoder", {})
    return load_encoder(
        model or str(made.get("name")),
        layers=info.layers,
        device=device or info.fingerprint.get("compute", {}).get("device", "cpu"),
        random_weights=made.get("revision") == RANDOM_REVISION,
        fit=fit_of(info.fingerprint),
        compile=info.fingerprint.get("compute", {}).get("compile", False),
    )


def sources_of(info: StoreInfo, plans: list[Plan], images: StorePath | None) -> Sources:
    """Where a store's images may lie."""
    root = images.absolute() if images else info.source.get("images", plans[-1].image_root)
    return Sources(plans, str(root))
