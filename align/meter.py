"""What a training does in its time: work, waiting, rates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from typing import TypeVar

import torch

from align.data.collate import Batch
from align.distributed import Ranks
from align.flop import peak_flops
from align.run import Run
from align.tracking import StepEvent

T = TypeVar("T")


@dataclass(slots=True)
class Work:
    """What a step has done. supervised, tokens, samples: of its batches, tokens with padding.

    flop: operations that they needed, 0 where not known.
    stops: ranks that were asked to stop meanwhile.
    """

    supervised: int = 0
    samples: int = 0
    tokens: int = 0
    flop: int = 0
    stops: int = 0

    def add(self, batch: Batch, flop: int | None) -> None:
        self.supervised += batch.num_supervised
        self.samples += len(batch.ids)
        self.tokens += batch.input_ids.numel()
        self.flop += flop or 0

    def sum(self, ranks: Ranks) -> Work:
        """Of all ranks."""
        return Work(*ranks.sum_counts(*astuple(self)))


@dataclass(slots=True)
class Meter:
    """Time, waiting and work between two log lines, without what is `paused`. Seconds."""

    since: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    excluded: float = 0.0
    samples: int = 0
    tokens: int = 0
    flop: int = 0

    def wait_for(self, batches: Iterator[T]) -> T:
        started = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - started
        return batch

    def count(self, work: Work) -> None:
        """A step's, of all ranks."""
        self.samples += work.samples
        self.tokens += work.tokens
        self.flop += work.flop

    def paused(self) -> _Pause:
        return _Pause(self)

    def line(
        self, run: Run, total_steps: int, loss: float, grad_norm: float, lr: float
    ) -> StepEvent:
        """The log line of the steps since the last; call it after asking the device for the loss,
        so that the device's work is within the time.
        """
        seconds = time.perf_counter() - self.since - self.excluded
        device = run.model.device
        cuda = device.type == "cuda"
        flop_per_s = self.flop / seconds / run.ranks.count or None
        peak = peak_flops(device)
        event = StepEvent(
            step=run.step,
            total_steps=total_steps,
            epoch=run.step * run.step_size / len(run.splits.train),
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            samples_per_s=self.samples / seconds,
            tokens_per_s=self.tokens / seconds,
            data_wait_ratio=self.waited / seconds,
            memory_bytes=torch.cuda.max_memory_allocated(device) if cuda else 0,
            flop_per_s=flop_per_s,
            mfu=flop_per_s / peak if flop_per_s and peak else None,
        )
        self.since, self.waited, self.excluded = time.perf_counter(), 0.0, 0.0
        self.samples = self.tokens = self.flop = 0
        return event


class _Pause:
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._meter.excluded += time.perf_counter() - self._started
