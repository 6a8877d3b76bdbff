"""Writing a damaged shard again from its own good rows.

A good row never changes, and is never lost with its image: only rows whose stored bytes are not
what was written are encoded once more, in the batches that their plan gave them.

RAM: two buffers of a shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from featcache.errors import CorruptStoreError
from featcache.index import Index
from featcache.journal import Commit, Plan, RowRecord, merge
from featcache.layout import Status, StoreInfo
from featcache.object_path import StorePath
from featcache.planning import WITHOUT_ANSWER
from featcache.writer import ShardBuffer

if TYPE_CHECKING:
    from featcache.tasks import ShardTask


class RowEncoder(Protocol):
    """What encodes single rows: featcache/encode.py."""

    def again(self, task: ShardTask, buffer: ShardBuffer, slots: Collection[int]) -> None:
        """Encode these slots of a loaded shard once more and leave the others as they are."""


class Records:
    """What was written of a store's shards, as far as anything can tell."""

    def __init__(self, root: StorePath, info: StoreInfo, plans: Sequence[Plan]) -> None:
        self._root, self._info, self._plans = root, info, plans

    def indexed(self, plan: Plan) -> bool:
        """Whether the index, if it is whole, knows the plan's rows."""
        return self._info.index is not None and plan.generation <= self._info.generation

    def of(self, plan: Plan, shard: int) -> list[RowRecord] | None:
        """Of each slot: by the commit record, else by the index; None where neither can tell."""
        commit = Commit.load_record(self._root, shard)
        if commit is not None:
            return commit.rows
        if not self.indexed(plan) or self._indexed is None:
            return None
        index, details = self._indexed
        rows = [RowRecord() for _ in range(self._info.shard_images)]
        first = shard * plan.shard_images
        for slot in range(len(plan.digests_of(shard))):
            row = first + slot
            status = int(index.status[row])
            width, height = index.sizes[row].tolist()
            rows[slot] = RowRecord(status, details.get(row, ""), (width, height))
            if status == Status.OK:
                rows[slot].checksums = {name: int(of[row]) for name, of in index.checksums.items()}
                if index.grids is not None:
                    height, width = index.grids[row].tolist()
                    rows[slot].grid = (height, width)
        return rows

    @functools.cached_property
    def _indexed(self) -> tuple[Index, dict[int, str]] | None:
        """The index, and {row: detail} of its failures; None where it is damaged."""
        try:
            index = Index.load(self._root, self._info)
        except CorruptStoreError:
            return None
        # The rows that keys meant when the index was made.
        row_of_key = merge(self._plans[: self._info.generation]).rows
        return index, {row_of_key.get(key, -1): why.detail for key, why in index.failures.items()}


def mend(
    root: StorePath,
    buffer: ShardBuffer,
    task: ShardTask,
    encoder: Callable[[], RowEncoder],
    *,
    retry: bool = False,
) -> tuple[Commit, dict[int, RowRecord]]:
    """Write a shard of which `task.was` tells what was written. Returns its commit record, and what
    became of each slot that was damaged.

    buffer: is overwritten. encoder: gives what encodes rows, where a row needs it. retry: also try
    what had failed only for want of its file, or was dropped.
    Raises FeatcacheError where a row cannot be encoded (the shard then stays as it is) or nothing
    can be written.
    """
    assert task.was is not None
    rows = list(task.was)
    bad = buffer.load(root, task.shard, rows)
    retried = [slot for slot, row in enumerate(rows) if retry and row.status in WITHOUT_ANSWER]
    # The bad ones first: their batches were without what had failed.
    for slots in (bad, retried):
        if slots:
            encoder().again(task, buffer, slots)
    for slot in retried:
        if buffer.rows[slot].status in WITHOUT_ANSWER:
            buffer.rows[slot] = rows[slot]
    commit = Commit.load_record(root, task.shard)
    if commit is None:
        commit = buffer.publish(root)
    else:
        # Stopped on the way, the record must still tell which rows are good, and not vouch
        # for those that are lost: it takes files of the right length for whole.
        still = [
            now if was.status == Status.OK != now.status else was
            for was, now in zip(rows, buffer.rows, strict=True)
        ]
        if still != rows:
            replace(commit, rows=still).save(root)
        commit = buffer.rewrite(root, commit)
    return commit, {slot: buffer.rows[slot] for slot in bad}
