"""Tasks that arrive while others are being worked on."""

from __future__ import annotations

import queue

from featcache.tasks import ShardTask


class QueuedTasks:
    """A `TaskSource` that one thread fills and another one empties."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[ShardTask | None] = queue.SimpleQueue()
        self._held: ShardTask | None = None
        self._ended = False

    def put(self, task: ShardTask | None) -> None:
        """None: there will be no more."""
        self._queue.put(task)

    def begin(self) -> None:
        """After an end: there will be tasks again."""
        self._ended = False

    def next(self) -> ShardTask | None:
        if self._held is None:
            self._take(0.0)
        task, self._held = self._held, None
        return task

    def wait(self, seconds: float) -> bool:
        if self._held is None:
            self._take(seconds)
        return not self._ended

    def _take(self, seconds: float) -> None:
        if self._ended:
            return
        try:
            self._held = self._queue.get(block=seconds > 0, timeout=seconds or None)
        except queue.Empty:
            return
        self._ended = self._held is None
