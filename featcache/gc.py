"""Freeing the rows that nothing points to: features of images whose bytes have changed since.

Row numbers never change and the other images keep their places, so readers of them notice nothing.
Three steps, each of them safe to be killed in and taken up by the next run:

1. The commit records say of those rows DROPPED, still with their checksums. From here on no
   extraction gives such a row to an image whose bytes come back.
2. The index is compiled, so that whoever opens the store knows it too.
3. Shard by shard, the data files are written again around holes, at the same lengths, and then the
   commit record without those checksums. Until then its whole-file checksums may be those of files
   already replaced; every live row matches its own throughout.

A run that had opened the store before the bytes changed may still want a dropped row: its reader
finds that the bytes are not those of the row's checksum.

RAM: one shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import IncompleteStoreError, StoreError
from featcache.files import Seal
from featcache.index import compile_index, is_current, remove_old
from featcache.journal import Commit, Journal, RowRecord, locked, merge
from featcache.layout import Status, StoreInfo
from featcache.store import form_of, shard_spec
from featcache.writer import ShardBuffer, ShardSpec, write_error


@dataclass(frozen=True, slots=True)
class GcResult:
    """What a collection came to.

    rows: dropped and freed, those included that a stopped run had dropped only.
    shards: rewritten. freed_bytes: on disk; in a dry run, of the rows' features.
    damaged: {shard: its rows that should be whole and are not}; such a shard was left alone.
    """

    rows: int = 0
    shards: int = 0
    freed_bytes: int = 0
    damaged: dict[int, list[int]] = field(default_factory=dict)


def collect(
    root: Path, *, dry_run: bool = False, on_progress: Callable[[int, int], None] = lambda *_: None
) -> GcResult:
    """Free the rows of the store at `root` that no image key means any more.

    on_progress: called with (shards done, of how many).
    Raises StoreError (no store in a folder, or another process is writing it),
    IncompleteStoreError where an extraction has not finished, CorruptStoreError for a damaged
    journal.
    """
    if form_of(root).one_file:
        raise StoreError(
            f"{root} is an HDF5 file, which is never changed; run `featcache gc` on a store in a "
            "folder, and `featcache convert` that again"
        )
    StoreInfo.load(root)  # before the lock, which would make a folder
    if dry_run:
        info, journal = _finished(root)
        dead = _unfreed(root, journal) | unreferenced(journal)
        rows = int(dead.sum())
        shards = len(_by_shard(dead, info.shard_images))
        return GcResult(rows, shards, rows * feature_bytes(shard_spec(root, info)))
    try:
        with locked(root):
            return _collect(root, on_progress)
    except OSError as error:
        raise write_error(root, error) from error


def feature_bytes(spec: ShardSpec) -> int:
    """What freeing one row gives back: its place in every layer's features file."""
    return sum(spec.geometry(layer).pitch_bytes for layer in spec.layers)


def _collect(root: Path, on_progress: Callable[[int, int], None]) -> GcResult:
    info, journal = _finished(root)
    if not is_current(root, info, journal):
        compile_index(root, info, journal)
    dead = unreferenced(journal)
    for shard, slots in _by_shard(dead, info.shard_images).items():
        commit = _record(root, shard)
        replace(commit, rows=_drop(commit.rows, slots)).save(root)
    if dead.any():
        journal.status[dead] = Status.DROPPED
        compile_index(root, info, journal)
    remove_old(root, info)

    unfreed = _by_shard(_unfreed(root, journal), info.shard_images)
    result = GcResult()
    buffer = ShardBuffer(shard_spec(root, info)) if unfreed else None
    for done, (shard, slots) in enumerate(unfreed.items()):
        assert buffer is not None
        on_progress(done, len(unfreed))
        commit = _record(root, shard)
        freed = [
            RowRecord(row.status, row.detail, row.size) if row.status == Status.DROPPED else row
            for row in commit.rows
        ]
        if bad := buffer.load(root, shard, freed):
            result.damaged[shard] = [shard * info.shard_images + slot for slot in bad]
            continue
        before = disk_bytes(root, commit.files)
        buffer.rewrite(root, commit)
        after = disk_bytes(root, commit.files)
        result = replace(
            result,
            rows=result.rows + len(slots),
            shards=result.shards + 1,
            freed_bytes=result.freed_bytes + before - after,
        )
    on_progress(len(unfreed), len(unfreed))
    return result


def _finished(root: Path) -> tuple[StoreInfo, Journal]:
    """Raises IncompleteStoreError where shards are still to be written."""
    info = StoreInfo.load(root)
    journal = Journal.load(root, info.generation)
    if info.index is None or journal.pending:
        raise IncompleteStoreError(
            f"{root} is not finished: {len(journal.pending)} of {journal.num_shards} shards are to "
            "be written; run the same `featcache extract` command again, then gc"
        )
    return info, journal


def unreferenced(journal: Journal) -> np.ndarray[Any, Any]:
    """bool[R]: rows with features that no key means after all plans."""
    dead = journal.status == Status.OK
    meant = np.fromiter(merge(journal.plans).rows.values(), np.int64)
    dead[meant[meant >= 0]] = False
    return dead


def _unfreed(root: Path, journal: Journal) -> np.ndarray[Any, Any]:
    """bool[R]: rows that were dropped and still take space."""
    unfreed = journal.status == Status.DROPPED
    for plan in journal.plans:
        for shard in plan.shards:
            first = shard * plan.shard_images
            here = unfreed[first : min(first + plan.shard_images, plan.end_row)]
            if here.any():
                here &= [bool(row.checksums) for row in _record(root, shard).rows[: len(here)]]
    return unfreed


def _by_shard(rows: np.ndarray[Any, Any], shard_images: int) -> dict[int, list[int]]:
    """rows: bool[R]. {shard: slots in it}, of shards where there are any."""
    found: dict[int, list[int]] = {}
    for row in np.flatnonzero(rows).tolist():
        found.setdefault(row // shard_images, []).append(row % shard_images)
    return found


def _drop(rows: list[RowRecord], slots: list[int]) -> list[RowRecord]:
    dropped = list(rows)
    for slot in slots:
        detail = "no image key means it any more"
        dropped[slot] = replace(rows[slot], status=Status.DROPPED, detail=detail)
    return dropped


def _record(root: Path, shard: int) -> Commit:
    commit = Commit.load_record(root, shard)
    assert commit is not None  # the shard is not pending
    return commit


def disk_bytes(root: Path, files: Mapping[str, Seal]) -> int:
    """What the files take on the disk, holes not counted. Raises OSError."""
    return sum((root / path).stat().st_blocks * 512 for path in files)
