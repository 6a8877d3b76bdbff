"""Tasks that arrive while others are being worked on."""

from __future__ import annotations

import queue

from featcache.tasks import ShardTask


class QueuedTasks:
    """A `TaskSource` that one thread fills and another one empties."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[ShardTask | None] = queue.SimpleQueue()
        self._ended = False

    def put(self, task: ShardTask | None) -> None:
        """None: there will be no more."""
        self._queue.put(task)

    def begin(self) -> None:
        """After an end: there will be tasks again."""
        self._ended = False

    def next(self, wait: bool) -> ShardTask | None:
        if self._ended:
            return None
        try:
            task = self._queue.get(block=wait)
        except queue.Empty:
            return None
        self._ended = task is None
        return task
