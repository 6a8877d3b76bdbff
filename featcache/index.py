"""What is where in a store: image keys to rows, rows to bytes, and why an image has none.

Two layers of truth: the *journal* (plans written before work, commit records after each shard)
and the *index* compiled from it when an extraction finishes. The index is a cache of the journal,
in plain arrays that are mapped, not parsed.

Letters: K keys, R rows.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from featcache import layout
from featcache.errors import CorruptStoreError
from featcache.files import publish, publish_json
from featcache.layout import Status, StoreInfo, read_array, write_array
from featcache.writer import Commit

DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Failure:
    """An image without features. reason: a `Status` in lower case. detail: what exactly."""

    key: str
    reason: str
    detail: str


@dataclass(slots=True)
class Plan:
    """One generation of planned work, fixed before it starts.

    generation: counts the extractions that added something, from 1.
    first_shard: its first shard; it owns `num_shards` from there.
    keys: every image key known after this generation. rows: its row, or -1 where it has none.
    new_rows, new_digests: the rows this generation adds and the digests of their images.
    missing: keys without a readable file.
    """

    generation: int
    first_shard: int
    shard_images: int
    keys: list[str]
    rows: np.ndarray[Any, Any]
    new_digests: list[bytes]
    missing: list[Failure]

    @property
    def num_shards(self) -> int:
        return -(-len(self.new_digests) // self.shard_images)

    @property
    def first_row(self) -> int:
        return self.first_shard * self.shard_images

    @property
    def end_row(self) -> int:
        return self.first_row + len(self.new_digests)

    @property
    def shards(self) -> range:
        return range(self.first_shard, self.first_shard + self.num_shards)

    def digests_of(self, shard: int) -> list[bytes]:
        start = (shard - self.first_shard) * self.shard_images
        return self.new_digests[start : start + self.shard_images]

    def save(self, root: Path) -> None:
        buffer = io.BytesIO()
        np.savez(
            buffer,
            head=np.array([self.generation, self.first_shard, self.shard_images], np.int64),
            keys=_text(self.keys),
            rows=self.rows,
            digests=np.frombuffer(b"".join(self.new_digests), np.uint8),
            missing=_text([json.dumps([f.key, f.reason, f.detail]) for f in self.missing]),
        )
        publish(root / layout.plan_path(self.generation), [buffer.getbuffer()])

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Raises CorruptStoreError."""
        try:
            with np.load(path) as data:
                generation, first_shard, shard_images = map(int, data["head"])
                flat = data["digests"].tobytes()
                return cls(
                    generation,
                    first_shard,
                    shard_images,
                    _lines(data["keys"]),
                    data["rows"],
                    [flat[i : i + DIGEST_BYTES] for i in range(0, len(flat), DIGEST_BYTES)],
                    [Failure(*json.loads(line)) for line in _lines(data["missing"])],
                )
        except (OSError, ValueError, KeyError) as error:
            raise CorruptStoreError(
                f"{path} is damaged ({error}); delete the store and extract again"
            ) from None


def load_plans(root: Path) -> list[Plan]:
    """Every plan of the store, oldest first. Raises CorruptStoreError."""
    return [Plan.load(path) for path in sorted((root / "journal").glob("plan-*.npz"))]


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
                failure.key: failure
                for failure in (
                    Failure(*json.loads(line)) for line in _lines(read_array(base / "failures"))
                )
            },
        )


_PLAIN = ("key_hash", "key_bytes", "key_ends", "key_rows", "digests", "status", "sizes")


def compile_index(root: Path, info: StoreInfo) -> None:
    """Compile the journal into a new index and make it the valid one, atomically.

    Every planned shard must be committed. The previous index stays valid until the root
    attributes are replaced; it is removed afterwards.
    Raises CorruptStoreError for a shard whose bytes contradict its commit record, OSError.
    """
    plans = load_plans(root)
    latest = plans[-1]
    rows = latest.end_row if latest.new_digests else max(plan.end_row for plan in plans)
    status = np.full(rows, Status.UNUSED, np.uint8)
    sizes = np.zeros((rows, 2), np.int32)
    digests = np.zeros((rows, DIGEST_BYTES), np.uint8)
    chunks = {layer: np.full((rows, 2), layout.MISSING, np.uint64) for layer in info.layers}
    checksums = {layer: np.zeros(rows, np.uint64) for layer in info.layers}
    details: dict[int, str] = {}
    for plan in plans:
        if plan.new_digests:
            digests[plan.first_row : plan.end_row] = np.frombuffer(
                b"".join(plan.new_digests), np.uint8
            ).reshape(-1, DIGEST_BYTES)
        for shard in plan.shards:
            commit = Commit.load(root, shard)
            assert commit is not None, f"shard {shard} is not committed"
            first = shard * plan.shard_images
            count = min(plan.shard_images, plan.end_row - first)
            for slot, record in enumerate(commit.rows[:count]):
                row = first + slot
                status[row], sizes[row] = record.status, record.size
                if record.status != Status.OK:
                    details[row] = record.detail
                for layer, checksum in record.checksums.items():
                    checksums[layer][row] = checksum
            for layer in info.layers:
                table = read_shard_index(root / layout.shard_path(layer, shard), info.shard_images)
                chunks[layer][first : first + count] = table[:count]
    failures = list(latest.missing)
    for key, row in zip(latest.keys, latest.rows.tolist(), strict=True):
        if row >= 0 and status[row] != Status.OK:
            failures.append(Failure(key, Status(status[row]).reason, details[row]))

    encoded = [key.encode() for key in latest.keys]
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, encoded), np.uint64, len(encoded))
    order = np.argsort(hashes, kind="stable")
    ordered = [encoded[i] for i in order.tolist()]
    generation = f"index/{latest.generation:08d}"
    base = root / generation
    shutil.rmtree(base, ignore_errors=True)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "key_hash": hashes[order],
        "key_bytes": np.frombuffer(b"".join(ordered), np.uint8),
        "key_ends": np.cumsum([len(key) for key in ordered], dtype=np.uint64),
        "key_rows": latest.rows[order].astype(np.int64),
        "digests": digests,
        "status": status,
        "sizes": sizes,
        "failures": _text([json.dumps([f.key, f.reason, f.detail]) for f in failures]),
        **{f"chunks/{layer}": table for layer, table in chunks.items()},
        **{f"checksums/{layer}": sums for layer, sums in checksums.items()},
    }
    for name, values in arrays.items():
        write_array(base / name, values)
    for group in ("index", generation, f"{generation}/chunks", f"{generation}/checksums"):
        write_group(root / group)
    info.index = generation
    info.save(root)
    for old in (root / "index").iterdir():
        if old.is_dir() and old != base:
            shutil.rmtree(old)


def read_shard_index(path: Path, images: int) -> np.ndarray[Any, Any]:
    """The shard index at a shard file's end. Raises CorruptStoreError."""
    length = 16 * images + 4
    try:
        with path.open("rb") as file:
            file.seek(-length, 2)
            return layout.decode_shard_index(file.read(length), path)
    except OSError as error:
        raise CorruptStoreError(
            f"{path} cannot be read ({error.strerror}); delete its commit record in journal/ and "
            "rerun `featcache extract`"
        ) from None


def write_group(path: Path) -> None:
    publish_json(path / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": {}})


def _text(lines: Sequence[str]) -> np.ndarray[Any, Any]:
    """Strings as uint8: their count, their lengths, their UTF-8 bytes (keys may hold newlines)."""
    encoded = [line.encode() for line in lines]
    head = np.array([len(encoded), *map(len, encoded)], "<u8").tobytes()
    return np.frombuffer(head + b"".join(encoded), np.uint8)


def _lines(values: np.ndarray[Any, Any]) -> list[str]:
    raw = values.tobytes()
    count = int.from_bytes(raw[:8], "little")
    lengths = np.frombuffer(raw, "<u8", count, 8).tolist()
    lines, at = [], 8 * (count + 1)
    for length in lengths:
        lines.append(raw[at : at + length].decode())
        at += length
    return lines
