"""A store as one HDF5 file: the same arrays under the same names, for carrying and for other tools.

    store.h5                          attribute "featcache" = StoreInfo, sealed, as JSON
      features/<layer>                (rows, P, C)
      scales/<layer>                  (rows, P) float32; of a scaled codec
      channels/<layer>                (2, D) float32; of a scaled codec
      pooled                          (rows, D); where the encoder has one
      index/<n>/<array>               as in Zarr
      journal/plan-<generation>.npz   uint8, the file's bytes
      journal/commits                 uint8, the commit records of all shards, one after another
      journal/commit_ends             uint64, where each ends

Every dataset is contiguous and uncompressed, so that row r is found at an offset of the file that
h5py names once; reading needs no HDF5 then. bfloat16, which h5py has not, is stored as uint16 with
the attribute dtype = "bfloat16".

The file is written whole under a temporary name and never changed afterwards.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from featcache.errors import CorruptStoreError, StoreError
from featcache.files import PARTIAL, sync, with_checksum
from featcache.forms import StoreForm
from featcache.journal import Commit, Plan
from featcache.layout import FORMAT_VERSION, Placement, StoreInfo, array_checksum
from featcache.writer import ShardBuffer, ShardSpec, write_at

SIGNATURE = b"\x89HDF\r\n\x1a\n"
COMMITS, COMMIT_ENDS = "journal/commits", "journal/commit_ends"
CURE = "take another copy of the file, or make it again with `featcache convert`"
"""What to do about a damaged file."""

_COPY_BYTES = 1 << 20
# Object headers of this version carry checksums, so that a changed byte of the structure is found.
_VERSIONS = ("v108", "v108")
_ALIGNMENT_BYTES = 4096


def is_hdf5(path: Path) -> bool:
    """By content. Raises StoreError where the file cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(SIGNATURE)) == SIGNATURE
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; check its permissions") from None


@dataclass(frozen=True, slots=True)
class _Extent:
    """A dataset as bytes of the file. offset: None where it has none."""

    offset: int | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Hdf5Form(StoreForm):
    """One file. h5py is asked once where things lie; no handle of it stays open."""

    one_file = True
    path: Path

    def __init__(self, path: Path) -> None:
        self.path = path
        self._extents: dict[str, _Extent] = {}
        self._mapped: np.ndarray[Any, Any] = np.empty(0, np.uint8)

    @property
    def cure(self) -> str:
        return CURE

    def load_info(self) -> StoreInfo:
        attributes, self._extents = self._structure()
        if attributes is None:
            raise StoreError(
                f"{self.path} is an HDF5 file without features of featcache; make one with "
                "`featcache convert`"
            )
        version = attributes.get("format_version")
        if with_checksum(attributes) != attributes:
            raise self._damaged("its description does not match its checksum")
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{self.path} has store format {version}, this featcache reads {FORMAT_VERSION}; "
                "upgrade featcache or convert again"
            )
        self._mapped = np.memmap(self.path, np.uint8, mode="r")
        for name, extent in self._extents.items():
            if extent.offset is not None and extent.offset + extent.nbytes > len(self._mapped):
                raise self._damaged(f"it ends before {name} does")
        return StoreInfo.parse(attributes)

    def may_be_store(self) -> bool:
        """False for a whole HDF5 file of something else; a damaged one cannot tell."""
        try:
            return self._structure()[0] is not None
        except CorruptStoreError:
            return True

    def _structure(self) -> tuple[dict[str, Any] | None, dict[str, _Extent]]:
        """The attribute "featcache" and all datasets. Raises CorruptStoreError."""
        extents: dict[str, _Extent] = {}

        def note(name: str, found: h5py.Group | h5py.Dataset) -> None:
            if isinstance(found, h5py.Dataset):
                extents[name] = _Extent(found.id.get_offset(), found.shape, found.dtype)

        try:
            # As a Python file: HDF5's locks and another h5py handle on the same file do not matter.
            with self.path.open("rb") as raw, h5py.File(raw, "r") as file:
                text = file.attrs.get("featcache")
                if text is None:
                    return None, {}
                attributes = json.loads(text)
                if not isinstance(attributes, dict):
                    raise ValueError("its description is no JSON object")
                file.visititems(note)
        # HDF5 meets damage with errors of any type, and h5py passes on what it makes of them.
        except Exception as error:
            raise self._damaged(" ".join(str(error).split())) from None
        return attributes, extents

    def _damaged(self, how: str) -> CorruptStoreError:
        return CorruptStoreError(f"{self.path} is damaged ({how}); {self.cure}")

    def _values(self, name: str) -> np.ndarray[Any, Any]:
        """A dataset, mapped read-only. Raises CorruptStoreError."""
        extent = self._extent(name)
        if not extent.nbytes:
            return np.zeros(extent.shape, extent.dtype)
        assert extent.offset is not None
        mapped = self._mapped[extent.offset : extent.offset + extent.nbytes]
        return mapped.view(extent.dtype).reshape(extent.shape)

    def _extent(self, name: str) -> _Extent:
        if name not in self._extents:
            raise self._damaged(f"it has no {name}")
        extent = self._extents[name]
        if extent.offset is None and extent.nbytes:
            raise CorruptStoreError(
                f"{self.path}: {name} is chunked or compressed, so featcache did not write it; "
                "undo that with `h5repack -l CONTI -f NONE`, or convert again"
            )
        return extent

    def array(self, name: str, checksum: str) -> np.ndarray[Any, Any]:
        values = self._values(name)
        if array_checksum(values) != checksum:
            raise self._damaged(f"{name} does not match its checksum")
        return values

    def placement(self, spec: ShardSpec, name: str) -> Placement:
        extent = self._extent(name)
        rows = extent.shape[0]
        row_shape, dtype = _row(spec, name)
        if extent.shape[1:] != row_shape or extent.dtype != dtype:
            raise self._damaged(
                f"{name} has rows {extent.shape[1:]} of {extent.dtype}, not {row_shape} of {dtype}"
            )
        row_bytes = int(np.prod(row_shape)) * dtype.itemsize
        start = extent.offset or 0
        return Placement(lambda _: self.path, max(1, rows), row_bytes, row_bytes, self.cure, start)

    def plan(self, generation: int) -> tuple[Plan, bytes]:
        raw = self._values(_plan_name(generation)).tobytes()
        try:
            return Plan.parse(raw), raw
        except ValueError as error:
            raise self._damaged(f"plan {generation}: {error}") from None

    def commit(self, shard: int) -> Commit:
        ends = self._values(COMMIT_ENDS)
        try:
            first, last = (int(ends[shard - 1]) if shard else 0), int(ends[shard])
            commit = Commit.parse(self._values(COMMITS)[first:last].tobytes())
            if commit.shard != shard:
                raise ValueError(f"it is of shard {commit.shard}")
        except (ValueError, IndexError) as error:
            raise self._damaged(f"the commit record of shard {shard}: {error}") from None
        return commit

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size


def _plan_name(generation: int) -> str:
    return f"journal/plan-{generation:08d}.npz"


def _row(spec: ShardSpec, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and HDF5 type of a row of features, scales or pooled outputs."""
    kind, _, layer = name.partition("/")
    if kind == "features":
        return spec.layers[layer].code_shape, _stored_type(spec.layers[layer].codec.zarr_dtype)
    if kind == "scales":
        return (spec.layers[layer].num_patches,), np.dtype("<f4")
    assert spec.pooled_dtype is not None
    return (spec.pooled_width,), _stored_type(str(spec.pooled_dtype).removeprefix("torch."))


def _stored_type(zarr_dtype: str) -> np.dtype[Any]:
    return np.dtype("uint16" if zarr_dtype == "bfloat16" else zarr_dtype).newbyteorder("<")


@dataclass(slots=True)
class Hdf5Writer:
    """Fills one file shard by shard, in any order of arrays but ascending shards.

    descriptor: of the file under its temporary name. extents: of all datasets so far.
    records: the commit records, in a file that has no name and goes with the process.
    """

    path: Path
    spec: ShardSpec
    descriptor: int
    records: BinaryIO
    extents: dict[str, int | None]
    ends: list[int] = field(default_factory=list)

    def add(self, buffer: ShardBuffer, count: int, commit: Commit) -> None:
        """A shard, of which the first `count` rows exist. Raises OSError."""

        def placement(name: str) -> tuple[int, Placement]:
            shape, dtype = _row(self.spec, name)
            row_bytes = int(np.prod(shape)) * dtype.itemsize
            start = self.extents[name]
            assert start is not None
            return self.descriptor, Placement(
                lambda _: self.path, 1 << 62, row_bytes, row_bytes, CURE, start
            )

        assert commit.shard == len(self.ends)
        buffer.write_to(placement, count)
        self.records.write(commit.render())
        self.ends.append(self.records.tell())

    def commit(self, shard: int) -> Commit:
        """A record that was added. Raises OSError."""
        first = self.ends[shard - 1] if shard else 0
        self.records.seek(first)
        content = self.records.read(self.ends[shard] - first)
        self.records.seek(0, os.SEEK_END)
        return Commit.parse(content)

    def finish(
        self, info: StoreInfo, arrays: dict[str, np.ndarray[Any, Any]], plans: dict[int, bytes]
    ) -> None:
        """The rest: index and channel arrays by name, plans by generation. Raises OSError."""
        small = {
            **arrays,
            **{_plan_name(n): np.frombuffer(raw, np.uint8) for n, raw in plans.items()},
            COMMIT_ENDS: np.array(self.ends, np.uint64),
        }
        shapes = {name: _Dataset(values.shape, values.dtype) for name, values in small.items()}
        nbytes = self.ends[-1] if self.ends else 0
        shapes[COMMITS] = _Dataset((nbytes,), np.dtype(np.uint8))
        with _open_hdf5(self.path, "r+") as file:
            offsets = {name: _create(file, name, dataset) for name, dataset in shapes.items()}
            file.attrs["featcache"] = _fixed_text(json.dumps(info.attributes()))
        for name, values in small.items():
            at = offsets[name]
            if at is not None:
                little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
                write_at(self.descriptor, little.reshape(-1).view(np.uint8).data, at)
        at = offsets[COMMITS]
        self.records.seek(0)
        while at is not None and (block := self.records.read(_COPY_BYTES)):
            write_at(self.descriptor, memoryview(block), at)
            at += len(block)


@dataclass(frozen=True, slots=True)
class _Dataset:
    """fill: what a row without features holds. stands_for: the type that `dtype` is the bits of."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: float = 0
    stands_for: str | None = None


def _datasets(spec: ShardSpec, rows: int) -> dict[str, _Dataset]:
    """Everything that has a row an image."""
    found: dict[str, _Dataset] = {}

    def add(name: str, zarr_dtype: str, fill: float | str) -> None:
        shape, dtype = _row(spec, name)
        stands_for = zarr_dtype if zarr_dtype == "bfloat16" else None
        number = float(fill)
        if stands_for:
            number = 0x7FC0  # the bits of NaN
        found[name] = _Dataset((rows, *shape), dtype, number, stands_for)

    for layer, coded in spec.layers.items():
        add(f"features/{layer}", coded.codec.zarr_dtype, coded.codec.fill_value)
        if coded.codec.scaled:
            add(f"scales/{layer}", "float32", "NaN")
    if spec.pooled_dtype is not None:
        add("pooled", str(spec.pooled_dtype).removeprefix("torch."), "NaN")
    return found


def _fixed_text(text: str) -> np.bytes_:
    """An attribute's ASCII text in the form that lies in the object header, under its checksum.

    h5py puts a `str` into a global heap, which has no checksum and in which libhdf5 looks for ever
    once a size in it is 0.
    """
    return np.bytes_(text.encode("ascii"))


def _open_hdf5(path: Path, mode: str) -> h5py.File:
    return h5py.File(
        path,
        mode,
        libver=_VERSIONS,
        locking=False,
        alignment_threshold=_ALIGNMENT_BYTES // 8,
        alignment_interval=_ALIGNMENT_BYTES,
    )


def _create(file: h5py.File, name: str, dataset: _Dataset) -> int | None:
    """Make a contiguous dataset, its place allocated and left as it is; where it begins."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_fill_value(np.array(dataset.fill, dataset.dtype))
    little = dataset.dtype.newbyteorder("<")
    made = file.create_dataset(name, dataset.shape, little, dcpl=layout)
    if dataset.stands_for:
        made.attrs["dtype"] = _fixed_text(dataset.stands_for)
    offset = made.id.get_offset()
    return None if offset is None else int(offset)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def writing(path: Path, spec: ShardSpec, rows: int) -> Iterator[Hdf5Writer]:
    """A file that gets its name when the block ends, synced, and never where it raises.

    Raises StoreError where another process is writing it, OSError where it cannot be written.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The lock is the kernel's and goes with the process; HDF5's own are not used.
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(descriptor, partial):  # it has got its name, or was removed, meanwhile
                raise BlockingIOError
        except BlockingIOError:
            raise StoreError(
                f"another process is writing {path}; wait for it, or stop it and run again"
            ) from None
        try:
            with _open_hdf5(partial, "w") as file:
                offsets = {
                    name: _create(file, name, dataset)
                    for name, dataset in _datasets(spec, rows).items()
                }
            with tempfile.TemporaryFile(dir=path.parent) as records:
                yield Hdf5Writer(partial, spec, descriptor, records, offsets)
            os.fsync(descriptor)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)
    finally:
        os.close(descriptor)
