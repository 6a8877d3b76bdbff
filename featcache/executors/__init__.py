"""Who encodes the shards of an extraction: this process, several, the ranks of a job, Ray actors.

All of them run featcache/worker.py. What differs is where, how shards are handed out, and what
happens when a worker is lost:

| executor | workers | shards | a lost worker |
|---|---|---|---|
| `local`, 1 worker | this process | in order | the command is run again |
| `local`, N workers | processes of this machine | handed out as they are done | is replaced |
| ranks of torchrun or srun | one a rank | split beforehand, then what others have not done | its \
shards are done by the others |
| `ray` | actors anywhere in a Ray cluster | handed out as they are done | Ray restarts it |

Whoever encodes a shard writes the same bytes, so a shard that two of them encode does no harm.
"""

from __future__ import annotations

import torch

from featcache.errors import ConfigError
from featcache.executors.base import Executor
from featcache.executors.inline import InlineExecutor
from featcache.worker import WorkerOptions

__all__ = ["EXECUTORS", "Executor", "InlineExecutor", "open_executor"]

EXECUTORS = ("local", "ray")


def open_executor(name: str, workers: int | None, options: WorkerOptions) -> Executor:
    """name: one of `EXECUTORS`. workers: None takes as many as there are GPUs, at least one.

    Raises ConfigError for an unknown name, EncoderError where the encoder cannot be loaded.
    """
    if name not in EXECUTORS:
        raise ConfigError(f"unknown executor {name!r}; known are {', '.join(EXECUTORS)}")
    if name == "ray":
        from featcache.executors.ray_actors import RayExecutor

        return RayExecutor(options, workers)
    if workers is None:
        on_gpus = options.device in ("auto", "cuda")
        workers = max(1, torch.cuda.device_count()) if on_gpus else 1
    if workers == 1:
        return InlineExecutor(options)
    from featcache.executors.processes import ProcessExecutor

    return ProcessExecutor(options, workers)
