"""One worker in this process."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from featcache.encode import Tasks
from featcache.executors.base import Executor
from featcache.tasks import PendingTasks
from featcache.worker import WorkerOptions, WorkProgress


class InlineExecutor(Executor):
    """Encodes in the caller's thread. Raises as `Worker`."""

    workers = 1

    def __init__(self, options: WorkerOptions) -> None:
        self._worker = options.worker()

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._worker, method)(*arguments)

    def run(self, tasks: PendingTasks) -> Generator[WorkProgress, None, None]:
        return self._worker.run(Tasks(tasks))

    def close(self) -> None:
        """Nothing is left: the threads end with `run`."""
