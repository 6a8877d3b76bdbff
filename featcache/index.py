"""What is where in a store: image keys to rows, rows to bytes, and why an image has none.

The index is compiled from the journal (featcache/journal.py) when an extraction finishes: plain
arrays that are mapped, not parsed.

Letters: K keys, R rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from featcache import layout
from featcache.errors import CorruptStoreError
from featcache.files import publish_json
from featcache.journal import (
    DIGEST_BYTES,
    Commit,
    Failure,
    Journal,
    merge,
    pack_failures,
    unpack_failures,
)
from featcache.layout import Status, StoreInfo, read_array, write_array


@dataclass(slots=True)
class Index:
    """The compiled index. Arrays are mapped read-only.

    key_hash: uint64[K] ascending xxh3_64 of the keys; key_bytes, key_ends: their UTF-8 text, one
    after the other in that order; key_rows: int64[K], -1 where the image has no row.
    digests: uint8[R, 16]; status: uint8[R]; sizes: int32[R, 2] original width and height;
    chunks: {layer: uint64[R, 2]} offset and length within the row's shard file;
    checksums: {layer: uint64[R]}.
    """

    key_hash: np.ndarray[Any, Any]
    key_bytes: np.ndarray[Any, Any]
    key_ends: np.ndarray[Any, Any]
    key_rows: np.ndarray[Any, Any]
    digests: np.ndarray[Any, Any]
    status: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any]
    chunks: dict[str, np.ndarray[Any, Any]]
    checksums: dict[str, np.ndarray[Any, Any]]
    failures: dict[str, Failure]

    @property
    def num_rows(self) -> int:
        return len(self.status)

    def find(self, keys: Sequence[str]) -> np.ndarray[Any, Any]:
        """int64[len(keys)]: each key's row if it has features, else -1."""
        encoded = [key.encode() for key in keys]
        hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, encoded), np.uint64, len(encoded))
        at = np.searchsorted(self.key_hash, hashes)
        rows = np.full(len(encoded), -1, np.int64)
        for i, (key, place) in enumerate(zip(encoded, at.tolist(), strict=True)):
            # Equal hashes lie side by side; the text decides.
            while place < len(self.key_hash) and self.key_hash[place] == hashes[i]:
                if self._key(place) == key:
                    rows[i] = self.key_rows[place]
                    break
                place += 1
        has = rows >= 0
        rows[has] = np.where(self.status[rows[has]] == Status.OK, rows[has], -1)
        return rows

    def keys(self) -> list[str]:
        """Every key, in hash order."""
        return [self._key(i).decode() for i in range(len(self.key_hash))]

    def _key(self, i: int) -> bytes:
        start = int(self.key_ends[i - 1]) if i else 0
        return self.key_bytes[start : int(self.key_ends[i])].tobytes()

    @classmethod
    def load(cls, root: Path, info: StoreInfo) -> Index:
        """Raises CorruptStoreError."""
        assert info.index is not None
        base = root / info.index
        plain = {name: read_array(base / name) for name in _PLAIN}
        return cls(
            **plain,
            chunks={layer: read_array(base / "chunks" / layer) for layer in info.layers},
            checksums={layer: read_array(base / "checksums" / layer) for layer in info.layers},
            failures={
                failure.key: failure for failure in unpack_failures(read_array(base / "failures"))
            },
        )


_PLAIN = ("key_hash", "key_bytes", "key_ends", "key_rows", "digests", "status", "sizes")


def compile_index(root: Path, info: StoreInfo, journal: Journal) -> None:
    """Compile a journal without pending shards into a new index and make it the valid one.

    The new index is written beside the old one, which stays valid until the root attributes are
    replaced in one go and is removed afterwards.
    Raises CorruptStoreError for a shard whose index does not match its crc32c, OSError.
    """
    assert not journal.pending
    rows = len(journal.status)
    sizes = np.zeros((rows, 2), np.int32)
    digests = np.zeros((rows, DIGEST_BYTES), np.uint8)
    chunks = {layer: np.full((rows, 2), layout.MISSING, np.uint64) for layer in info.layers}
    checksums = {layer: np.zeros(rows, np.uint64) for layer in info.layers}
    details: dict[int, str] = {}
    for plan in journal.plans:
        for shard in plan.shards:
            commit = Commit.load(root, shard)
            assert commit is not None
            first = shard * plan.shard_images
            here = slice(first, min(first + plan.shard_images, plan.end_row))
            flat = np.frombuffer(b"".join(plan.digests_of(shard)), np.uint8)
            digests[here] = flat.reshape(-1, DIGEST_BYTES)
            for row, record in zip(range(here.start, here.stop), commit.rows, strict=False):
                sizes[row] = record.size
                if record.status != Status.OK:
                    details[row] = record.detail
                for layer, checksum in record.checksums.items():
                    checksums[layer][row] = checksum
            for layer in info.layers:
                table = read_shard_index(root / layout.shard_path(layer, shard), info.shard_images)
                chunks[layer][here] = table[: here.stop - here.start]
                there = chunks[layer][here, 1] != layout.MISSING
                if (there != (journal.status[here] == Status.OK)).any():
                    raise CorruptStoreError(
                        f"{root / layout.shard_path(layer, shard)} holds other images than its "
                        f"commit record says; remove {layout.commit_path(shard)} and rerun "
                        "`featcache extract`"
                    )

    known = merge(journal.plans)
    row_of_key, missing = known.rows, known.missing
    failures = [
        missing[key] if row < 0 else Failure(key, Status(journal.status[row]).reason, details[row])
        for key, row in row_of_key.items()
        if row < 0 or journal.status[row] != Status.OK
    ]
    encoded = [key.encode() for key in row_of_key]
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, encoded), np.uint64, len(encoded))
    order = np.argsort(hashes, kind="stable")
    ordered = [encoded[i] for i in order.tolist()]
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "key_hash": hashes[order],
        "key_bytes": np.frombuffer(b"".join(ordered), np.uint8),
        "key_ends": np.cumsum([len(key) for key in ordered], dtype=np.uint64),
        "key_rows": np.fromiter(row_of_key.values(), np.int64, len(row_of_key))[order],
        "digests": digests,
        "status": journal.status,
        "sizes": sizes,
        "failures": pack_failures(failures),
        **{f"chunks/{layer}": table for layer, table in chunks.items()},
        **{f"checksums/{layer}": sums for layer, sums in checksums.items()},
    }
    name = _next_name(root)
    base = root / name
    for path, values in arrays.items():
        write_array(base / path, values)
    for group in ("index", name, f"{name}/chunks", f"{name}/checksums"):
        write_group(root / group)
    info.index = name
    info.generation = journal.plans[-1].generation
    info.save(root)
    for old in (root / "index").iterdir():
        if old.is_dir() and old != base:
            shutil.rmtree(old)


def _next_name(root: Path) -> str:
    """A folder below `index` that was never the valid one and does not exist."""
    taken = [int(path.name) for path in (root / "index").glob("[0-9]*")]
    return f"index/{max(taken, default=0) + 1:08d}"


def read_shard_index(path: Path, images: int) -> np.ndarray[Any, Any]:
    """The shard index at a shard file's end. Raises CorruptStoreError."""
    length = 16 * images + 4
    try:
        with path.open("rb") as file:
            file.seek(-length, 2)
            return layout.decode_shard_index(file.read(length), path)
    except OSError as error:
        raise CorruptStoreError(
            f"{path} cannot be read ({error.strerror}); rerun `featcache extract` to write it again"
        ) from None


def write_group(path: Path) -> None:
    publish_json(path / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": {}})
