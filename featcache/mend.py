"""Writing a damaged shard again from its own good rows.

A good row never changes, and is never lost with its image: only rows whose stored bytes are not
what was written are encoded once more, in the batches that their plan gave them.

RAM: two buffers of a shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

from featcache.encode import ShardEncoder
from featcache.errors import CorruptStoreError
from featcache.index import Index
from featcache.journal import Commit, Plan, RowRecord, merge
from featcache.layout import Status, StoreInfo
from featcache.object_path import StorePath
from featcache.planning import WITHOUT_ANSWER
from featcache.store import blank_spec
from featcache.writer import ShardBuffer


class ShardMender:
    """Mends shards of which it is known what was written.

    encoder: gives what encodes rows, when a row first needs it.
    """

    def __init__(
        self,
        root: StorePath,
        info: StoreInfo,
        plans: Sequence[Plan],
        encoder: Callable[[], ShardEncoder],
    ) -> None:
        self._root, self._info, self._plans, self._encoder = root, info, plans, encoder

    @functools.cached_property
    def buffer(self) -> ShardBuffer:
        """Reused by each shard."""
        return ShardBuffer(blank_spec(self._info))

    def records(self, plan: Plan, shard: int) -> list[RowRecord] | None:
        """What was written of each slot: by the commit record, else by the index; None where
        neither can tell."""
        commit = Commit.load_record(self._root, shard)
        if commit is not None:
            return commit.rows
        if self._info.index is None or plan.generation > self._info.generation:
            return None
        if self._indexed is None:
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
        return rows

    def mend(
        self, plan: Plan, shard: int, rows: list[RowRecord], *, retry: bool = False
    ) -> dict[int, RowRecord]:
        """Write a shard of which `records` gave `rows`. Returns what became of each slot that was
        damaged.

        retry: also try what had failed only for want of its file, or was dropped.
        Raises FeatcacheError where a row cannot be encoded (the shard then stays as it is) or
        nothing can be written.
        """
        buffer = self.buffer
        bad = buffer.load(self._root, shard, rows)
        retried = [slot for slot, row in enumerate(rows) if retry and row.status in WITHOUT_ANSWER]
        # The bad ones first: their batches were without what had failed.
        for slots in (bad, retried):
            if slots:
                self._encoder().again(plan, buffer, slots)
        for slot in retried:
            if buffer.rows[slot].status in WITHOUT_ANSWER:
                buffer.rows[slot] = rows[slot]
        commit = Commit.load_record(self._root, shard)
        if commit is None:
            buffer.publish(self._root)
        else:
            # Stopped on the way, the record must still tell which rows are good, and not vouch
            # for those that are lost: it takes files of the right length for whole.
            still = [
                now if was.status == Status.OK != now.status else was
                for was, now in zip(rows, buffer.rows, strict=True)
            ]
            if still != rows:
                replace(commit, rows=still).save(self._root)
            buffer.rewrite(self._root, commit)
        return {slot: buffer.rows[slot] for slot in bad}

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
