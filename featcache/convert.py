"""A store in another form or codec: Zarr to HDF5 and back, or coded anew.

With the codec unchanged every byte is: of features, scales, pooled outputs, channels, index, plans
and commit records, so that a store that went to HDF5 and back is the one that set out. With
another codec the features are decoded to float32 and encoded; an image that it cannot store
becomes a ledger entry, as in extraction.

Every row is compared with its checksum while it is read. What is written has another name until it
is whole: `.partial-<name>` beside its place. A stopped conversion to Zarr goes on from its commit
records; one to HDF5 begins again.

RAM: one shard of the source, one more with another codec, and then `CALIBRATION_IMAGES` images in
float32 for a scaled one; the plans, about 1 KB an image.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featcache import layout
from featcache.codecs import (
    CALIBRATION_IMAGES,
    CODECS,
    Codec,
    LayerCodec,
    StoredFeatures,
    get_codec,
    storing_problems,
)
from featcache.encode import calibration_order
from featcache.errors import CorruptStoreError, StoreError
from featcache.extract import (
    BOOKKEEPING_BYTES_PER_ROW,
    prepare_store,
    require_space,
    write_channels,
)
from featcache.files import PARTIAL, publish, publish_json, read_json, sync
from featcache.hdf5 import Hdf5Form, is_hdf5, writing
from featcache.index import build_arrays, enter_index, publish_index
from featcache.journal import Commit, Journal, Plan, RowRecord, locked, num_rows
from featcache.layout import HDF5_SUFFIXES, Status, StoreInfo
from featcache.object_path import require_disk
from featcache.store import Store
from featcache.writer import ShardBuffer, ShardSpec, write_error

_TOKEN = "journal/convert.json"
"""What an unfinished conversion to Zarr was made of, so that only the same one goes on with it."""


@dataclass(frozen=True, slots=True)
class ConvertProgress:
    """A snapshot for display: planned images done, of how many; bytes of features written so far.
    resumed: images of them that a stopped run had done."""

    done: int
    total: int
    nbytes: int
    resumed: int


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What a conversion came to.

    images: rows with features. lost: {reason: images that the new codec cannot store}.
    resumed: planned images that a stopped run had done. nbytes: of the new store.
    codec_from, codec: of the source and of the result.
    finer: another codec that stores no fewer bytes, which brings nothing back.
    """

    path: Path
    images: int
    lost: dict[str, int]
    resumed: int
    nbytes: int
    codec_from: str
    codec: str
    finer: bool
    seconds: float

    @property
    def ok(self) -> bool:
        """As for an extraction: no image is lost to the codec."""
        return not self.lost


OnProgress = Callable[[ConvertProgress], None]


def convert(
    source: Path,
    out: Path,
    codec: str | None = None,
    *,
    force: bool = False,
    on_progress: OnProgress = lambda _: None,
) -> ConvertResult:
    """Write the store `source` to `out`: HDF5 where that ends in .h5 or .hdf5, else Zarr.

    codec: of the result; None keeps it. force: replace the store that is there, once the new one
    is whole.
    Raises StoreError (no store, `out` exists, the disk is too small), CorruptStoreError where a
    row of the source is not what was written, ConfigError for an unknown codec.
    """
    start = time.monotonic()
    store = Store(source)
    to_hdf5 = out.suffix.lower() in HDF5_SUFFIXES
    try:
        _require_free(store, out, to_hdf5, force)
        work = _Conversion(store, get_codec(codec or store.info.codec), on_progress)
        # Where a symbolic link leads, not in its place.
        (_to_hdf5 if to_hdf5 else _to_zarr)(work, _place(out))
    except OSError as error:
        raise _write_error(out, error, to_hdf5) from error
    made = Store(out)
    before, after = store.index.status, made.index.status
    lost = after[(before == Status.OK) & (after != Status.OK)]
    code_bytes = [
        sum(coded.code_bytes for coded in spec.layers.values()) for spec in (store.spec, work.spec)
    ]
    return ConvertResult(
        path=out,
        images=made.num_images,
        lost=dict(Counter(Status(status).reason for status in lost.tolist())),
        resumed=work.resumed,
        nbytes=made.form.nbytes,
        codec_from=store.info.codec,
        codec=work.codec.name,
        finer=not work.same and code_bytes[1] >= code_bytes[0],
        seconds=time.monotonic() - start,
    )


def _place(out: Path) -> Path:
    """Where symbolic links lead. Raises OSError where they lead in a circle."""
    with suppress(FileNotFoundError, NotADirectoryError):
        out.stat()
    return out.resolve()


def _require_free(store: Store, out: Path, to_hdf5: bool, force: bool) -> None:
    """Raises StoreError where `out` must not be written, OSError where it cannot be a place."""
    source, place = require_disk(store.path, "`featcache convert`").resolve(), _place(out)
    if place == source or source in place.parents or place in source.parents:
        raise StoreError(f"{out} is, holds or is inside the store to convert; choose another place")
    if not out.exists():
        return
    if not force:
        raise StoreError(f"{out} exists; choose another place, or replace it with --force")
    if to_hdf5:
        ours = out.is_file() and is_hdf5(out) and Hdf5Form(out).may_be_store()
    else:
        ours = (out / "journal" / "lock").exists() or _is_described(out)
    if not ours:
        kind = "HDF5 file of featcache" if to_hdf5 else "Zarr store of featcache"
        raise StoreError(f"{out} exists and is no {kind}; choose another place or remove it")


def _is_described(out: Path) -> bool:
    """Whether a folder is a Zarr group that says it is a store, rightly or not."""
    try:
        return "featcache" in read_json(out / "zarr.json")["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_error(out: Path, error: OSError, to_hdf5: bool) -> StoreError:
    if error.strerror is None:  # HDF5's own words
        return StoreError(f"{out}: cannot write ({' '.join(str(error).split())})")
    if to_hdf5:
        return StoreError(f"{out}: cannot write ({error.strerror}); mend that and run again")
    return write_error(out, error)


class _Conversion:
    """What the ways to either form share: the plans, the new description, and shards as they are
    to be written.

    info: of the result; its index is entered at the end. status: uint8[rows] of the result.
    """

    def __init__(self, store: Store, codec: Codec, on_progress: OnProgress) -> None:
        """Raises StoreError, CorruptStoreError."""
        self.store, self.codec, self._on_progress = store, codec, on_progress
        self.same = codec.name == store.info.codec
        files = [store.form.plan(number + 1) for number in range(store.info.generation)]
        self.plans = [plan for plan, _ in files]
        self.raw_plans = {plan.generation: raw for plan, raw in files}
        self.rows = num_rows(self.plans)
        self.info = replace(
            store.info,
            codec=codec.name,
            source=store.source if self.same else _lineage(store.info),
            index=None,
            checksums={},
        )
        self.spec = self._spec()
        self.resumed = 0
        self._done = self._nbytes = 0
        self._total = sum(len(plan.new_digests) for plan in self.plans)
        self._buffer: ShardBuffer | None = None
        self._recoder: _Recoder | None = None

    def _spec(self) -> ShardSpec:
        of_source = self.store.spec
        layers = self.store.layers
        if self.same:
            channels: Mapping[str, Tensor | None] = {
                layer: of_source.layers[layer].channels for layer in layers
            }
        else:
            # Refuses a width that the codec cannot store before anything is read.
            self.codec.code_width(self.store.width)
            channels = _calibrate(self.store, self.codec, self.plans)
        return ShardSpec(
            of_source.images,
            {
                layer: LayerCodec(
                    self.codec, self.store.num_patches, self.store.width, channels.get(layer)
                )
                for layer in layers
            },
            self.codec.pooled_dtype if self.info.pooled else None,
            of_source.pooled_width,
        )

    @property
    def channels(self) -> dict[str, Tensor]:
        """float32[2, D] of each layer that has them."""
        found = {layer: coded.channels for layer, coded in self.spec.layers.items()}
        return {layer: values for layer, values in found.items() if values is not None}

    def shards(self) -> Iterator[tuple[int, int]]:
        """(shard, how many of its rows exist) in order."""
        for plan in self.plans:
            for shard in plan.shards:
                first = shard * plan.shard_images
                yield shard, min(plan.shard_images, self.rows - first)

    def read(self, shard: int) -> tuple[ShardBuffer, Commit]:
        """A shard coded anew, and the commit record that it is to have but for its files (which
        then are those of before, where the codec stays). Valid until the next call.

        Raises CorruptStoreError where a row is damaged, StoreError where the store was changed
        since it was opened.
        """
        store = self.store
        commit = store.form.commit(shard)
        store.require_indexed(commit)
        if self._buffer is None:
            self._buffer = ShardBuffer(store.spec)
        placement = partial(store.form.placement, store.spec)
        bad = self._buffer.load_from(placement, shard, commit.rows)
        if bad:
            path = placement(layout.features_path(store.layers[0])).paths(shard)
            raise CorruptStoreError(
                f"{path}: the features of row {shard * store.spec.images + bad[0]} (of shard "
                f"{shard}, {len(bad)} rows) are not the bytes that were written; {store.form.cure}"
            )
        if self.same:
            return self._buffer, commit
        if self._recoder is None:
            self._recoder = _Recoder(self.spec)
        self._recoder.recode(self._buffer)
        return self._recoder.buffer, replace(commit, files={})

    def note(self, commit: Commit, planned: int, *, resumed: bool = False) -> None:
        """Enter a shard that is in place. planned: how many of its images are."""
        self._done += planned
        if resumed:
            self.resumed += planned
        else:
            self._nbytes += self.spec.bytes_of(planned)
        self._report()

    def _report(self) -> None:
        self._on_progress(ConvertProgress(self._done, self._total, self._nbytes, self.resumed))

    def begin(self, out: Path, needed_bytes: int) -> None:
        """Raises StoreError where that does not fit."""
        require_space(out, needed_bytes, "or choose another place or --codec")
        self._report()

    def planned(self, shard: int) -> int:
        """How many images are planned for a shard."""
        return next(len(p.digests_of(shard)) for p in self.plans if shard in p.shards)

    def index_arrays(self, commit_of: Callable[[int], Commit]) -> dict[str, np.ndarray[Any, Any]]:
        """By name, as `publish_index` takes them. commit_of: a shard's new commit record."""
        if not self.same:
            return build_arrays(self.info, Journal.gather(self.plans, commit_of))
        info = self.store.info
        prefix = f"{info.index}/"
        return {
            name.removeprefix(prefix): self.store.form.array(name, checksum)
            for name, checksum in info.checksums.items()
            if name.startswith(prefix)
        }

    @property
    def index_name(self) -> str:
        """The source's: the same bytes under the same name."""
        assert self.store.info.index is not None
        return self.store.info.index


def _lineage(info: StoreInfo) -> dict[str, Any]:
    """The attribute `source` of a store whose codes are made from those of `info`."""
    before = (
        {"converted_from": info.source["converted_from"]}
        if ("converted_from" in info.source)
        else {}
    )
    return {**info.source, "converted_from": {"codec": info.codec, **before}}


def _calibrate(store: Store, codec: Codec, plans: list[Plan]) -> Mapping[str, Tensor]:
    """{layer: float32[2, D]}: a scaled codec's channel values, measured on the rows that an
    extraction would choose; none where no row has features. Raises CorruptStoreError."""
    if not codec.scaled:
        return {}
    for plan in plans:
        order = [plan.first_row + i for i in calibration_order(len(plan.new_digests))]
        rows = [row for row in order if store.index.status[row] == Status.OK]
        if rows:
            break
    else:
        return {}
    measured = {}
    for layer in store.layers:
        with store.reader(layer, threads=1, depth=1) as reader:
            features = reader.read(np.array(rows[:CALIBRATION_IMAGES]), torch.float32)
        lengths = store.lengths[rows[:CALIBRATION_IMAGES]].tolist()
        measured[layer] = codec.calibrate(
            [image[:length] for image, length in zip(features, lengths, strict=True)]
        )
    return {layer: values for layer, values in measured.items() if values is not None}


class _Recoder:
    """Fills a buffer from one of another codec, image by image."""

    def __init__(self, spec: ShardSpec) -> None:
        self.buffer = ShardBuffer(spec)
        self._pooled = next((c for c in CODECS.values() if c.dtype == spec.pooled_dtype), None)

    def recode(self, source: ShardBuffer) -> None:
        """What cannot be stored is entered in the ledger."""
        self.buffer.clear(source.shard)
        for slot, row in enumerate(source.rows):
            if row.status != Status.OK:
                self.buffer.fail(slot, Status(row.status), row.detail, row.size)
                continue
            features, pooled = source.get(slot)
            problem = self._set(slot, features, pooled, row)
            if problem:
                name, detail = problem.split(": ", 1)
                self.buffer.fail(slot, Status[name.upper()], detail, row.size)

    def _set(
        self,
        slot: int,
        features: Mapping[str, StoredFeatures],
        pooled: Tensor | None,
        row: RowRecord,
    ) -> str | None:
        """Returns why the image cannot be stored, where it cannot."""
        kept = {}
        for layer, stored in features.items():
            kept[layer], (problem,) = self.buffer.spec.layers[layer].encode(
                stored.decode(torch.float32)
            )
            if problem:
                return f"{problem} (layer {layer})"
        if pooled is not None:
            assert self._pooled is not None
            values = pooled[None].float()
            codes, _ = self._pooled.encode(values, None)
            finite = self._pooled.is_finite(codes, None)
            (problem,) = storing_problems(values, finite, self._pooled)
            if problem:
                return f"{problem} (pooled)"
            pooled = codes[0]
        self.buffer.set(slot, kept, pooled, row.size, row.grid)
        return None


def _to_hdf5(work: _Conversion, out: Path) -> None:
    """Raises StoreError, CorruptStoreError, OSError."""
    work.begin(out, work.rows * (work.spec.image_bytes + BOOKKEEPING_BYTES_PER_ROW))
    with writing(out, work.spec, work.rows) as writer:
        for shard, count in work.shards():
            buffer, commit = work.read(shard)
            commit = buffer.sealed(commit)
            writer.add(buffer, count, commit)
            work.note(commit, work.planned(shard))
        of_index = work.index_arrays(writer.commit)
        channels = {
            layout.channels_path(layer): values.numpy() for layer, values in work.channels.items()
        }
        info = work.info
        info.checksums = {name: layout.array_checksum(v) for name, v in channels.items()}
        enter_index(info, work.index_name, work.plans[-1].generation, of_index)
        named = {f"{work.index_name}/{name}": values for name, values in of_index.items()}
        writer.finish(info, {**named, **channels}, work.raw_plans)


def _to_zarr(work: _Conversion, out: Path) -> None:
    """Raises StoreError, CorruptStoreError, OSError."""
    partial_out = out.with_name(f"{PARTIAL}{out.name}")
    channels = {layer: layout.array_checksum(v.numpy()) for layer, v in work.channels.items()}
    token = {
        "source": work.store.info.attributes()["checksum"],
        "codec": work.codec.name,
        "channels": channels,  # measured anew by each run
    }
    with locked(partial_out):
        if _read_token(partial_out) != token:
            _empty(partial_out)
        there = sum(path.stat().st_size for path in partial_out.rglob("*") if path.is_file())
        needed = sum(work.spec.bytes_of(work.planned(shard)) for shard, _ in work.shards())
        needed += work.rows * BOOKKEEPING_BYTES_PER_ROW
        work.begin(out, max(0, needed - there))
        publish_json(partial_out / _TOKEN, token)
        info = work.info
        for number, raw in work.raw_plans.items():
            path = layout.plan_path(number)
            for place in (path, layout.copy_path(path)):
                publish(partial_out / place, [raw])
        prepare_store(partial_out, info, work.codec, work.plans, None)
        for layer, values in work.channels.items():
            write_channels(partial_out, info, layer, values)
        for shard, _ in work.shards():
            commit = Commit.load(partial_out, shard)
            found = commit is not None
            if commit is None:
                buffer, commit = work.read(shard)
                commit = buffer.rewrite(partial_out, commit)
            work.note(commit, work.planned(shard), resumed=found)

        def commit_of(shard: int) -> Commit:
            commit = Commit.load_record(partial_out, shard)
            assert commit is not None
            return commit

        arrays = work.index_arrays(commit_of)
        generation = work.plans[-1].generation
        publish_index(partial_out, info, work.index_name, generation, arrays)
        (partial_out / _TOKEN).unlink()
        _put_in_place(partial_out, out)


def _read_token(root: Path) -> object:
    try:
        return read_json(root / _TOKEN)
    except (FileNotFoundError, ValueError):
        return None


def _empty(root: Path) -> None:
    """Remove what another conversion left; the lock is ours."""
    for path in root.iterdir():
        if path.name != "journal":
            _remove(path)
    for path in (root / "journal").iterdir():
        if path.name != "lock":
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _put_in_place(made: Path, out: Path) -> None:
    """Rename; a store that is there goes aside first, and then away. Raises OSError, and StoreError
    where another process is writing that."""
    old = out.with_name(f"{PARTIAL}old-{out.name}")
    if old.exists():
        shutil.rmtree(old)
    with locked(out) if out.exists() else nullcontext():
        if out.exists():
            out.replace(old)
        made.replace(out)
        sync(out.parent)
    if old.exists():
        shutil.rmtree(old)
