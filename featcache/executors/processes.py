"""Several workers on this machine, each in a process of its own.

Shards are handed out as they are done. A worker that dies is replaced and its shards are encoded by
others; where the workers die without getting anything done, that is an error.

A process rather than a thread a worker, because a crash in one (a damaged image in a C library, the
kernel's out-of-memory killer) must not take the others with it, and a GPU wants a Python of its
own.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from featcache.device import num_cores
from featcache.errors import FeatcacheError, StoreError
from featcache.executors.base import SHARDS_AHEAD, Executor, Tally
from featcache.executors.queued import QueuedTasks
from featcache.tasks import PendingTasks, ShardTask
from featcache.worker import ShardDone, WorkerOptions, WorkProgress

DEATHS_WITHOUT_A_SHARD = 5
"""More workers than that, and than there are, may not die without a shard being committed."""
DEATHS_WITH_ONE_SHARD = 5
"""So many workers may die while they are at the same shard."""
_GONE = (EOFError, OSError, pickle.UnpicklingError)
"""What a connection raises whose other end died, perhaps in the middle of a message."""
_REPORT_EVERY_S = 0.2
_LOOK_EVERY_S = 1.0


# ------------------------------------------------------------------------------ the worker's side


def serve(connection: Connection, options: WorkerOptions) -> None:
    """A worker process: does what comes through `connection` until that closes.

    In come ("call", method, arguments), ("run",), and for a run ("task", ShardTask or None); out go
    ("result", value), ("error", exception), ("progress", WorkProgress), ("done", ShardDone) and
    ("ended", None).
    """
    # Ctrl-C reaches every process of a terminal; what becomes of this one is its parent's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tasks = QueuedTasks()
    orders: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    sending = threading.Lock()

    def send(kind: str, value: Any) -> None:
        with sending:
            connection.send((kind, value))

    def listen() -> None:
        while True:
            try:
                order = connection.recv()
            except (EOFError, OSError):
                # The parent is gone or wants no more. What is not committed does not exist, so
                # there is nothing to clean up.
                os._exit(1)
            if order[0] == "task":
                tasks.put(order[1])
            else:
                orders.put(order)

    threading.Thread(target=listen, name="featcache-listen", daemon=True).start()
    try:
        worker = options.worker()
        while True:
            order = orders.get()
            if order[0] == "call":
                send("result", getattr(worker, order[1])(*order[2]))
                continue
            said = 0.0
            tasks.begin()
            for progress in worker.run(tasks, lambda done: send("done", done)):
                now = time.monotonic()
                if now - said >= _REPORT_EVERY_S:
                    said = now
                    send("progress", progress)
            send("progress", progress)
            send("ended", None)
    except FeatcacheError as error:
        send("error", error)
    except BaseException:
        send("error", RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))


# ------------------------------------------------------------------------------ the parent's side


@dataclass(slots=True)
class _Process:
    """tasks: that it holds, {shard: task}."""

    number: int
    process: BaseProcess
    connection: Connection
    tasks: dict[int, ShardTask] = field(default_factory=dict)
    ended: bool = False

    def send(self, *order: Any) -> bool:
        """False where it is gone."""
        try:
            self.connection.send(order)
        except _GONE:
            return False
        return True


class ProcessExecutor(Executor):
    """Workers in processes. On CUDA each has a GPU, in turn; on the CPU each its share of the
    cores."""

    def __init__(self, options: WorkerOptions, workers: int) -> None:
        self._options = options
        self._context = multiprocessing.get_context("spawn")  # CUDA and threads outlive no fork
        self.workers = workers
        self._processes: list[_Process] = []
        self._tally = Tally()
        self._deaths = 0  # since the last shard was committed
        self._deaths_at: dict[int, int] = {}
        try:
            for number in range(workers):
                self._processes.append(self._start(number))
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        process = self._processes[0]
        while True:
            process.send("call", method, arguments)
            try:
                kind, value = process.connection.recv()
            except _GONE:
                process = self._replace(process)
                continue
            if kind == "error":
                raise value
            return value

    def run(self, tasks: PendingTasks) -> Generator[WorkProgress, None, None]:
        waiting: deque[ShardTask] = deque()
        source = iter(tasks)
        exhausted = False
        for process in self._processes:
            process.send("run")
        while True:
            for process in self._processes:
                while len(process.tasks) < SHARDS_AHEAD and not (exhausted and not waiting):
                    task = waiting.popleft() if waiting else next(source, None)
                    if task is None:
                        exhausted = True
                        break
                    process.tasks[task.shard] = task
                    process.send("task", task)
            if exhausted and not waiting and not any(p.tasks for p in self._processes):
                break
            for process in self._heard_from():
                if not self._hear(process):
                    waiting.extendleft(reversed(process.tasks.values()))
                    self._replace(process).send("run")
            yield self._tally.progress(self.workers)
        # Their last word, with their peaks of memory.
        for process in self._processes:
            process.send("task", None)
        while not all(process.ended for process in self._processes):
            for process in self._heard_from():
                process.ended = not self._hear(process) or process.ended
        yield self._tally.progress(self.workers)

    def close(self) -> None:
        for process in self._processes:
            process.connection.close()  # it then ends by itself
        for process in self._processes:
            process.process.join(5)
            if process.process.is_alive():
                process.process.kill()
                process.process.join()
            process.process.close()
        self._processes.clear()

    def _start(self, number: int) -> _Process:
        device = self._options.device
        if device in ("auto", "cuda") and (gpus := torch.cuda.device_count()):
            device = f"cuda:{number % gpus}"
        share = max(1, num_cores() // self.workers)
        options = replace(
            self._options,
            device=device,
            decode_threads=self._options.decode_threads or share,
            compute_threads=share,
        )
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=serve, args=(theirs, options), name=f"featcache-worker-{number}"
        )
        process.start()
        theirs.close()  # so that its end shows here
        return _Process(number, process, ours)

    def _blame(self, process: _Process, code: int | None) -> None:
        """Raises StoreError where one shard has cost too many workers: something in it crashes
        them."""
        task = next(iter(process.tasks.values()), None)  # the one that it was at
        if task is None:
            return
        deaths = self._deaths_at[task.shard] = self._deaths_at.get(task.shard, 0) + 1
        if deaths >= DEATHS_WITH_ONE_SHARD:
            raise StoreError(
                f"{deaths} workers died at shard {task.shard}, the last of {_cause(code)}; one of "
                f"its {len(task.images)} images, the first of them {task.images[0].refs[0]}, may "
                "crash the decoder: leave it out of the data; every committed shard is safe"
            )

    def _heard_from(self) -> list[_Process]:
        ready = wait([process.connection for process in self._processes], _LOOK_EVERY_S)
        return [process for process in self._processes if process.connection in ready]

    def _hear(self, process: _Process) -> bool:
        """Take what it has sent. False where it is gone. Raises what it raised."""
        try:
            while process.connection.poll():
                kind, value = process.connection.recv()
                if kind == "error":
                    raise value
                if kind == "progress":
                    self._tally.report(process.number, value)
                elif kind == "done":
                    self._commit(process, value)
                elif kind == "ended":
                    process.ended = True
        except _GONE:
            return False
        return True

    def _commit(self, process: _Process, done: ShardDone) -> None:
        process.tasks.pop(done.shard, None)
        self._tally.commit(process.number, done)
        self._deaths = 0

    def _replace(self, process: _Process) -> _Process:
        """Another one for one that died. Raises StoreError where that happens again and again."""
        process.process.kill()
        process.process.join()
        code = process.process.exitcode
        self._tally.lose(process.number)
        self._deaths += 1
        self._blame(process, code)
        if self._deaths > max(DEATHS_WITHOUT_A_SHARD, self.workers):
            raise StoreError(
                f"{self._deaths} workers in a row died without finishing a shard, the last of "
                f"{_cause(code)}; every committed shard is safe: take fewer --workers or a smaller "
                "--batch-size, and run the same command again"
            )
        process.connection.close()
        process.process.close()
        fresh = self._start(process.number)
        self._processes[process.number] = fresh
        return fresh


def _cause(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        memory = " (the kernel does so where memory runs out)" if name == "SIGKILL" else ""
        return f"{name}{memory}"
    return f"exit code {exit_code}"
