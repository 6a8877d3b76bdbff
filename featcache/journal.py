"""What was planned and what was done: the truth of a store, from which its index is compiled.

A *plan* fixes which images get which rows before any work and never changes. A *commit record* is
written last, when all files of its shard are in place; a shard without a whole one does not exist.
All of them are sealed: not a byte of them can change unseen.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featcache import layout
from featcache.errors import CorruptStoreError, StoreError
from featcache.files import (
    Seal,
    append_checksum,
    publish,
    publish_after,
    seal_json,
    sweep,
    unseal,
    unseal_json,
)
from featcache.layout import Status
from featcache.object_path import ObjectPath, StorePath, read_each, size_of

DIGEST_BYTES = 16
DATA_FOLDERS = ("features", "scales", "pooled")
"""Of the files that commit records vouch for."""


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
    batch_size: images per forward in its shards, whoever encodes them.
    image_root: where its keys were found.
    keys, rows: image keys that are new or mean another image than before, and their rows, -1 where
    the file cannot be read. missing: why, one for each of those.
    new_digests: identities of the images of its rows, in order.
    """

    generation: int
    first_shard: int
    shard_images: int
    batch_size: int
    image_root: str
    keys: list[str]
    rows: np.ndarray[Any, Any]
    missing: list[Failure]
    new_digests: list[bytes]

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

    def save(self, root: StorePath) -> None:
        """Publish it under journal/, and then its second copy. Raises OSError, and StoreError where
        another job has planned something else under this number."""
        buffer = io.BytesIO()
        head = [self.generation, self.first_shard, self.shard_images, self.batch_size]
        np.savez(
            buffer,
            head=np.array(head, np.int64),
            image_root=pack_lines([self.image_root]),
            keys=pack_lines(self.keys),
            rows=self.rows,
            missing=pack_failures(self.missing),
            digests=np.frombuffer(b"".join(self.new_digests), np.uint8),
        )
        append_checksum(buffer)
        path = layout.plan_path(self.generation)
        try:
            publish_after(root / path, buffer.getbuffer(), None)
        except FileExistsError:
            raise StoreError(
                f"{root}: another job has planned generation {self.generation} meanwhile; let it "
                "finish, then run the same command again"
            ) from None
        publish(root / layout.copy_path(path), [buffer.getbuffer()])

    @classmethod
    def parse(cls, raw: bytes) -> Plan:
        """raw: the bytes of a plan's file. Raises ValueError for any change."""
        try:
            with np.load(io.BytesIO(unseal(raw))) as data:
                generation, first_shard, shard_images, batch_size = map(int, data["head"])
                flat = data["digests"].tobytes()
                return cls(
                    generation,
                    first_shard,
                    shard_images,
                    batch_size,
                    unpack_lines(data["image_root"])[0],
                    unpack_lines(data["keys"]),
                    data["rows"],
                    unpack_failures(data["missing"]),
                    [flat[i : i + DIGEST_BYTES] for i in range(0, len(flat), DIGEST_BYTES)],
                )
        except (OSError, EOFError, KeyError, IndexError, zipfile.BadZipFile) as error:
            raise ValueError(str(error)) from None

    @classmethod
    def load(cls, path: StorePath) -> Plan:
        """Raises CorruptStoreError."""
        try:
            return cls.parse(path.read_bytes())
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise CorruptStoreError(
                f"{path} is damaged ({reason}); `featcache verify {path.parent.parent} --repair` "
                "restores it"
            ) from None


@dataclass(slots=True)
class RowRecord:
    """What became of one row of a shard.

    status: `Status` value. detail: for the ledger, empty where the row is fine.
    size: original (width, height) in pixels, (0, 0) where unknown.
    checksums: xxh3_64 of the stored bytes, {layer: of codes and then scales, "pooled": ...}.
    grid: (height, width) in patches where each image has its own, else None and not written.
    """

    status: int = Status.UNUSED
    detail: str = ""
    size: tuple[int, int] = (0, 0)
    checksums: dict[str, int] = field(default_factory=dict)
    grid: tuple[int, int] | None = None


@dataclass(slots=True)
class Commit:
    """The commit record of one shard: journal/commit-<shard>.json.

    files: {path within the store: what was written}. seconds: time spent per stage. versions: of
    the libraries that computed it.
    """

    shard: int
    rows: list[RowRecord]
    files: dict[str, Seal]
    seconds: dict[str, float]
    versions: dict[str, str]

    def render(self) -> bytes:
        """The bytes of its file: the rows as columns, which take a third of the space of rows, and
        a thirtieth of the time to write."""
        names = dict.fromkeys(name for row in self.rows for name in row.checksums)
        grids = [row.grid for row in self.rows]
        return seal_json(
            {
                "shard": self.shard,
                "status": [row.status for row in self.rows],
                "size": [row.size for row in self.rows],
                "detail": {slot: row.detail for slot, row in enumerate(self.rows) if row.detail},
                "checksums": {
                    name: [row.checksums.get(name) for row in self.rows] for name in names
                },
                **({"grid": grids} if any(grids) else {}),
                "files": {path: asdict(seal) for path, seal in self.files.items()},
                "seconds": self.seconds,
                "versions": self.versions,
            }
        )

    @classmethod
    def parse(cls, raw: bytes) -> Commit:
        """What `render` gave. Raises ValueError for any change."""
        document = unseal_json(raw)
        detail = document["detail"]
        rows = [
            RowRecord(status, detail.get(str(slot), ""), (width, height))
            for slot, (status, (width, height)) in enumerate(
                zip(document["status"], document["size"], strict=True)
            )
        ]
        for name, checksums in document["checksums"].items():
            for row, checksum in zip(rows, checksums, strict=True):
                if checksum is not None:
                    row.checksums[name] = checksum
        for row, grid in zip(rows, document.get("grid", ()), strict=False):
            row.grid = None if grid is None else (grid[0], grid[1])
        return cls(
            shard=document["shard"],
            rows=rows,
            files={path: Seal(**seal) for path, seal in document["files"].items()},
            seconds=document["seconds"],
            versions=document["versions"],
        )

    def save(self, root: StorePath) -> None:
        """Publish it under journal/. Raises OSError."""
        publish(root / layout.commit_path(self.shard), [self.render()])

    @classmethod
    def load(cls, root: StorePath, shard: int) -> Commit | None:
        """None where the shard is not there as a whole: no record, one that was changed, or files
        missing or of another length. It is then written again, to the same bytes."""
        commit = cls.load_record(root, shard)
        return commit if commit is not None and commit.is_whole(size_of(root)) else None

    def is_whole(self, nbytes_of: Callable[[str], int | None]) -> bool:
        """nbytes_of: how long a file of the store is, None where there is none."""
        return all(nbytes_of(path) == seal.nbytes for path, seal in self.files.items())

    @classmethod
    def load_record(cls, root: StorePath, shard: int) -> Commit | None:
        """The record as such, whatever became of the files it vouches for."""
        return next(cls.load_records(root, [shard]))

    @classmethod
    def load_records(cls, root: StorePath, shards: Sequence[int]) -> Iterator[Commit | None]:
        """`load_record` of each; out of a bucket, many at once."""
        raws = read_each([root / layout.commit_path(shard) for shard in shards])
        for shard, raw in zip(shards, raws, strict=True):
            commit = None
            if raw is not None:
                with contextlib.suppress(ValueError):
                    commit = cls.parse(raw)
            # Else whole, and of another place.
            yield commit if commit is not None and commit.shard == shard else None


@dataclass(slots=True)
class Journal:
    """All of a store's plans, oldest first, and what became of them.

    status: uint8[R], UNUSED where a row's shard is not committed. sizes: int32[R, 2], original
    width and height in pixels. checksums: {layer or "pooled": uint64[R]}, 0 where a row has none.
    grids: int32[R, 2], height and width in patches where they vary, else zeros.
    details: {row: why it has none}. pending: (plan, shard) still to be done, in order.
    recorded: shards that have a commit record, if a damaged one.

    RAM: 17 bytes a row, and 8 for each checksum.
    """

    plans: list[Plan]
    status: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any]
    grids: np.ndarray[Any, Any]
    checksums: dict[str, np.ndarray[Any, Any]]
    details: dict[int, str]
    pending: list[tuple[Plan, int]]
    recorded: frozenset[int] = frozenset()

    @property
    def num_shards(self) -> int:
        return sum(plan.num_shards for plan in self.plans)

    @classmethod
    def load(cls, root: StorePath, generation: int = 0) -> Journal:
        """generation: of the last plan that must be there, as the store's description says.

        Raises CorruptStoreError.
        """
        plans, recorded = cls.load_plans(root, generation), recorded_shards(root)
        shards = [shard for plan in plans for shard in plan.shards if shard in recorded]
        commits = zip(shards, Commit.load_records(root, shards), strict=True)
        nbytes_of = size_of(root, DATA_FOLDERS)

        def commit_of(shard: int) -> Commit | None:
            if shard not in recorded:
                return None
            place, commit = next(commits)  # they are asked for in this order
            assert place == shard
            return commit if commit is not None and commit.is_whole(nbytes_of) else None

        journal = cls.gather(plans, commit_of)
        journal.recorded = recorded
        return journal

    @staticmethod
    def load_plans(root: StorePath, generation: int = 0) -> list[Plan]:
        """Oldest first. Raises CorruptStoreError."""
        found = {path.name for path in (root / "journal").glob("plan-*.npz")}
        copies = {path.name for path in (root / layout.copy_path("")).glob("plan-*.npz")}
        known = max(generation, len(found), len(copies))
        paths = [root / layout.plan_path(number) for number in range(1, known + 1)]
        return [Plan.load(path) for path in paths]

    @classmethod
    def gather(cls, plans: list[Plan], commit_of: Callable[[int], Commit | None]) -> Journal:
        """commit_of: a shard's commit record, None where it has none."""
        rows = num_rows(plans)
        journal = cls(
            plans,
            np.full(rows, Status.UNUSED, np.uint8),
            np.zeros((rows, 2), np.int32),
            np.zeros((rows, 2), np.int32),
            {},
            {},
            [],
        )
        for plan in plans:
            for shard in plan.shards:
                commit = commit_of(shard)
                if commit is None:
                    journal.pending.append((plan, shard))
                    continue
                first = shard * plan.shard_images
                journal._enter(first, commit.rows[: plan.end_row - first])
        return journal

    def _enter(self, first: int, records: list[RowRecord]) -> None:
        here = slice(first, first + len(records))
        self.status[here] = [record.status for record in records]
        self.sizes[here] = [record.size for record in records]
        self.grids[here] = [record.grid or (0, 0) for record in records]
        for row, record in enumerate(records, first):
            if record.status != Status.OK:
                self.details[row] = record.detail
        for name in dict.fromkeys(name for record in records for name in record.checksums):
            if name not in self.checksums:
                self.checksums[name] = np.zeros(len(self.status), np.uint64)
            self.checksums[name][here] = [record.checksums.get(name, 0) for record in records]


def recorded_shards(root: StorePath) -> frozenset[int]:
    """Those with a commit record, by their names alone: 100,000 in 0.2 s."""
    names = (path.name for path in (root / "journal").glob("commit-*.json"))
    return frozenset(int(name.removeprefix("commit-").removesuffix(".json")) for name in names)


@contextmanager
def locked(root: StorePath) -> Iterator[None]:
    """Hold a store for writing, and sweep what a killed run left.

    The lock is the kernel's and goes with the process. A bucket has none: there, `publish_after` of
    plans and of the store's description keeps two jobs from planning different things, and two that
    work on the same plan write the same bytes.
    Raises StoreError where another has it, OSError where the store cannot be written.
    """
    if isinstance(root, ObjectPath):
        yield
        return
    journal = root / "journal"
    journal.mkdir(parents=True, exist_ok=True)
    with (journal / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"another process is writing {root}, or verifying it; wait for it, or stop it and "
                "run again"
            ) from None
        with _writers(root, fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
            if alone:
                sweep(root)
        yield


@contextmanager
def writing(root: StorePath) -> Iterator[None]:
    """Held by who writes shards: a rank may still do so when the process that held the lock is
    gone, and what it is about to publish must not be swept. Raises OSError."""
    if isinstance(root, ObjectPath):
        yield
        return
    with _writers(root, fcntl.LOCK_SH):
        yield


@contextmanager
def _writers(root: Path, operation: int) -> Iterator[bool]:
    """Whether the lock of those who write was to be had."""
    with (root / layout.WRITERS).open("a") as lock:
        try:
            fcntl.flock(lock, operation)
        except BlockingIOError:
            yield False
            return
        yield True


def num_rows(plans: Sequence[Plan]) -> int:
    """Rows of the store's arrays after these plans."""
    return max((plan.end_row for plan in plans if plan.new_digests), default=0)


@dataclass(frozen=True, slots=True)
class Keys:
    """What every image key means after all plans.

    rows: its row, -1 where its file cannot be read. missing: why, for those.
    """

    rows: dict[str, int]
    missing: dict[str, Failure]


def merge(plans: Sequence[Plan]) -> Keys:
    """The plans put together, later ones over earlier ones."""
    rows: dict[str, int] = {}
    missing: dict[str, Failure] = {}
    for plan in plans:
        rows.update(zip(plan.keys, plan.rows.tolist(), strict=True))
        missing.update((failure.key, failure) for failure in plan.missing)
    return Keys(rows, {key: why for key, why in missing.items() if rows[key] < 0})


def image_roots(plans: Sequence[Plan]) -> dict[str, str]:
    """{image key: the image root below which it was found when it got its row}."""
    roots: dict[str, str] = {}
    for plan in plans:
        roots.update(dict.fromkeys(plan.keys, plan.image_root))
    return roots


def key_of(plans: Sequence[Plan], row: int) -> str:
    """An image key of a row, the latest that it was given; for messages."""
    for plan in reversed(plans):
        places = np.flatnonzero(plan.rows == row)
        if len(places):
            return plan.keys[places[0]]
    return "no key"


def pack_failures(failures: Sequence[Failure]) -> np.ndarray[Any, Any]:
    return pack_lines([json.dumps([f.key, f.reason, f.detail]) for f in failures])


def unpack_failures(values: np.ndarray[Any, Any]) -> list[Failure]:
    return [Failure(*json.loads(line)) for line in unpack_lines(values)]


def pack_lines(lines: Sequence[str]) -> np.ndarray[Any, Any]:
    """Strings as uint8: their count, their lengths, their UTF-8 bytes (keys may hold newlines)."""
    encoded = [line.encode() for line in lines]
    head = np.array([len(encoded), *map(len, encoded)], "<u8").tobytes()
    return np.frombuffer(head + b"".join(encoded), np.uint8)


def unpack_lines(values: np.ndarray[Any, Any]) -> list[str]:
    raw = values.tobytes()
    count = int.from_bytes(raw[:8], "little")
    lengths = np.frombuffer(raw, "<u8", count, 8).tolist()
    lines, at = [], 8 * (count + 1)
    for length in lengths:
        lines.append(raw[at : at + length].decode())
        at += length
    return lines
