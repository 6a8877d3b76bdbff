"""Workers that torchrun or srun started: every rank runs the same command.

Rank 0 plans, holds the store's lock and finishes the store; the others wait for its word and then
encode. No process group, no port and no barrier: they meet in the store alone.

Shard s belongs to rank s % world. A rank encodes its own shards first, in order, and then what
nobody has committed yet, from the end; so the ranks finish together, and shards of a rank that was
lost are done by the others. That two ranks encode the same shard is possible and harmless.

Files, below the store's journal: `jobs/<job>.json`, rank 0's word; nothing else is shared.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from featcache import layout
from featcache.device import num_cores
from featcache.encode import Tasks
from featcache.errors import StoreError
from featcache.executors.inline import InlineExecutor
from featcache.files import publish_json, read_json
from featcache.journal import Commit, recorded_shards
from featcache.object_path import StorePath
from featcache.tasks import PendingTasks, ShardTask
from featcache.worker import ShardDone, WorkerOptions, WorkProgress

_LOOK_EVERY_S = 5.0
"""How often the others' commit records are counted, for the progress."""
_ASK_EVERY_S = 0.5
"""How often rank 0's word is looked for."""


@dataclass(frozen=True, slots=True)
class Rank:
    """One of the processes that a launcher started.

    index: of `world`. local: on this machine, of `local_world`. job: a name that all ranks of this
    launch share, and no other launch.
    """

    index: int
    world: int
    local: int
    local_world: int
    job: str

    def __str__(self) -> str:
        return f"rank {self.index} of {self.world}"


def rank_from(environment: Mapping[str, str]) -> Rank | None:
    """By the variables of torchrun, or of srun; None for a process that was started alone."""
    env = environment
    if int(env.get("WORLD_SIZE", 1)) > 1 and "RANK" in env:
        local_world = int(env.get("LOCAL_WORLD_SIZE", 1))
        parts = [env.get(name, "") for name in _TORCHRUN_JOB]
        if local_world == int(env["WORLD_SIZE"]):
            # torchrun's own names repeat where none was given; its process on this machine does
            # not.
            parts.append(str(os.getppid()))
        return Rank(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", 0)),
            local_world,
            _name("torchrun", parts),
        )
    # Set by srun for its tasks only; SLURM_NTASKS is there in the batch script as well.
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in env:
        return Rank(
            int(env["SLURM_PROCID"]),
            int(env["SLURM_STEP_NUM_TASKS"]),
            int(env.get("SLURM_LOCALID", 0)),
            1,  # srun gives each task its cores
            _name("slurm", [env.get(name, "") for name in _SLURM_JOB]),
        )
    return None


_TORCHRUN_JOB = (
    "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT",
)  # fmt: skip
_SLURM_JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")


def _name(launcher: str, parts: list[str]) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join([launcher, *filter(None, parts)]))


@dataclass(frozen=True, slots=True)
class Word:
    """What rank 0 tells the others: that the store is ready to be filled, or why it will not be.

    generation: of the last plan. image_root: of now.
    """

    generation: int = 0
    image_root: str = ""
    error: str = ""


def tell(root: StorePath, rank: Rank, word: Word) -> None:
    """Raises OSError."""
    publish_json(_path(root, rank), asdict(word))


def forget(root: StorePath) -> None:
    """Remove what earlier jobs, or an earlier one of the same name, said."""
    for path in (root / layout.JOBS).glob("*"):
        path.unlink(missing_ok=True)


def listen(root: StorePath, rank: Rank, on_wait: Callable[[], None]) -> Word:
    """Wait for rank 0's word; calls `on_wait` while there is none. Raises StoreError where it is
    an error."""
    path = _path(root, rank)
    while True:
        try:
            word = Word(**read_json(path))
        except FileNotFoundError:
            on_wait()
            time.sleep(_ASK_EVERY_S)
            continue
        if word.error:
            raise StoreError(f"rank 0 stopped: {word.error}")
        return word


def _path(root: StorePath, rank: Rank) -> StorePath:
    return root / layout.JOBS / f"{rank.job}.json"


class RankExecutor(InlineExecutor):
    """The worker of one rank. Its `run` ends when all shards are committed, by whichever rank."""

    def __init__(self, options: WorkerOptions, rank: Rank) -> None:
        """Raises as `Worker`."""
        self.rank = rank
        self.workers = rank.world
        super().__init__(of_rank(options, rank))

    def run(self, tasks: PendingTasks) -> Iterator[WorkProgress]:  # type: ignore[override]
        root, shards, images = self._worker.options.out, tasks.shards, tasks.images
        others = dict(zip(shards, images, strict=True))
        looked, of_others = time.monotonic(), 0
        progress = WorkProgress()

        def left() -> Iterator[ShardTask]:
            for number in _order(shards, self.rank):
                if not _is_committed(root, shards[number]):
                    yield tasks[number]

        def committed(done: ShardDone) -> None:
            others.pop(done.shard, None)

        for progress in self._worker.run(Tasks(left()), committed):
            if time.monotonic() - looked >= _LOOK_EVERY_S:
                looked = time.monotonic()
                of_others = _sum_of(others, root)
            yield self._told(progress, of_others)
        yield self._told(progress, _sum_of(others, root))

    def _told(self, progress: WorkProgress, of_others: int) -> WorkProgress:
        return replace(progress, done=progress.done + of_others)


def of_rank(options: WorkerOptions, rank: Rank) -> WorkerOptions:
    """For a worker that shares its machine with the other ranks on it."""
    import torch

    device = options.device
    if device in ("auto", "cuda") and (gpus := torch.cuda.device_count()):
        device = f"cuda:{rank.local % gpus}"
    share = max(1, num_cores() // rank.local_world)
    return replace(
        options,
        device=device,
        decode_threads=min(options.decode_threads, share),
        compute_threads=share,
    )


def _order(shards: list[int], rank: Rank) -> list[int]:
    """Places in `shards`: the rank's own in order, then the others' from the end, beginning with
    the next rank's, so that not all help the same one."""
    of_rank: list[list[int]] = [[] for _ in range(rank.world)]
    for place, shard in enumerate(shards):
        of_rank[shard % rank.world].append(place)
    found = of_rank[rank.index]
    for step in range(1, rank.world):
        found += reversed(of_rank[(rank.index + step) % rank.world])
    return found


def _is_committed(root: StorePath, shard: int) -> bool:
    return Commit.load(root, shard) is not None


def _sum_of(images: Mapping[int, int], root: StorePath) -> int:
    """The images of those of these shards that have a commit record."""
    return sum(images.get(shard, 0) for shard in recorded_shards(root))
