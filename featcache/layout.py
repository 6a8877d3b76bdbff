"""The store on disk, name by name. See docs/format.md for the same in prose.

    store.zarr/
      zarr.json                        group; attributes["featcache"] = StoreInfo
      features/<layer>/zarr.json       (rows, P, C); one image an inner chunk, one shard a file
      features/<layer>/c/<shard>/0/0
      scales/<layer>/c/<shard>/0       (rows, P) float32; of a scaled codec
      channels/<layer>/c/0/0           (2, D) float32, offset and scale; of a scaled codec
      pooled/c/<shard>/0               (rows, D); the encoder's pooled output, where it has one
      index/<n>/<array>/c/0            what is where; the attribute `index` names the valid one
      journal/plan-<generation>.npz    which images go into which rows; written before any work
      journal/commit-<shard>.json      written last, when all of the shard's files are in place
      journal/jobs/                    what the ranks of a job told each other
      journal/copy/                    second copies of what nothing else could tell: the root's
                                       zarr.json, the plans, the channels

Everything but the journal's files is plain Zarr v3. The journal lies inside an array node, where
tools that walk a hierarchy do not look, so they do not stumble over it.

Letters: P patches, D encoder width, C codes of a patch.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import xxhash

from featcache.errors import CorruptStoreError, StoreError
from featcache.files import (
    publish,
    publish_after,
    publish_json,
    read_json,
    render_json,
    seal_of,
    with_checksum,
)
from featcache.object_path import ObjectPath, StorePath

FORMAT_VERSION = 3
HDF5_SUFFIXES = (".h5", ".hdf5")
"""Of stores in one file."""
CHUNK_ALIGNMENT_BYTES = 4096
"""Inner chunks start at multiples of this, so that O_DIRECT can read them."""
MISSING = np.uint64(2**64 - 1)
"""Offset and length of an absent inner chunk, by the Zarr sharding specification."""


class Status(enum.IntEnum):
    """What became of a row. The names in lower case are the ledger's reasons."""

    OK = 0
    UNUSED = 1  # never planned: the rest of a generation's last shard
    UNDECODABLE = 2
    TOO_LARGE = 3
    NON_FINITE = 4
    OVERFLOW = 5
    CHANGED = 6  # the file's bytes changed between the scan and the encoding
    MISSING = 7
    UNREADABLE = 8
    DROPPED = 9  # by `featcache gc`: no image key meant it any more

    @property
    def reason(self) -> str:
        return self.name.lower()


@dataclass(slots=True)
class StoreInfo:
    """The root group's attribute "featcache".

    fingerprint: how the features were made (featcache/fingerprint.py).
    codec: name of the storage codec. layers: stored layers, first is the default.
    num_patches, width: P and D. shard_images: rows per shard.
    pooled: whether `pooled` exists.
    index: path of the valid index within the store; None until the first extraction finished.
    generation: number of the last plan that the index covers.
    source: the data files and the image root of the latest extraction, for `align train`.
    checksums: of the arrays that an opened store relies on, {path: xxh3_64 of metadata and values}:
    those of the index, and `channels/<layer>`.
    """

    fingerprint: dict[str, Any]
    codec: str
    layers: list[str]
    num_patches: int
    width: int
    shard_images: int
    pooled: bool
    index: str | None = None
    generation: int = 0
    source: dict[str, Any] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    _there: bytes | None = field(default=None, init=False, repr=False, compare=False)
    """The root's zarr.json as it was loaded or saved last; what is saved takes its place alone."""

    @property
    def varies(self) -> bool:
        """Whether each image has its own patch grid, up to P patches; the index then has `grids`,
        and the features of an image end after its own patches."""
        features = self.fingerprint.get("features", {})
        return bool(features.get("lengths") == "per image")

    def attributes(self) -> dict[str, Any]:
        """The attribute "featcache", sealed by a checksum."""
        fields = asdict(self)
        del fields["_there"]
        return with_checksum(fields)

    def document(self) -> dict[str, Any]:
        """The root group's metadata, sealed by a checksum of the attributes."""
        return {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"featcache": self.attributes()},
        }

    def save(self, root: StorePath) -> None:
        """Publish the root group's metadata, and its second copy. Raises OSError, and StoreError
        where another job has changed them in a bucket since they were loaded."""
        content = render_json(self.document())
        try:
            publish_after(root / "zarr.json", content, self._there)
        except FileExistsError:
            raise StoreError(
                f"{root}: another job has written it meanwhile; run the same command again, to go "
                "on from what is there now"
            ) from None
        self._there = content
        publish_json(root / copy_path("zarr.json"), self.document())

    @classmethod
    def load(cls, root: StorePath) -> StoreInfo:
        """Raises StoreError where `root` is no store, or one of a newer format, and
        CorruptStoreError where its description was changed."""
        try:
            raw = (root / "zarr.json").read_bytes()
            attributes = json.loads(raw)["attributes"]["featcache"]
            version = attributes.get("format_version")
            sealed = with_checksum(attributes) == attributes
        except FileNotFoundError:
            copy = root / copy_path("zarr.json")
            if copy.exists():
                raise CorruptStoreError(
                    f"{root}/zarr.json is gone; `featcache verify {root} --repair` restores it"
                ) from None
            if (root / plan_path(1)).exists():
                raise CorruptStoreError(
                    f"{root}/zarr.json and its second copy are gone: nothing says how the features "
                    "were made; extract into another store"
                ) from None
            hint = "it has no zarr.json" if root.exists() else "no such directory"
            raise StoreError(
                f"{root} is not a feature store ({hint}); make one with `featcache extract`"
            ) from None
        except NotADirectoryError:
            raise StoreError(f"{root} is a file, not a feature store in a folder") from None
        except OSError as error:
            raise StoreError(f"{root}: {error.strerror}; check its permissions") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CorruptStoreError(
                f"{root}/zarr.json does not describe a feature store; if featcache made it, "
                f"`featcache verify {root} --repair` restores it"
            ) from None
        if version != FORMAT_VERSION:
            doubt = f"; if none newer wrote it, {repair_cure(root)}" if not sealed else ""
            raise StoreError(
                f"{root} has store format {version}, this featcache reads {FORMAT_VERSION}; "
                f"upgrade featcache or extract again{doubt}"
            )
        if not sealed:
            raise CorruptStoreError(
                f"{root}/zarr.json was changed after it was written (its attributes do not match "
                f"their checksum); `featcache verify {root} --repair` restores it"
            )
        info = cls.parse(attributes)
        info._there = raw
        return info

    @classmethod
    def parse(cls, attributes: dict[str, Any]) -> StoreInfo:
        """From its sealed attributes, already compared with their checksum."""
        return cls(**{key: value for key, value in attributes.items() if key != "checksum"})


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the rows of an array lie as bytes: row r is number r % rows_per_file of file
    r // rows_per_file, and every row of a file follows the one before at the same distance.

    row_bytes: of one row. pitch_bytes: from one row to the next. start_bytes: of a file's first.
    cure: what mends a damaged file, for messages.
    """

    paths: Callable[[int], StorePath]
    rows_per_file: int
    row_bytes: int
    pitch_bytes: int
    cure: str
    start_bytes: int = 0

    def offset(self, row: int) -> int:
        """Where the row starts in its file."""
        return self.start_bytes + row % self.rows_per_file * self.pitch_bytes


@dataclass(frozen=True, slots=True)
class ShardGeometry:
    """Where the inner chunks of one features shard lie.

    images: inner chunks per shard. chunk_bytes: bytes of one image's stored features.
    """

    images: int
    chunk_bytes: int

    @property
    def pitch_bytes(self) -> int:
        """Distance from one inner chunk to the next."""
        return math.ceil(self.chunk_bytes / CHUNK_ALIGNMENT_BYTES) * CHUNK_ALIGNMENT_BYTES

    @property
    def index_bytes(self) -> int:
        """Length of the shard index at the file's end: (offset, length) pairs and a crc32c."""
        return 16 * self.images + 4

    def encode_index(self, present: np.ndarray[Any, Any]) -> bytes:
        """present: bool[images]. Source: Zarr v3 `sharding_indexed` codec, section "Binary shard
        format"."""
        table = np.full((self.images, 2), MISSING, dtype="<u8")
        table[present, 0] = np.flatnonzero(present).astype("<u8") * np.uint64(self.pitch_bytes)
        table[present, 1] = self.chunk_bytes
        raw = table.tobytes()
        return raw + google_crc32c.value(raw).to_bytes(4, "little")


def repair_cure(root: StorePath) -> str:
    """What to do about a damaged file of the store at `root`, for messages."""
    if isinstance(root, ObjectPath):
        return f"copy {root} to a disk, run `featcache verify --repair` there, and copy it back"
    return f"`featcache verify {root} --repair` writes it again"


def features_path(layer: str) -> str:
    return f"features/{layer}"


def shard_path(layer: str, shard: int) -> str:
    return f"features/{layer}/c/{shard}/0/0"


def scales_path(layer: str, shard: int) -> str:
    return f"scales/{layer}/c/{shard}/0"


def scales_name(layer: str) -> str:
    return f"scales/{layer}"


def channels_path(layer: str) -> str:
    return f"channels/{layer}"


def copy_path(path: str) -> str:
    """Where the second copy of a vital file lies."""
    return f"journal/copy/{path.removeprefix('journal/')}"


def pooled_path(shard: int) -> str:
    return f"pooled/c/{shard}/0"


WRITERS = "journal/writers"
"""Locked by those who write shards."""
JOBS = "journal/jobs/"
"""Below it, what ranks of a job tell each other; of no use when the job has ended."""


def plan_path(generation: int) -> str:
    return f"journal/plan-{generation:08d}.npz"


def commit_path(shard: int) -> str:
    return f"journal/commit-{shard:08d}.json"


def group_metadata() -> dict[str, Any]:
    """Zarr v3 metadata of a group without attributes."""
    return {"zarr_format": 3, "node_type": "group", "attributes": {}}


def array_metadata(
    shape: tuple[int, ...],
    dtype: str,
    *,
    chunk: tuple[int, ...],
    inner_chunk: tuple[int, ...] | None = None,
    fill_value: float | int | str = 0,
    attributes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Zarr v3 array metadata, uncompressed; sharded where `inner_chunk` is given.

    dtype: Zarr data type name. chunk: shape of one stored file's extent.
    """
    little: dict[str, Any] = {"name": "bytes"}
    if dtype not in ("uint8", "int8", "bool"):
        little["configuration"] = {"endian": "little"}
    codecs: list[dict[str, Any]] = [little]
    if inner_chunk is not None:
        codecs = [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": list(inner_chunk),
                    "codecs": [little],
                    "index_codecs": [
                        {"name": "bytes", "configuration": {"endian": "little"}},
                        {"name": "crc32c"},
                    ],
                    "index_location": "end",
                },
            }
        ]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_value,
        "codecs": codecs,
        "attributes": attributes or {},
    }


def write_array(path: StorePath, values: np.ndarray[Any, Any]) -> None:
    """Publish `values` as a Zarr array of one uncompressed chunk. Raises OSError."""
    metadata, chunk = render_array(values)
    if values.size:
        publish(path / chunk_name(values.ndim), [chunk])
    publish(path / "zarr.json", [metadata])


def render_array(values: np.ndarray[Any, Any]) -> tuple[bytes, memoryview]:
    """The bytes of the two files that `write_array` writes."""
    values = np.ascontiguousarray(values)
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    chunk = tuple(max(1, n) for n in values.shape)
    metadata = array_metadata(values.shape, values.dtype.name, chunk=chunk)
    return render_json(metadata), little.reshape(-1).view(np.uint8).data


def array_files(path: Path, dimensions: int) -> tuple[Path, Path]:
    """Metadata and the one chunk of an array that `write_array` wrote."""
    return path / "zarr.json", path / chunk_name(dimensions)


def chunk_name(dimensions: int) -> str:
    """Of the one chunk of such an array, relative to the array."""
    return "/".join(["c"] + ["0"] * dimensions)


def array_checksum(values: np.ndarray[Any, Any]) -> str:
    """What `StoreInfo.checksums` says of an array: xxh3_64 of its metadata and its values."""
    metadata, chunk = render_array(values)
    checksum = xxhash.xxh3_64(metadata)
    checksum.update(chunk)
    return checksum.hexdigest()


def map_array(path: Path, checksum: str) -> np.ndarray[Any, Any]:
    """What `write_array(path, ...)` wrote, mapped read-only after it was read through once: what
    was changed on disk is not believed, and no memory is taken.

    Raises ValueError where metadata or bytes are missing or not those of `checksum`; its text says
    of the array what is wrong.
    """
    try:
        metadata = read_json(path / "zarr.json")
        shape, dtype = tuple(metadata["shape"]), np.dtype(metadata["data_type"]).newbyteorder("<")
        files = array_files(path, len(shape))
        seal = seal_of(*files) if math.prod(shape) else seal_of(files[0])
        if seal.xxh3_64 != checksum:
            raise ValueError("it does not match its checksum")
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        return np.memmap(files[1], dtype, mode="r").reshape(shape)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError("is missing, or a part of it") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"is damaged ({error})") from None


def read_array(root: StorePath, name: str, checksum: str) -> np.ndarray[Any, Any]:
    """`map_array` of the store at `root`; out of a bucket, of a copy in the default `Tier`.

    Raises CorruptStoreError.
    """
    if isinstance(root, ObjectPath):
        from featcache.tier import default_tier

        return default_tier().array(root, name, checksum)
    try:
        return map_array(root / name, checksum)
    except ValueError as error:
        raise CorruptStoreError(f"{root / name} {error}; {repair_cure(root)}") from None
