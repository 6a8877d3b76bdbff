"""The store on disk, name by name. See docs/format.md for the same in prose.

    store.zarr/
      zarr.json                        group; attributes["featcache"] = StoreInfo
      features/<layer>/zarr.json       (rows, P, D); one image an inner chunk, one shard a file
      features/<layer>/c/<shard>/0/0
      pooled/c/<shard>/0               (rows, D); the encoder's pooled output, where it has one
      index/<n>/<array>/c/0            what is where; the attribute `index` names the valid one
      journal/plan-<generation>.npz    which images go into which rows; written before any work
      journal/commit-<shard>.json      written last, when all of the shard's files are in place

Everything but the journal's files is plain Zarr v3. The journal lies inside an array node, where
tools that walk a hierarchy do not look, so they do not stumble over it.

Letters: P patches, D encoder width.
"""

from __future__ import annotations

import enum
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from featcache.errors import CorruptStoreError, StoreError
from featcache.files import publish, publish_json, read_json

FORMAT_VERSION = 1
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
    format_version: int = FORMAT_VERSION

    def save(self, root: Path) -> None:
        """Publish the root group's metadata. Raises OSError."""
        document = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"featcache": asdict(self)},
        }
        publish_json(root / "zarr.json", document)

    @classmethod
    def load(cls, root: Path) -> StoreInfo:
        """Raises StoreError where `root` is no store, or one of a newer format."""
        try:
            attributes = read_json(root / "zarr.json")["attributes"]["featcache"]
        except FileNotFoundError:
            hint = "it has no zarr.json" if root.exists() else "no such directory"
            raise StoreError(
                f"{root} is not a feature store ({hint}); make one with `featcache extract`"
            ) from None
        except PermissionError as error:
            raise StoreError(f"{root}: {error.strerror}; check its permissions") from None
        except (ValueError, KeyError, TypeError, NotADirectoryError):
            raise StoreError(
                f"{root}/zarr.json does not describe a feature store; was it made by featcache?"
            ) from None
        version = attributes.get("format_version")
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{root} has store format {version}, this featcache reads {FORMAT_VERSION}; "
                "upgrade featcache or extract again"
            )
        try:
            return cls(**attributes)
        except TypeError as error:
            raise StoreError(f"{root}/zarr.json was changed by hand: {error}") from None


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


def decode_shard_index(raw: bytes, where: Path) -> np.ndarray[Any, Any]:
    """The shard index as uint64[images, 2] of (offset, length); absent chunks are MISSING.

    Raises CorruptStoreError where the crc32c does not match.
    """
    if google_crc32c.value(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        raise CorruptStoreError(
            f"{where}: the shard index does not match its crc32c; extract this shard again "
            "(remove its commit record from journal/ and rerun `featcache extract`)"
        )
    return np.frombuffer(raw[:-4], dtype="<u8").reshape(-1, 2)


def features_path(layer: str) -> str:
    return f"features/{layer}"


def shard_path(layer: str, shard: int) -> str:
    return f"features/{layer}/c/{shard}/0/0"


def pooled_path(shard: int) -> str:
    return f"pooled/c/{shard}/0"


def plan_path(generation: int) -> str:
    return f"journal/plan-{generation:08d}.npz"


def commit_path(shard: int) -> str:
    return f"journal/commit-{shard:08d}.json"


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


def write_array(path: Path, values: np.ndarray[Any, Any]) -> None:
    """Publish `values` as a Zarr array of one uncompressed chunk. Raises OSError."""
    values = np.ascontiguousarray(values)
    key = "/".join(["c"] + ["0"] * values.ndim)
    if values.size:
        publish(path / key, [values.astype(values.dtype.newbyteorder("<"), copy=False).data])
    chunk = tuple(max(1, n) for n in values.shape)
    publish_json(path / "zarr.json", array_metadata(values.shape, values.dtype.name, chunk=chunk))


def read_array(path: Path) -> np.ndarray[Any, Any]:
    """What `write_array` wrote, mapped read-only: opening costs no reading.

    Raises CorruptStoreError where metadata or bytes are missing or of another length.
    """
    try:
        metadata = read_json(path / "zarr.json")
        shape, dtype = tuple(metadata["shape"]), np.dtype(metadata["data_type"]).newbyteorder("<")
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        key = "/".join(["c"] + ["0"] * len(shape))
        flat = np.memmap(path / key, dtype, mode="r")
        return flat.reshape(shape)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(
            f"{path} is damaged ({error}); rerun `featcache extract` to rebuild the index"
        ) from None
