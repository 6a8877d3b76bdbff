"""Workers as Ray actors, on however many machines a Ray cluster has.

Ray Core, not Ray Data: shards are written by the actors themselves, and only tasks (some KB each)
and what became of them travel. Ray restarts an actor whose process or node is lost and hands it its
tasks again. The last shards are given to a second actor as well, so that a run does not wait for a
node that does not come back.

The store and the images must be visible under the same names on every node.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from featcache.device import num_cores
from featcache.encoders.load import absolute_name
from featcache.errors import ConfigError, FeatcacheError, StoreError
from featcache.executors.base import SHARDS_AHEAD, Executor, Tally
from featcache.executors.queued import QueuedTasks
from featcache.tasks import PendingTasks, ShardTask
from featcache.worker import ShardDone, Worker, WorkerOptions, WorkProgress

RESTARTS = 100
"""Of one actor, before it is given up."""
RETRIES = 5
"""Of one task, on an actor that was restarted under it."""
_LOOK_EVERY_S = 1.0
_LAST_WORDS_S = 30.0
"""How long a shard that another actor was quicker with may take to end."""
_REACHED_WITHIN_S = 10.0
_OBJECTS_BYTES = 100_000_000
"""Of a Ray of this machine's own: nothing large goes through its object store."""


class _Actor:
    """A `Worker` that several shards may be asked of at once."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._loaded: Worker | None = None
        self._tasks = QueuedTasks()
        self._under_way: dict[int, Future[ShardDone]] = {}
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def _worker(self) -> Worker:
        """Not loaded with the actor, so that what goes wrong is a task's error."""
        with self._loading:
            if self._loaded is None:
                self._loaded = self._options.worker()
            return self._loaded

    def load(self) -> None:
        """Ahead of the first task, which says what goes wrong."""
        with contextlib.suppress(Exception):
            _ = self._worker

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self._worker, method)(*arguments)

    def encode(self, task: ShardTask) -> ShardDone:
        """Returns when the shard is committed."""
        worker = self._worker
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, args=(worker,), daemon=True)
                self._thread.start()
            is_new = task.shard not in self._under_way
            done = self._under_way.setdefault(task.shard, Future())
        if is_new:
            self._tasks.put(task)
        return done.result()

    def _run(self, worker: Worker) -> None:
        try:
            for _ in worker.run(self._tasks, self._committed):
                pass
        except BaseException as error:
            with self._lock:
                self._error = error
                for done in self._under_way.values():
                    done.set_exception(error)
                self._under_way.clear()

    def _committed(self, done: ShardDone) -> None:
        with self._lock:
            future = self._under_way.pop(done.shard, None)
        if future is not None:
            future.set_result(done)


@dataclass(slots=True)
class _Remote:
    """An actor as its driver knows it. holds: {reference of a call: its task}."""

    number: int
    handle: Any
    holds: dict[Any, ShardTask] = field(default_factory=dict)


class RayExecutor(Executor):
    """Actors in the cluster that `RAY_ADDRESS` names, or that runs on this machine; where there is
    none, in a Ray of this machine's own, which ends with the run.

    Each asks for `decode_threads` CPUs (its share of the cluster's, at most a node's, where None),
    and for one GPU where the cluster has any and the device is not "cpu".
    """

    def __init__(self, options: WorkerOptions, workers: int | None) -> None:
        """workers: None takes as many as the cluster has GPUs, or one.

        Raises ConfigError where Ray is not installed or not reached, or lacks what is asked for.
        """
        self._ray = _connected()
        cluster = self._ray.cluster_resources()
        gpus = int(cluster.get("GPU", 0)) if options.device != "cpu" else 0
        cpus = int(cluster.get("CPU", 0))
        self.workers = workers or gpus or 1
        try:
            self._require(options.device, gpus, cpus)
        except ConfigError:
            self._ray.shutdown()
            raise
        threads = max(1, min(cpus // self.workers, self._node_cpus(gpus > 0)))
        threads = min(options.decode_threads or threads, threads)
        # An actor's working directory is that of its node's Ray.
        options = replace(
            options,
            out=options.out.absolute() if isinstance(options.out, Path) else options.out,
            model=absolute_name(options.model),
            device="cuda" if gpus else "cpu",
            decode_threads=threads,
            compute_threads=None if gpus else threads,
        )
        actor = self._ray.remote(
            num_cpus=threads,
            num_gpus=1 if gpus else 0,
            max_restarts=RESTARTS,
            max_task_retries=RETRIES,
            max_concurrency=SHARDS_AHEAD + 1,
        )(_Actor)
        self._actors = [_Remote(number, actor.remote(options)) for number in range(self.workers)]
        for each in self._actors:
            each.handle.load.remote()  # while the images are scanned
        self._tally = Tally()

    def call(self, method: str, *arguments: Any) -> Any:
        try:
            return self._get(self._actors[0].handle.call.remote(method, arguments))
        except self._ray.exceptions.RayTaskError:
            raise
        except self._ray.exceptions.RayError as error:
            raise _lost(error) from None

    def run(self, tasks: PendingTasks) -> Generator[WorkProgress, None, None]:
        again: deque[ShardTask] = deque()
        source = iter(tasks)
        unfinished: dict[int, ShardTask] = {}
        doubled: set[int] = set()
        while True:
            for actor in self._actors:
                while len(actor.holds) < SHARDS_AHEAD:
                    task = again.popleft() if again else next(source, None)
                    if task is None:
                        task = _late(actor, unfinished, doubled)
                    if task is None:
                        break
                    unfinished[task.shard] = task
                    actor.holds[actor.handle.encode.remote(task)] = task
            if not unfinished:
                break
            for actor, call in self._answered(_LOOK_EVERY_S):
                task = actor.holds.pop(call)
                try:
                    done = self._get(call)
                except self._ray.exceptions.RayTaskError:
                    raise
                except self._ray.exceptions.RayError as error:
                    again.extend(self._lose(actor, task, unfinished, error))
                    break  # its other calls are gone too
                if unfinished.pop(task.shard, None) is not None:
                    self._tally.commit(actor.number, done)
            yield self._tally.progress(len(self._actors))
        # Of shards that were given twice, the slower ones: they must not be stopped in the middle.
        self._answered(_LAST_WORDS_S, every=True)
        yield self._tally.progress(len(self._actors))

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor.handle)
        self._actors.clear()
        self._ray.shutdown()

    def _require(self, device: str, gpus: int, cpus: int) -> None:
        """Raises ConfigError for what the cluster will never have: Ray would wait for it."""
        if self.workers > gpus and (gpus or device.startswith("cuda")):
            raise ConfigError(
                f"--workers {self.workers} on {device}: the Ray cluster has {gpus} GPUs; start "
                "Ray on more nodes, take fewer workers, or --device cpu"
            )
        if self.workers > cpus:
            raise ConfigError(
                f"--workers {self.workers}: the Ray cluster has {cpus} CPUs; start Ray on more "
                "nodes, or take fewer workers"
            )

    def _node_cpus(self, on_gpus: bool) -> int:
        """Of the smallest node that an actor may be put on."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cpus = [int(node.get("CPU", 0)) for node in nodes if not on_gpus or node.get("GPU")]
        return min((count for count in cpus if count), default=1)

    def _answered(self, timeout_s: float, *, every: bool = False) -> list[tuple[_Remote, Any]]:
        """Calls that have ended, and whose they are. every: wait for all of them."""
        actor_of = {call: actor for actor in self._actors for call in actor.holds}
        if not actor_of:
            return []
        calls = list(actor_of)
        ready, rest = self._ray.wait(
            calls, num_returns=len(calls) if every else 1, timeout=timeout_s
        )
        if rest and not every:
            ready += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return [(actor_of[call], call) for call in ready]

    def _get(self, call: Any) -> Any:
        """What a call returned. Raises a user's error as itself."""
        try:
            return self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FeatcacheError):
                raise error.cause from None
            raise

    def _lose(
        self,
        actor: _Remote,
        task: ShardTask,
        unfinished: dict[int, ShardTask],
        error: Exception,
    ) -> list[ShardTask]:
        """Go on without an actor that Ray has given up; returns what it had still to do.

        Raises StoreError where it was the last one.
        """
        self._actors.remove(actor)
        self._tally.lose(actor.number)
        if not self._actors:
            raise _lost(error)
        return [left for left in (task, *actor.holds.values()) if left.shard in unfinished]


def _lost(error: Exception) -> StoreError:
    reason = " ".join(str(error).split())[:300]
    return StoreError(
        f"the last Ray actor is gone ({reason}); every committed shard is safe: run the same "
        "command again"
    )


def _late(actor: _Remote, unfinished: dict[int, ShardTask], doubled: set[int]) -> ShardTask | None:
    """A shard that another actor holds and that nobody else was given yet, for one without work."""
    if actor.holds:
        return None
    for shard, task in unfinished.items():
        if shard not in doubled:
            doubled.add(shard)
            return task
    return None


def _connected() -> ModuleType:
    """Ray, connected to its cluster. Raises ConfigError."""
    # Nothing is sent to anyone, and actors without GPU keep the environment that they have.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError("--executor ray needs Ray: pip install 'featcache[ray]'") from None
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _require_reachable(address)
        elif _noted_cluster_is_gone():
            raise ConnectionError
        ray.init(address=address or "auto", **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        if address or not isinstance(error, ConnectionError):
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"RAY_ADDRESS={address or 'auto'}: no Ray cluster is reached there ({reason}); "
                "start one with `ray start --head`, or unset RAY_ADDRESS; of one that asks for a "
                "token set RAY_AUTH_MODE=token"
            ) from None
        ray.init(
            address="local",
            num_cpus=num_cores(),
            include_dashboard=False,
            object_store_memory=_OBJECTS_BYTES,
            **quiet,
        )
    found: ModuleType = ray
    return found


def _noted_cluster_is_gone() -> bool:
    """Whether the cluster whose address `ray start` left on this machine has been killed since.
    With "auto" Ray would try to reach it for a quarter of an hour."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    try:
        _require_reachable(Path(folder, "ray", "ray_current_cluster").read_text().strip())
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _require_reachable(address: str) -> None:
    """Ray itself would try for a minute. Raises OSError."""
    host, _, port = address.rpartition(":")
    if "://" not in address and port.isdecimal():
        socket.create_connection((host, int(port)), _REACHED_WITHIN_S).close()
