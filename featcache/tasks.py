"""The work on one shard, complete and small enough to be sent to a worker anywhere: a worker knows
neither plans nor keys (those of 12M images are gigabytes in every process)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from featcache.journal import Plan, RowRecord
from featcache.mend import Records
from featcache.sources import ImageRef, Sources


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """digest: the identity that its bytes must have. refs: where they may lie, the likeliest
    first."""

    digest: bytes
    refs: tuple[ImageRef, ...]


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to be written.

    batch_size: images per forward, by the plan. images: of its rows, in order. was: what is known
    to have been written of each slot, where the shard was there and is damaged.
    """

    shard: int
    batch_size: int
    images: tuple[PlannedImage, ...]
    was: tuple[RowRecord, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Of builtins alone: hundreds of dataclasses take several times as long to pickle, and all
        # of a store's tasks are pickled by one process.
        images = [
            (image.digest, [(ref.root, ref.key) for ref in image.refs]) for image in self.images
        ]
        return _unpickled, (self.shard, self.batch_size, images, self.was)


def _unpickled(
    shard: int,
    batch_size: int,
    images: list[tuple[bytes, list[tuple[str, str]]]],
    was: tuple[RowRecord, ...] | None,
) -> ShardTask:
    planned = tuple(
        PlannedImage(digest, tuple(ImageRef(*ref) for ref in refs)) for digest, refs in images
    )
    return ShardTask(shard, batch_size, planned, was)


def task_of(
    sources: Sources, plan: Plan, shard: int, was: Iterable[RowRecord] | None = None
) -> ShardTask:
    """The task of a planned shard."""
    digests = plan.digests_of(shard)
    places = sources.refs(shard * plan.shard_images, len(digests))
    images = tuple(map(PlannedImage, digests, places))
    return ShardTask(shard, plan.batch_size, images, None if was is None else tuple(was))


class PendingTasks:
    """The tasks of planned shards, made when they are asked for."""

    def __init__(
        self,
        pending: list[tuple[Plan, int]],
        sources: Sources,
        records: Records,
        recorded: frozenset[int] = frozenset(),
    ) -> None:
        """recorded: shards that have a commit record, if a damaged one."""
        self._pending = pending
        self._sources, self._records = sources, records
        self.recorded = recorded

    @property
    def shards(self) -> list[int]:
        """In order."""
        return [shard for _, shard in self._pending]

    @property
    def images(self) -> list[int]:
        """Of each."""
        return [len(plan.digests_of(shard)) for plan, shard in self._pending]

    def __len__(self) -> int:
        return len(self._pending)

    def __getitem__(self, number: int) -> ShardTask:
        plan, shard = self._pending[number]
        known = shard in self.recorded or self._records.indexed(plan)
        was = self._records.of(plan, shard) if known else None
        return task_of(self._sources, plan, shard, was)

    def __iter__(self) -> Iterator[ShardTask]:
        return (self[number] for number in range(len(self)))
