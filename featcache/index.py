"""What is where in a store: image keys to rows, rows to bytes, and why an image has none.

The index is compiled from the journal (featcache/journal.py) when an extraction finishes: plain
arrays that are mapped, not parsed.

Letters: K keys, R rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from featcache import layout
from featcache.errors import CorruptStoreError
from featcache.files import publish_json, remove_tree
from featcache.journal import (
    DIGEST_BYTES,
    Failure,
    Journal,
    Keys,
    merge,
    pack_failures,
    unpack_failures,
)
from featcache.layout import Status, StoreInfo, array_checksum, read_array, write_array
from featcache.object_path import ObjectPath, StorePath

COMPARED_KEYS = 4096
"""Keys whose texts are compared at once."""


@dataclass(slots=True)
class Index:
    """The compiled index. Arrays are mapped read-only.

    key_hash: uint64[K] ascending xxh3_64 of the keys; key_bytes, key_ends: their UTF-8 text, one
    after the other in that order; key_rows: int64[K], -1 where the image has no row.
    digests: uint8[R, 16]; status: uint8[R]; sizes: int32[R, 2] original width and height;
    checksums: {layer or "pooled": uint64[R]} xxh3_64 of a row's stored bytes;
    packed_failures: uint8, see `failures`.
    grids: int32[R, 2] height and width in patches, zeros without features; None where all images
    have the same.
    """

    key_hash: np.ndarray[Any, Any]
    key_bytes: np.ndarray[Any, Any]
    key_ends: np.ndarray[Any, Any]
    key_rows: np.ndarray[Any, Any]
    digests: np.ndarray[Any, Any]
    status: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any]
    checksums: dict[str, np.ndarray[Any, Any]]
    packed_failures: np.ndarray[Any, Any]
    grids: np.ndarray[Any, Any] | None = None
    _failures: dict[str, Failure] | None = field(default=None, init=False, repr=False)

    @property
    def num_rows(self) -> int:
        return len(self.status)

    @property
    def failures(self) -> dict[str, Failure]:
        """The ledger by image key; parsed when it is first asked for."""
        if self._failures is None:
            found = unpack_failures(self.packed_failures)
            self._failures = {failure.key: failure for failure in found}
        return self._failures

    def find(self, keys: Sequence[str]) -> np.ndarray[Any, Any]:
        """int64[len(keys)]: each key's row if it has features, else -1."""
        encoded = [key.encode() for key in keys]
        places = self.places(*pack_keys(encoded))
        rows = np.full(len(encoded), -1, np.int64)
        rows[places >= 0] = self.key_rows[places[places >= 0]]
        has = rows >= 0
        rows[has] = np.where(self.status[rows[has]] == Status.OK, rows[has], -1)
        return rows

    def places(
        self,
        hashes: np.ndarray[Any, Any],
        text: np.ndarray[Any, Any],
        ends: np.ndarray[Any, Any],
    ) -> np.ndarray[Any, Any]:
        """Where other keys stand in this index's arrays of keys: int64[len(hashes)], -1 where not.

        hashes, text, ends: of those keys as in `key_hash`, `key_bytes`, `key_ends`, in any order.
        """
        found = np.full(len(hashes), -1, np.int64)
        asked = np.argsort(hashes)  # so that memory is met in order
        place = np.searchsorted(self.key_hash, hashes[asked])
        while True:
            # Equal hashes lie side by side; the text decides.
            same = place < len(self.key_hash)
            same[same] = self.key_hash[place[same]] == hashes[asked[same]]
            asked, place = asked[same], place[same]
            if not len(asked):
                return found
            equal = _equal_texts(self.key_bytes, self.key_ends, place, text, ends, asked)
            found[asked[equal]] = place[equal]
            asked, place = asked[~equal], place[~equal] + 1

    def unreferenced(self) -> np.ndarray[Any, Any]:
        """bool[R]: rows with features that no key means, which `featcache gc` would free."""
        found = self.status == Status.OK
        found[self.key_rows[self.key_rows >= 0]] = False
        return np.asarray(found)

    def keys(self) -> list[str]:
        """Every key, in hash order."""
        return [self.key(i) for i in range(len(self.key_hash))]

    def key(self, i: int) -> str:
        """The key at place i of the arrays of keys."""
        start = int(self.key_ends[i - 1]) if i else 0
        return self.key_bytes[start : int(self.key_ends[i])].tobytes().decode()

    @classmethod
    def load(cls, root: StorePath, info: StoreInfo) -> Index:
        """Raises CorruptStoreError."""
        return cls.load_from(functools.partial(read_array, root), info)

    @classmethod
    def load_from(cls, array: Callable[[str, str], np.ndarray[Any, Any]], info: StoreInfo) -> Index:
        """array: reads one, by its name and its checksum. Raises what that raises."""
        assert info.index is not None

        def read(name: str) -> np.ndarray[Any, Any]:
            path = f"{info.index}/{name}"
            return array(path, info.checksums.get(path, ""))

        return cls(
            **{name: read(name) for name in _PLAIN},
            checksums={name: read(f"checksums/{name}") for name in checksummed(info)},
            packed_failures=read("failures"),
            grids=read("grids") if info.varies else None,
        )


_PLAIN = ("key_hash", "key_bytes", "key_ends", "key_rows", "digests", "status", "sizes")


def pack_keys(
    encoded: Sequence[bytes],
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Keys in UTF-8 as (hashes, text, ends), in their order: see `Index`."""
    lengths = np.fromiter(map(len, encoded), np.uint64, len(encoded))
    text = np.frombuffer(b"".join(encoded), np.uint8)
    return hash_keys(encoded), text, np.cumsum(lengths, dtype=np.uint64)


def hash_keys(encoded: Sequence[bytes]) -> np.ndarray[Any, Any]:
    """uint64[K]: xxh3_64 of each key."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, encoded), np.uint64, len(encoded))


def _equal_texts(
    left: np.ndarray[Any, Any],
    left_ends: np.ndarray[Any, Any],
    left_at: np.ndarray[Any, Any],
    right: np.ndarray[Any, Any],
    right_ends: np.ndarray[Any, Any],
    right_at: np.ndarray[Any, Any],
) -> np.ndarray[Any, Any]:
    """bool[n]: whether key left_at[i] of one packed text is key right_at[i] of another.

    RAM: `COMPARED_KEYS` keys, 40 bytes a letter.
    """
    equal = np.zeros(len(left_at), np.bool_)
    for first in range(0, len(left_at), COMPARED_KEYS):
        block = slice(first, first + COMPARED_KEYS)
        left_start, lengths = _extents(left_ends, left_at[block])
        right_start, right_lengths = _extents(right_ends, right_at[block])
        same = lengths == right_lengths
        filled = np.flatnonzero(same & (lengths > 0))  # two empty keys are equal
        counts = lengths[filled]
        if len(filled):
            offsets = np.cumsum(counts) - counts
            letters = np.arange(counts.sum())
            of_left = left[np.repeat(left_start[filled] - offsets, counts) + letters]
            of_right = right[np.repeat(right_start[filled] - offsets, counts) + letters]
            same[filled] = np.logical_and.reduceat(of_left == of_right, offsets)
        equal[block] = same
    return equal


def _extents(
    ends: np.ndarray[Any, Any], at: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Where keys begin in their text, and their lengths: both int64."""
    starts = np.where(at > 0, ends[at - 1], 0).astype(np.int64)
    return starts, ends[at].astype(np.int64) - starts


def checksummed(info: StoreInfo) -> list[str]:
    """The names that a row's checksums go by: its layers, and "pooled" where there is one."""
    return [*info.layers, *(["pooled"] if info.pooled else [])]


def compile_index(root: StorePath, info: StoreInfo, journal: Journal) -> None:
    """Compile a journal without pending shards into a new index and make it the valid one.

    The new index is written beside the old one, which stays valid until the root attributes are
    replaced in one go and is removed afterwards.
    Raises OSError.
    """
    name = _next_name(root)
    generation = journal.plans[-1].generation
    publish_index(root, info, name, generation, build_arrays(info, journal))
    remove_old(root, info)


def publish_index(
    root: StorePath,
    info: StoreInfo,
    name: str,
    generation: int,
    arrays: Mapping[str, np.ndarray[Any, Any]],
) -> None:
    """Write an index's arrays to `name` and make it the valid one. Raises OSError."""
    for path, values in arrays.items():
        write_array(root / name / path, values)
    for group in ("index", name, f"{name}/checksums"):
        write_group(root / group)
    enter_index(info, name, generation, arrays)
    info.save(root)


def enter_index(
    info: StoreInfo, name: str, generation: int, arrays: Mapping[str, np.ndarray[Any, Any]]
) -> None:
    """Describe the index `name`, of these arrays, as the valid one."""
    others = {
        path: checksum for path, checksum in info.checksums.items() if not path.startswith("index/")
    }
    of_index = {f"{name}/{path}": array_checksum(values) for path, values in arrays.items()}
    info.checksums = {**others, **of_index}
    info.index = name
    info.generation = generation


def is_current(root: StorePath, info: StoreInfo, journal: Journal) -> bool:
    """Whether the index says what a journal without pending shards says: a run may have been
    stopped between its last commit record and the index, or the index may be damaged."""
    if info.index is None or info.generation != max(plan.generation for plan in journal.plans):
        return False
    should = {
        f"{info.index}/{path}": array_checksum(values)
        for path, values in build_arrays(info, journal).items()
    }
    if any(info.checksums.get(path) != checksum for path, checksum in should.items()):
        return False
    try:
        Index.load(root, info)
    except CorruptStoreError:
        return False
    return True


def remove_old(root: StorePath, info: StoreInfo) -> None:
    """Remove what is below `index` but the valid one: a run may have been stopped before it did."""
    assert info.index is not None
    if isinstance(root, ObjectPath) and StoreInfo.load(root).index != info.index:
        return  # another job has compiled a later one meanwhile
    for old in (root / "index").iterdir():
        if old.is_dir() and old != root / info.index:
            remove_tree(old)


def build_arrays(info: StoreInfo, journal: Journal) -> dict[str, np.ndarray[Any, Any]]:
    """The index's arrays by name, worked out from the journal alone."""
    assert not journal.pending
    rows = len(journal.status)
    digests = np.zeros((rows, DIGEST_BYTES), np.uint8)
    for plan in journal.plans:
        flat = np.frombuffer(b"".join(plan.new_digests), np.uint8)
        digests[plan.first_row : plan.end_row] = flat.reshape(-1, DIGEST_BYTES)
    none = np.zeros(rows, np.uint64)
    # A row that gc has dropped has them still in its record, until its bytes are gone.
    ok = journal.status == Status.OK
    checksums = {
        name: np.where(ok, journal.checksums.get(name, none), none) for name in checksummed(info)
    }

    known = merge(journal.plans)
    keys = list(known.rows)
    key_rows = np.fromiter(known.rows.values(), np.int64, len(keys))
    lost = key_rows < 0
    lost[~lost] = ~ok[key_rows[~lost]]
    failures = [
        _failure(journal, known, keys[i], int(key_rows[i])) for i in np.flatnonzero(lost).tolist()
    ]
    encoded = [key.encode() for key in keys]
    hashes = hash_keys(encoded)
    order = np.argsort(hashes, kind="stable")
    ordered = [encoded[i] for i in order.tolist()]
    return {
        "key_hash": hashes[order],
        "key_bytes": np.frombuffer(b"".join(ordered), np.uint8),
        "key_ends": np.cumsum(
            np.fromiter(map(len, ordered), np.uint64, len(ordered)), dtype=np.uint64
        ),
        "key_rows": key_rows[order],
        "digests": digests,
        "status": journal.status,
        "sizes": journal.sizes,
        "failures": pack_failures(failures),
        **{f"checksums/{name}": sums for name, sums in checksums.items()},
        **({"grids": np.where(ok[:, None], journal.grids, 0)} if info.varies else {}),
    }


def _failure(journal: Journal, known: Keys, key: str, row: int) -> Failure:
    """Why a key has no features. row: -1 where it has none."""
    if row < 0:
        return known.missing[key]
    return Failure(key, Status(journal.status[row]).reason, journal.details[row])


def _next_name(root: StorePath) -> str:
    """A folder below `index` that was never the valid one and does not exist."""
    taken = [int(path.name) for path in (root / "index").glob("[0-9]*")]
    return f"index/{max(taken, default=0) + 1:08d}"


def write_group(path: StorePath) -> None:
    publish_json(path / "zarr.json", layout.group_metadata())
