"""One training on several processes: each takes a share of every step's samples.

    one GPU      align train --features STORE ...
    eight        torchrun --nproc-per-node 8 -m cli.align train --features STORE ...
    more         torchrun --nnodes N ... on each machine, or srun (MASTER_ADDR and MASTER_PORT set)

The connector is the same in all ranks and small, so data parallelism is a sum of its gradients
over all ranks at a step's end. It has no overlap with the backward pass to lose: gradients of the
connector are the last thing that one computes. What DDP would add, hooks and buckets and equal
numbers of forward passes, is not needed (docs/decisions.md).

A language model that does not fit one device is sharded over all ranks by FSDP2, layer by layer
(`shard_layers`): each layer is gathered when it is used. Then ranks run in step, so one without
samples runs an empty pass (`AlignModel.idle`).

Each rank's counts go through gloo on the CPU, every step: that is how all learn of a signal at the
same step, and at once of a rank that died, while no device is waited for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from align.errors import RankError
from align.layers import decoder_layers
from featcache.errors import ConfigError
from featcache.executors.ranks import Rank, rank_from

T = TypeVar("T")

_LOST = re.compile(r"gloo|NCCL|closed by peer|reset by peer|[Bb]roken pipe")
"""In messages of collectives that lost another process."""

TIMEOUT = timedelta(minutes=30)
"""For another rank to arrive; rank 0 may write a checkpoint to a slow disk meanwhile."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of one training. index: this one's place among `count`.

    Of one process all methods return at once. Where another rank has ended they raise what torch
    does, which `joined_ranks` turns into a RankError.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one writes the run's folder and tells the user."""
        return self.index == 0

    def sum_counts(self, *counts: int) -> list[int]:
        """Each count summed over all ranks, through the CPU."""
        if self.count == 1:
            return list(counts)
        total = torch.tensor(counts)
        self._all_reduce([total])
        return [int(each) for each in total]

    def sum_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Sums each over all ranks, in place."""
        if self.count > 1:
            self._all_reduce(tensors)

    def copy_from_main(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites each with what rank 0 has."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather(self, value: T) -> list[T]:
        """What each rank has, in their order; anything that can be pickled."""
        if self.count == 1:
            return [value]
        values: list[T | None] = [None] * self.count
        dist.all_gather_object(values, value)
        return cast(list[T], values)

    def wait(self) -> None:
        """Until all ranks are here."""
        self.sum_counts(0)

    def _all_reduce(self, tensors: Sequence[Tensor]) -> None:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


ALONE = Ranks()


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun or srun started, joined while inside; `ALONE` without a launcher.

    Inside a process group of the caller's own, that one is used and left as it is.

    device: what the run computes on; each rank of a machine takes the GPU of its own number, or the
    only one that it sees.

    Raises ConfigError where there are more ranks on a machine than GPUs, where all would take the
    same one, or where the launcher did not say where rank 0 is; from inside, RankError in place of
    what torch raises when another rank has ended.
    """
    if dist.is_initialized():
        with _lost_ranks_told():
            yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    rank = rank_from(os.environ)
    if rank is None:
        yield ALONE
        return
    gpu = _gpu_of(rank, device) if device.type == "cuda" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(
                f"{rank}: {name} is not set, so the ranks cannot find one another; export the "
                "first machine's address and a free port, or start with torchrun"
            )
    try:
        dist.init_process_group(
            "gloo" if gpu is None else "cpu:gloo,cuda:nccl",
            rank=rank.index,
            world_size=rank.world,
            timeout=TIMEOUT,
            device_id=gpu,
        )
    except dist.DistError as error:
        raise RankError(
            f"{rank}: the other ranks were not found at MASTER_ADDR={os.environ['MASTER_ADDR']}, "
            f"MASTER_PORT={os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}"
        ) from error
    try:
        with _lost_ranks_told():
            yield Ranks(rank.index, rank.world)
    finally:
        dist.destroy_process_group()


def _gpu_of(rank: Rank, device: torch.device) -> torch.device:
    """Raises ConfigError as `joined_ranks` says."""
    if device.index is not None:
        raise ConfigError(
            f"train.device={device}: all ranks of a machine would take it; set train.device=cuda"
        )
    visible = torch.cuda.device_count()
    if rank.local >= visible > 1:
        raise ConfigError(
            f"{rank}: this machine has {visible} GPUs for {rank.local_world} ranks; start one for "
            "each GPU"
        )
    # srun --gpus-per-task=1 shows each rank a GPU of its own.
    return torch.device("cuda", rank.local if visible > 1 else 0)


def shard_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Divides the parameters of a model's decoder layers among all ranks with FSDP2; each layer is
    gathered when it is used, forward and backward, and the next one meanwhile.

    model: frozen, wherever its weights are. device: where the shards go, and what is not sharded:
    embedding, last norm and output layer.

    Raises ModelError for a model whose layers are not known.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = decoder_layers(model, "train.shard_llm=true")
    backbone = model.base_model
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    inside = {id(parameter) for parameter in layers.parameters()}
    outside = {each for each in model.parameters() if id(each) not in inside}
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    # The root, whose forward pass starts what is gathered ahead. The embedding is looked up before
    # it, and may be the output layer as well, so neither is its to gather.
    fully_shard(backbone, mesh=mesh, ignored_params=outside)
    for parameter in outside:
        parameter.data = parameter.data.to(device)
    for buffers in (module._buffers for module in model.modules()):
        for name, buffer in buffers.items():
            buffers[name] = None if buffer is None else buffer.to(device)


@contextmanager
def _lost_ranks_told() -> Iterator[None]:
    """What a collective raises when another process is gone, wherever it was begun, as one line."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not isinstance(error, dist.DistError) and not _LOST.search(text):
            raise
        # gloo begins with a place in its sources, and ends with advice.
        why = text.rpartition("] ")[2] or text
        raise RankError(
            "another rank of this training has ended; its own message says why "
            f"({why.split('. ')[0][:120]})"
        ) from error
