"""What every executor does, and how what many workers did is added up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np

from featcache.probe import Speed
from featcache.sources import ImageRef
from featcache.tasks import PendingTasks
from featcache.worker import EncoderInfo, ShardDone, WorkProgress

SHARDS_AHEAD = 3
"""Tasks that a worker holds: one encoded, one decoded ahead of it, one being written."""


class Executor(ABC):
    """Workers, ready to encode. Use as a context manager; leaving it stops them.

    workers: how many.
    """

    workers: int

    @abstractmethod
    def call(self, method: str, *arguments: Any) -> Any:
        """A method of `Worker`, on one of them. Raises what that raises, StoreError where the
        worker is lost."""

    @abstractmethod
    def run(self, tasks: PendingTasks) -> Generator[WorkProgress, None, None]:
        """Have each task's shard committed; yields what has been done so far, at least at the end.

        tasks: is gone through as workers become free. Raises FeatcacheError as `Worker.run`, and
        StoreError where workers are lost again and again.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop the workers; what they have not committed is not done."""

    def describe(self) -> EncoderInfo:
        info: EncoderInfo = self.call("describe")
        return info

    def probe(self, images: Sequence[ImageRef], batch_size: int) -> Speed | None:
        """Of one worker."""
        speed: Speed | None = self.call("probe", images, batch_size)
        return speed

    def calibrate(self, image_root: str) -> dict[str, np.ndarray[Any, Any]]:
        """See `Worker.calibrate`."""
        measured: dict[str, np.ndarray[Any, Any]] = self.call("calibrate", image_root)
        return measured

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Tally:
    """Adds up what several workers did.

    A worker that is lost takes its unfinished shards with it: what it had committed still counts.
    """

    def __init__(self) -> None:
        self._live: dict[int, WorkProgress] = {}
        self._committed: dict[int, WorkProgress] = {}
        self._gone = WorkProgress()
        self.lost = 0

    def report(self, worker: int, progress: WorkProgress) -> None:
        """What a worker says that it has done so far."""
        self._live[worker] = progress

    def commit(self, worker: int, done: ShardDone) -> None:
        before = self._committed.get(worker, WorkProgress())
        self._committed[worker] = _sum(before, done.work)

    def lose(self, worker: int) -> None:
        """The worker is gone; another one may take its number."""
        said = self._live.pop(worker, WorkProgress())
        committed = self._committed.pop(worker, WorkProgress())
        peaks = replace(said, done=0, own=0, failed=0, seconds={})
        self._gone = _sum(_sum(self._gone, committed), peaks)
        self.lost += 1

    def progress(self, workers: int) -> WorkProgress:
        """Of all together. workers: at work now."""
        total = self._gone
        for worker in {**self._committed, **self._live}:
            # Who reports no progress of its own is known by its shards.
            total = _sum(total, self._live.get(worker) or self._committed[worker])
        return replace(total, workers=workers, lost=self.lost)


def _sum(one: WorkProgress, other: WorkProgress) -> WorkProgress:
    seconds = dict(one.seconds)
    for stage, value in other.seconds.items():
        seconds[stage] = seconds.get(stage, 0.0) + value
    return WorkProgress(
        one.done + other.done,
        one.own + other.own,
        one.failed + other.failed,
        seconds,
        other.backed_off or one.backed_off,
        max(one.peak_ram_bytes, other.peak_ram_bytes),
        max(one.peak_gpu_bytes, other.peak_gpu_bytes),
    )
