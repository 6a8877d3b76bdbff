"""Whether a store is, byte for byte, what was written, and what of it can be mended.

Each data file is read once, from its beginning to its end in blocks: its checksum is compared with
the commit record's, and its values are checked to be finite on the way. Only where a checksum
differs are the rows looked at one by one. Everything that is derived (array metadata, index) is
worked out again and compared.

RAM: one block (`BLOCK_BYTES`, at least a row) and one shard's patch scales and pooled outputs a
worker, and what the plans and the index take.

Letters: S images of a shard, P patches, C codes of a patch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from featcache import layout
from featcache.codecs import get_codec
from featcache.errors import CorruptStoreError, StoreError
from featcache.extract import metadata
from featcache.files import PARTIAL, Seal, read_json, render_json, with_checksum
from featcache.index import build_arrays
from featcache.journal import Commit, Journal, Plan, key_of, num_rows
from featcache.layout import (
    FORMAT_VERSION,
    Status,
    StoreInfo,
    array_checksum,
    array_files,
    copy_path,
    group_metadata,
    read_array,
    render_array,
)
from featcache.store import blank_spec
from featcache.writer import ShardSpec

BLOCK_BYTES = 1 << 21
"""Read at once; a block is worked on while it is still in the processor's cache."""
NAMED_ROWS = 5
"""Rows that a problem's text names; `Problem.rows` has all."""

# What `--repair` does about a problem, as its line says it.
COPY = "restores it from its second copy"
REWRITE = "writes it again"
RECOMPILE = "compiles the index again from the journal"
REMEASURE = "measures it again on the images that it was measured on"
RESHARD = "writes the shard again and encodes only the rows that are bad"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it was written.

    where: file or array, relative to the store. cure: what `--repair` does, empty where it can do
    nothing. shard: whose it is. rows: those whose stored values are bad; keys: their images.
    """

    where: str
    what: str
    cure: str = ""
    shard: int | None = None
    rows: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a store was found to be.

    problems: what is wrong, after the repair where there was one; mended: what it mended.
    notes: what is worth knowing and wrong with nothing. generations, shards, rows: planned;
    images: rows with features in the shards that are there. nbytes: of the data files read.
    """

    path: Path
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    generations: int
    shards: int
    rows: int
    images: int
    nbytes: int
    seconds: float
    mended: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True)
class VerifyProgress:
    """A snapshot for display. stage: "verify" (done and total in bytes) or "repair" (in shards)."""

    stage: str
    done: int
    total: int


OnProgress = Callable[[VerifyProgress], None]


def verify(
    root: Path, *, workers: int = 2, on_progress: OnProgress = lambda _: None
) -> VerifyReport:
    """Check everything in the store at `root`, and change nothing.

    Raises StoreError for what is no store, one of a newer format, or one that is being written.
    """
    start = time.monotonic()
    require_store(root)
    with _not_written(root):
        return inspect(root, workers, on_progress).report(time.monotonic() - start)


def require_store(root: Path) -> None:
    """Raises StoreError where `root` is not a store's folder, be it a damaged one."""
    if root.is_file():
        raise StoreError(f"{root} is a file; `featcache verify` checks stores in folders")
    if not (root / copy_path("zarr.json")).exists() and not (root / "zarr.json").exists():
        StoreInfo.load(root)


@contextmanager
def _not_written(root: Path) -> Iterator[None]:
    """Keep writers away meanwhile. A store on a read-only medium has none."""
    try:
        lock = (root / "journal" / "lock").open("rb")
    except OSError:
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"another process is writing {root}; wait for it, or stop it and run again"
            ) from None
        yield


@dataclass(slots=True)
class Inspection:
    """All that one pass over a store has found, for the report and for the repair.

    info: None where neither copy of the store's description is whole. plans: up to the first that
    is lost; plans_whole: none is. status: uint8[rows], by the commit records. contents: {path: the
    right bytes} of damaged files whose content is known. channels: layers whose
    channel values are lost. shards: those to be written again.
    unfinished: planned by an extraction that has not ended, and not there yet. index_known: whether
    the journal can tell what the index should say.
    """

    root: Path
    info: StoreInfo | None = None
    plans: list[Plan] = field(default_factory=list)
    plans_whole: bool = True
    status: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, np.uint8))
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)
    channels: dict[str, None] = field(default_factory=dict)
    shards: dict[int, Plan] = field(default_factory=dict)
    unfinished: int = 0
    index_known: bool = False
    images: int = 0
    nbytes: int = 0

    def add(self, where: str, what: str, cure: str = "", **more: Any) -> None:
        self.problems.append(Problem(where, what, cure, **more))

    @property
    def finished(self) -> list[Plan]:
        """The plans that the index covers."""
        assert self.info is not None
        return self.plans[: self.info.generation] if self.info.index else []

    def report(self, seconds: float) -> VerifyReport:
        return VerifyReport(
            path=self.root,
            problems=tuple(self.problems),
            notes=tuple(self.notes),
            generations=len(self.plans),
            shards=sum(plan.num_shards for plan in self.plans),
            rows=num_rows(self.plans),
            images=self.images,
            nbytes=self.nbytes,
            seconds=seconds,
        )


def inspect(
    root: Path,
    workers: int,
    on_progress: OnProgress = lambda _: None,
    only: frozenset[int] | None = None,
) -> Inspection:
    """Look at a store that no one writes meanwhile. only: the shards whose data files are read.

    Raises StoreError for a newer format.
    """
    found = Inspection(root)
    _check_root(found)
    if found.info is None:
        return found
    _check_plans(found)
    _check_channels(found, found.info)
    if found.plans_whole:
        documents: dict[str, Any] = dict(
            metadata(found.info, get_codec(found.info.codec), num_rows(found.plans))
        )
        if found.info.index:
            for group in ("index", found.info.index, f"{found.info.index}/checksums"):
                documents[f"{group}/zarr.json"] = group_metadata()
        for path, document in documents.items():
            _check_content(found, path, render_json(document), REWRITE)
    _check_shards(found, found.info, workers, on_progress, only)
    _check_index(found, found.info)
    if found.plans_whole:
        _note_leftovers(found, found.info)
    if found.unfinished:
        found.notes.append(
            f"{found.unfinished} planned shards are not there yet: the extraction was stopped; run "
            "the same `featcache extract` command again to finish it"
        )
    return found


# ---------------------------------------------------------------- description, plans, derived files


def _check_content(found: Inspection, path: str, content: bytes, cure: str) -> None:
    """A file whose every byte is known."""
    try:
        there = (found.root / path).read_bytes()
    except OSError as error:
        what = _missing(error)
    else:
        if there == content:
            return
        what = "is not what was written"
    found.add(path, what, cure)
    found.contents[path] = content


def _missing(error: OSError) -> str:
    gone = isinstance(error, FileNotFoundError | NotADirectoryError)
    return "is missing" if gone else f"cannot be read ({error.strerror})"


def _read_description(path: Path) -> tuple[StoreInfo | None, Any]:
    """What a zarr.json says where it matches its checksum, else None; and its format version."""
    try:
        attributes = read_json(path)["attributes"]["featcache"]
        version = attributes.get("format_version")
        if with_checksum(attributes) != attributes:
            return None, None
        if version != FORMAT_VERSION:
            return None, version
        del attributes["checksum"]
        return StoreInfo(**attributes), version
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None


def _check_root(found: Inspection) -> None:
    """zarr.json and its second copy: either tells what the other should be."""
    name, copy = "zarr.json", copy_path("zarr.json")
    original, version = _read_description(found.root / name)
    if original is None and version is not None:
        StoreInfo.load(found.root)  # a whole description of another format; raises
    second, _ = _read_description(found.root / copy)
    # Where both are whole, the original is the one that is written first.
    info = found.info = original or second
    if info is None:
        with contextlib.suppress(CorruptStoreError, OSError):
            StoreInfo.load(found.root)  # raises where it says that it is of another format
        for path in (name, copy):
            gone = "is missing" if not (found.root / path).exists() else "is damaged"
            other = copy if path == name else name
            found.add(
                path,
                f"{gone}, as is {other}: nothing else says what the store is; extract into "
                "another one",
            )
        return
    content = render_json(info.document())
    _check_content(found, name, content, COPY if original is None else REWRITE)
    _check_content(found, copy, content, COPY)


def _check_plans(found: Inspection) -> None:
    """Every plan and its second copy."""
    assert found.info is not None
    root = found.root
    folders = (root / "journal", root / copy_path(""))
    numbers = [
        int(match[1])
        for folder in folders
        for path in folder.glob("plan-*.npz")
        if (match := re.fullmatch(r"plan-(\d{8})\.npz", path.name))
    ]
    next_shard = 0
    for number in range(1, max([found.info.generation, *numbers]) + 1):
        name = layout.plan_path(number)
        whole: dict[str, Plan] = {}
        for path in (name, copy_path(name)):
            try:
                plan = Plan.load(root / path)
            except CorruptStoreError:
                continue
            placed = (plan.generation, plan.first_shard, plan.shard_images)
            if placed == (number, next_shard, found.info.shard_images):
                whole[path] = plan
        if not whole:
            found.plans_whole = False
            gone = "is damaged" if (root / name).exists() else "is missing"
            found.add(
                name,
                f"{gone}, and so is its second copy: which images its rows are cannot be told any "
                "more; extract into another store",
            )
            return
        good = next(iter(whole))
        content = (root / good).read_bytes()
        for path in (name, copy_path(name)):
            _check_content(found, path, content, COPY)
        found.plans.append(whole[good])
        next_shard += whole[good].num_shards


def _check_channels(found: Inspection, info: StoreInfo) -> None:
    """The static channel values of a scaled codec, and their second copies."""
    if not get_codec(info.codec).scaled:
        return
    for layer in info.layers:
        name = layout.channels_path(layer)
        if name not in info.checksums:  # no image has been encoded
            continue
        damage: dict[str, str] = {}
        good = None
        for path in (name, copy_path(name)):
            try:
                good = np.array(read_array(found.root, path, info.checksums[name]))
            except CorruptStoreError as error:
                damage[path] = _reason(error)
        for path, what in damage.items():
            if good is None:
                found.add(path, f"{what}, and so is the other copy of it", REMEASURE)
                found.channels[layer] = None
                continue
            found.add(path, what, COPY)
            places = array_files(Path(path), good.ndim)
            for place, content in zip(places, render_array(good), strict=True):
                found.contents[str(place)] = bytes(content)


def _reason(error: CorruptStoreError) -> str:
    """What of a damaged array's message is not its path and not the cure."""
    inner = re.search(r" is damaged \((.*)\); `featcache verify", str(error), re.DOTALL)
    if inner and inner[1].startswith("[Errno 2]"):
        return "is missing, or a part of it"
    return f"is damaged ({inner[1]})" if inner else str(error)


# -------------------------------------------------------------------------------------- data files


def _check_shards(
    found: Inspection,
    info: StoreInfo,
    workers: int,
    on_progress: OnProgress,
    only: frozenset[int] | None,
) -> None:
    """Commit records and data files."""
    spec = blank_spec(info)
    status = found.status = np.full(num_rows(found.plans), Status.UNUSED, np.uint8)
    jobs = [(plan, shard) for plan in found.plans for shard in plan.shards]
    read = [only is None or shard in only for _, shard in jobs]
    sizes = [
        spec.bytes_of(len(plan.digests_of(shard))) * wanted
        for (plan, shard), wanted in zip(jobs, read, strict=True)
    ]
    total, done = sum(sizes), 0
    checker = _ShardChecker(found.root, spec, found.plans)
    found.index_known = found.plans_whole and bool(info.index)
    on_progress(VerifyProgress("verify", 0, total))
    with ThreadPoolExecutor(workers, thread_name_prefix="featcache-verify") as pool:
        results = pool.map(checker.check, [shard for _, shard in jobs], read)
        for (plan, shard), size, result in zip(jobs, sizes, results, strict=True):
            done += size
            on_progress(VerifyProgress("verify", done, total))
            finished = plan.generation <= info.generation
            if result is None and not finished:
                found.unfinished += 1
                continue
            if result is None:
                path = layout.commit_path(shard)
                result = _ShardResult(None, [Problem(path, "is missing", RESHARD, shard)])
            found.problems += result.problems
            found.nbytes += result.nbytes
            if result.problems:
                found.shards[shard] = plan
            if result.status is None:
                found.index_known = found.index_known and not finished
                continue
            here = status[shard * plan.shard_images : plan.end_row][: plan.shard_images]
            here[:] = result.status[: len(here)]
    found.images = int((status == Status.OK).sum())


@dataclass(slots=True)
class _ShardResult:
    """status: uint8[S], None where the commit record is lost. nbytes: of the data files read."""

    status: np.ndarray[Any, Any] | None
    problems: list[Problem]
    nbytes: int = 0


class _ShardChecker:
    """Checks shards, on any number of threads."""

    def __init__(self, root: Path, spec: ShardSpec, plans: Sequence[Plan]) -> None:
        self._root = root
        self._spec = spec
        self._plans = plans
        self._local = threading.local()

    def check(self, shard: int, read: bool) -> _ShardResult | None:
        """One shard; only its commit record unless `read`. None where it has none."""
        path = layout.commit_path(shard)
        try:
            commit = Commit.load_record(self._root, shard)
        except OSError as error:
            return _ShardResult(None, [Problem(path, _missing(error), RESHARD, shard)])
        if commit is None:
            if not (self._root / path).exists():
                return None
            return _ShardResult(None, [Problem(path, "is damaged", RESHARD, shard)])
        status = np.array([row.status for row in commit.rows], np.uint8)
        result = _ShardResult(status, [])
        if not read:
            return result
        result.nbytes = sum(seal.nbytes for seal in commit.files.values())
        for name in self._spec.layers:
            self._check_layer(name, commit, status == Status.OK, result.problems)
        if self._spec.pooled_dtype is not None:
            self._check_pooled(commit, status == Status.OK, result.problems)
        return result

    def _check_layer(
        self, name: str, commit: Commit, ok: np.ndarray[Any, Any], problems: list[Problem]
    ) -> None:
        """Features file and patch scales of one layer."""
        layer, shard = self._spec.layers[name], commit.shard
        found: dict[str, str] = {}
        scales = None
        if layer.codec.scaled:
            path = layout.scales_path(name, shard)
            values = np.zeros((self._spec.images, layer.num_patches), "<f4")
            scales = torch.from_numpy(values)
            if what := self._read_small(path, commit.files.get(path), values):
                found[path] = what
        path = layout.shard_path(name, shard)
        what, finite = self._stream(path, commit.files.get(path), name, ok, scales)
        if what:
            found[path] = what
        bad = self._bad_slots(name, commit, scales) if found else []
        for path, what in found.items():
            beside = "" if bad else "; every row is whole"
            problems.append(self._problem(path, what + beside, shard, bad))
        infinite = [slot for slot in np.flatnonzero(ok & ~finite).tolist() if slot not in bad]
        if infinite:
            what = "values that are not finite were stored"
            problems.append(self._problem(layout.shard_path(name, shard), what, shard, infinite))

    def _stream(
        self,
        path: str,
        seal: Seal | None,
        name: str,
        ok: np.ndarray[Any, Any],
        scales: torch.Tensor | None,
    ) -> tuple[str, np.ndarray[Any, Any]]:
        """A features file in one pass. Returns what is wrong with it, empty where nothing is, and
        bool[S]: the rows whose values are finite (what could not be read counts as that)."""
        layer, geometry = self._spec.layers[name], self._spec.geometry(name)
        pitch, used = geometry.pitch_bytes, int(ok.nonzero()[0].max()) + 1 if ok.any() else 0
        finite = np.ones(len(ok), np.bool_)
        block = self._block(max(1, BLOCK_BYTES // pitch) * pitch)
        rows = len(block) // pitch
        tensor = torch.frombuffer(block, dtype=torch.uint8).view(rows, pitch)
        codes = tensor[:, : layer.code_bytes].view(layer.codec.dtype)
        codes = codes.view(rows, *layer.code_shape)
        checksum, nbytes = xxhash.xxh3_64(), 0
        try:
            with (self._root / path).open("rb", buffering=0) as file:
                for first in range(0, used, rows):
                    count = min(rows, used - first)
                    view = memoryview(block)[: count * pitch]
                    got = _read_into(file.fileno(), view)
                    checksum.update(view[:got])
                    nbytes += got
                    if got < len(view):
                        break
                    of_scales = None if scales is None else scales[first : first + count]
                    is_finite = layer.codec.is_finite(codes[:count], of_scales)
                    finite[first : first + count] = is_finite.numpy()
                tail = b""
                while got := _read_into(file.fileno(), memoryview(block)):
                    checksum.update(memoryview(block)[:got])
                    nbytes += got
                    tail = (tail + bytes(block[:got]))[-geometry.index_bytes :]
        except OSError as error:
            return _missing(error), finite
        if what := _differs(seal, nbytes, checksum):
            return what, finite
        if tail != geometry.encode_index(ok):
            return "its shard index does not fit the statuses of its rows", finite
        return "", finite

    def _check_pooled(
        self, commit: Commit, ok: np.ndarray[Any, Any], problems: list[Problem]
    ) -> None:
        spec, path = self._spec, layout.pooled_path(commit.shard)
        assert spec.pooled_dtype is not None
        pooled = torch.zeros(spec.images, spec.pooled_width, dtype=spec.pooled_dtype)
        raw = pooled.view(torch.uint8).numpy()
        if what := self._read_small(path, commit.files.get(path), raw):
            bad = [
                slot
                for slot in np.flatnonzero(ok).tolist()
                if xxhash.xxh3_64_intdigest(raw[slot].data)
                != commit.rows[slot].checksums.get("pooled")
            ]
            beside = "" if bad else "; every row is whole"
            problems.append(self._problem(path, what + beside, commit.shard, bad))
            return
        infinite = np.flatnonzero(ok & ~pooled.isfinite().all(1).numpy()).tolist()
        if infinite:
            what = "values that are not finite were stored"
            problems.append(self._problem(path, what, commit.shard, infinite))

    def _read_small(self, path: str, seal: Seal | None, values: np.ndarray[Any, Any]) -> str:
        """Fill an array from a file of its size. Returns what is wrong with the file."""
        flat = values.reshape(-1).view(np.uint8)
        checksum = xxhash.xxh3_64()
        try:
            with (self._root / path).open("rb", buffering=0) as file:
                nbytes = _read_into(file.fileno(), flat.data)
                checksum.update(flat[:nbytes].data)
                rest = bytearray(4096)
                while got := _read_into(file.fileno(), memoryview(rest)):
                    checksum.update(memoryview(rest)[:got])
                    nbytes += got
        except OSError as error:
            return _missing(error)
        return _differs(seal, nbytes, checksum)

    def _bad_slots(self, name: str, commit: Commit, scales: torch.Tensor | None) -> list[int]:
        """The slots whose stored bytes are not the ones that were written."""
        geometry, bad = self._spec.geometry(name), []
        codes = memoryview(bytearray(geometry.chunk_bytes))
        try:
            descriptor = os.open(
                self._root / layout.shard_path(name, commit.shard), os.O_RDONLY | os.O_CLOEXEC
            )
        except OSError:
            return [slot for slot, row in enumerate(commit.rows) if row.status == Status.OK]
        try:
            for slot, row in enumerate(commit.rows):
                if row.status != Status.OK:
                    continue
                try:
                    os.lseek(descriptor, slot * geometry.pitch_bytes, os.SEEK_SET)
                    got = _read_into(descriptor, codes)
                except OSError:
                    got = 0
                checksum = xxhash.xxh3_64(codes[:got])
                if scales is not None:
                    checksum.update(scales[slot].numpy().data)
                if got < len(codes) or checksum.intdigest() != row.checksums.get(name):
                    bad.append(slot)
        finally:
            os.close(descriptor)
        return bad

    def _problem(self, path: str, what: str, shard: int, slots: Sequence[int]) -> Problem:
        rows = tuple(shard * self._spec.images + slot for slot in slots)
        keys = tuple(key_of(self._plans, row) for row in rows)
        if rows:
            named = ", ".join(
                f"{row} ({key})" for row, key in list(zip(rows, keys, strict=True))[:NAMED_ROWS]
            )
            more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
            what = f"{what}; bad rows: {named}{more}"
        return Problem(path, what, RESHARD, shard, rows, keys)

    def _block(self, nbytes: int) -> bytearray:
        """This thread's buffer."""
        block: bytearray | None = getattr(self._local, "block", None)
        if block is None or len(block) != nbytes:
            block = self._local.block = bytearray(nbytes)
        return block


def _read_into(descriptor: int, view: memoryview) -> int:
    """As many bytes as there are, up to the view's length. Raises OSError."""
    count = 0
    while count < len(view) and (got := os.readv(descriptor, [view[count:]])):
        count += got
    return count


def _differs(seal: Seal | None, nbytes: int, checksum: xxhash.xxh3_64) -> str:
    """What distinguishes a file from what its commit record says of it."""
    if seal is None:
        return "its commit record does not know it"
    if nbytes != seal.nbytes:
        return f"has {nbytes:,} bytes instead of {seal.nbytes:,}"
    if checksum.hexdigest() != seal.xxh3_64:
        return "is not what was written (its checksum differs)"
    return ""


# ------------------------------------------------------------------------------ index and leftovers


def _check_index(found: Inspection, info: StoreInfo) -> None:
    """The compiled index against the journal; against its own checksums where that is damaged."""
    if info.index is None:
        return
    expected = {path: sum for path, sum in info.checksums.items() if path.startswith("index/")}
    if found.index_known:
        plans = found.finished
        journal = Journal(plans, found.status[: num_rows(plans)], [])
        arrays = build_arrays(found.root, info, journal)
        said, expected = (
            expected,
            {f"{info.index}/{path}": array_checksum(values) for path, values in arrays.items()},
        )
        for path in expected:
            if said.get(path) != expected[path]:
                found.add(path, "does not say what the journal says", RECOMPILE)
    known = {problem.where for problem in found.problems}
    for path, checksum in expected.items():
        if path in known:
            continue
        try:
            read_array(found.root, path, checksum)
        except CorruptStoreError as error:
            found.add(path, _reason(error), RECOMPILE)


def _note_leftovers(found: Inspection, info: StoreInfo) -> None:
    """Files that are no part of the store: nothing reads them."""
    root = found.root
    known = {"zarr.json", copy_path("zarr.json"), "journal/lock"}
    codec = get_codec(info.codec)
    known |= set(metadata(info, codec, num_rows(found.plans)))
    if codec.scaled:
        for layer in info.layers:
            for path in (layout.channels_path(layer), copy_path(layout.channels_path(layer))):
                known |= {str(file) for file in array_files(Path(path), 2)}
    for plan in found.plans:
        name = layout.plan_path(plan.generation)
        known |= {name, copy_path(name)}
        for shard in plan.shards:
            known |= {layout.commit_path(shard), layout.pooled_path(shard)}
            for layer in info.layers:
                known |= {layout.shard_path(layer, shard), layout.scales_path(layer, shard)}
    old: set[str] = set()
    for folder, _, names in os.walk(root):
        for name in names:
            path = str((Path(folder) / name).relative_to(root))
            if name.startswith(PARTIAL):
                found.notes.append(f"{path} was left by a stopped run; the next run removes it")
            elif path.startswith("index/"):
                parts = path.split("/")
                if len(parts) > 2 and "/".join(parts[:2]) != info.index:
                    old.add("/".join(parts[:2]))
            elif path not in known:
                found.notes.append(f"{path} is no part of the store")
    found.notes += [f"{name} is an old index; the next run removes it" for name in sorted(old)]
