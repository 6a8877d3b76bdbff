"""Workers that torchrun or srun started: every rank runs the same command.

Rank 0 plans, holds the store's lock and finishes the store; the others wait for its word and then
encode. No process group, no port and no barrier: they meet in the store alone.

Shard s belongs to rank s % world. A rank encodes its own shards first, in order, and then what
nobody has committed yet, from the end; so the ranks finish together, and shards of a rank that was
lost are done by the others. That two ranks encode the same shard is possible and harmless.

Files, below the store's journal: `jobs/<job>.json`, rank 0's word; nothing else is shared.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Self

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

BEAT_EVERY_S = 10.0
SILENCE_S = 180.0
"""Of rank 0, after which the others give up."""
FIRST_WORD_S = 1800.0
"""How long the others wait for rank 0 to be there at all."""
_LOOK_EVERY_S = 5.0
"""How often the others' commit records are listed, at most."""
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
    """What rank 0 tells the others: that it is planning, that the store is ready to be filled, or
    why it will not be.

    ready: whether it is. generation: of the last plan. image_root: of now. beat: counts while it is
    planning, so that the others see that it is alive.
    """

    ready: bool = False
    generation: int = 0
    image_root: str = ""
    error: str = ""
    beat: int = 0


class Speaker:
    """Rank 0's voice. Use as a context manager around all that rank 0 does: it says every
    `BEAT_EVERY_S` that it is alive, until it is ready or has failed."""

    def __init__(self, root: StorePath, rank: Rank) -> None:
        self._root, self._rank = root, rank
        self._spoken = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="featcache-rank0", daemon=True)

    def ready(self, generation: int, image_root: str) -> None:
        """Raises OSError."""
        self._hush()
        tell(self._root, self._rank, Word(True, generation, image_root))

    def __enter__(self) -> Self:
        # In the place of what an earlier job of this name said.
        tell(self._root, self._rank, Word())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        was_spoken = self._spoken.is_set()
        self._hush()
        if error is not None and not was_spoken:
            # What went wrong is told here whether or not the others can be told.
            with contextlib.suppress(OSError):
                tell(self._root, self._rank, Word(error=str(error) or type(error).__name__))

    def _hush(self) -> None:
        self._spoken.set()
        self._thread.join()

    def _beat(self) -> None:
        beat = 0
        while not self._spoken.wait(BEAT_EVERY_S):
            beat += 1
            with contextlib.suppress(OSError):  # the next one, then
                tell(self._root, self._rank, Word(beat=beat))


def tell(root: StorePath, rank: Rank, word: Word) -> None:
    """Raises OSError."""
    publish_json(_path(root, rank), asdict(word))


def listen(root: StorePath, rank: Rank, on_wait: Callable[[], None]) -> Word:
    """Wait until rank 0 is ready; calls `on_wait` meanwhile.

    Raises StoreError where rank 0 failed, or is not heard of any more; OSError.
    """
    path = _path(root, rank)
    heard = -1
    since = time.monotonic()
    while True:
        word = None
        with contextlib.suppress(FileNotFoundError):
            word = Word(**read_json(path))
        if word is not None and word.error:
            raise StoreError(f"rank 0 stopped: {word.error}")
        if word is not None and word.ready:
            return word
        if word is not None and word.beat != heard:
            heard, since = word.beat, time.monotonic()
        patience_s = FIRST_WORD_S if word is None else SILENCE_S
        if time.monotonic() - since > patience_s:
            raise StoreError(
                f"{rank} has not heard of rank 0 for {patience_s / 60:.0f} minutes ({path}); see "
                "what became of it, and run the same command again"
            )
        on_wait()
        time.sleep(_ASK_EVERY_S)


def _path(root: StorePath, rank: Rank) -> StorePath:
    return root / layout.JOBS / f"{rank.job}.json"


class _Committed:
    """The shards that have a commit record, by a listing now and then on a thread of its own: of a
    hundred thousand in a bucket it takes seconds, in which the encoder should not wait.

    Use as a context manager.
    """

    def __init__(self, root: StorePath) -> None:
        self._root = root
        self.shards: frozenset[int] = frozenset()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="featcache-ranks", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()

    def _look(self) -> None:
        pause_s = 0.0
        while not self._closed.wait(pause_s):
            began = time.monotonic()
            with contextlib.suppress(OSError):  # the worker itself says what is wrong
                self.shards = recorded_shards(self._root)
            pause_s = max(_LOOK_EVERY_S, 20 * (time.monotonic() - began))


class RankExecutor(InlineExecutor):
    """The worker of one rank. Its `run` ends when all shards are committed, by whichever rank.

    speaker: of rank 0.
    """

    def __init__(self, options: WorkerOptions, rank: Rank, speaker: Speaker | None = None) -> None:
        """Raises as `Worker`."""
        self.rank, self.speaker = rank, speaker
        self.workers = rank.world
        super().__init__(of_rank(options, rank))

    def run(self, tasks: PendingTasks) -> Generator[WorkProgress, None, None]:
        root, shards = self._worker.options.out, tasks.shards
        others = dict(zip(shards, tasks.images, strict=True))
        total = sum(others.values())
        damaged = tasks.recorded  # their records were there before anyone began

        def left(committed: _Committed) -> Iterator[ShardTask]:
            for number in _order(shards, self.rank):
                shard = shards[number]
                if shard in damaged:
                    done = Commit.load(root, shard) is not None
                else:
                    # Nobody else takes a rank's own shards before it is done with all of its own.
                    is_own = shard % self.rank.world == self.rank.index
                    done = shard in committed.shards or (
                        not is_own and (root / layout.commit_path(shard)).exists()
                    )
                if not done:
                    yield tasks[number]

        def is_done(done: ShardDone) -> None:
            others.pop(done.shard, None)

        progress, seen, of_others = WorkProgress(), frozenset[int](), 0
        with _Committed(root) as committed:
            for progress in self._worker.run(Tasks(left(committed)), is_done):
                if committed.shards is not seen:
                    seen = committed.shards
                    of_others = sum(others.get(shard, 0) for shard in seen - damaged)
                done = min(progress.own + of_others, total)
                yield replace(progress, done=done)
        yield replace(progress, done=total)


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
        decode_threads=options.decode_threads or share,
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
