"""Which samples a step sees: a pure function of the step, so resuming costs nothing.

n samples of the training split, G = batch_size * grad_accum * world samples per step
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class StepSampler:
    """A global shuffle per epoch, cut into steps.

    The epochs' permutations are laid end to end and step s takes positions [s * G, (s + 1) * G).
    No sample is dropped at an epoch's end, every step is full, and the order depends on
    (seed, epoch) alone: neither on the batch's division into ranks nor on where a run was resumed.

    num_samples: n.
    batch_size: samples of one rank's forward pass.
    grad_accum: forward passes per step.
    rank, world: this process among those that share a step.
    """

    num_samples: int
    batch_size: int
    grad_accum: int
    seed: int
    rank: int = 0
    world: int = 1
    _epochs: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)

    @property
    def step_size(self) -> int:
        """G, samples per step over all ranks."""
        return self.batch_size * self.grad_accum * self.world

    def steps_in(self, epochs: float) -> int:
        """Steps that see every sample `epochs` times, the last one rounded up to be full."""
        return max(1, -(-round(self.num_samples * epochs) // self.step_size))

    def step(self, step: int) -> NDArray[np.int64]:
        """int64[G], indices of the samples of step `step` (0-based), over all ranks."""
        position = np.arange(step * self.step_size, (step + 1) * self.step_size)
        epochs, offsets = np.divmod(position, self.num_samples)
        out = np.empty(self.step_size, np.int64)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            out[of_epoch] = self._order(int(epoch))[offsets[of_epoch]]
        return out

    def micro_batches(self, step: int) -> list[NDArray[np.int64]]:
        """grad_accum x int64[batch_size], this rank's share of step `step`."""
        of_step = self.step(step).reshape(self.grad_accum, self.world, self.batch_size)
        return list(of_step[:, self.rank])

    def batches(self, first_step: int, total_steps: int) -> Iterator[NDArray[np.int64]]:
        """All micro-batches of this rank from `first_step` on."""
        for step in range(first_step, total_steps):
            yield from self.micro_batches(step)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            # A step may lie across two epochs; older ones are not needed again.
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            rng = np.random.default_rng([self.seed, epoch])
            self._epochs[epoch] = rng.permutation(self.num_samples)
        return self._epochs[epoch]


def in_order(num_samples: int, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """int64[<= batch_size] batches of 0, 1, ..., num_samples - 1: evaluation never shuffles."""
    for start in range(0, num_samples, batch_size):
        yield np.arange(start, min(start + batch_size, num_samples))
