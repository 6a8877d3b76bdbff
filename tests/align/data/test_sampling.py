"""The order of samples: a global shuffle, the same from any starting point."""

from __future__ import annotations

import numpy as np
import pytest

from align.data.sampling import StepSampler, in_order


@pytest.mark.parametrize(("n", "batch", "accum"), [(10, 3, 1), (10, 2, 2), (7, 7, 1), (3, 4, 2)])
def test_each_epoch_sees_every_sample_once(n: int, batch: int, accum: int) -> None:
    sampler = StepSampler(n, batch, accum, seed=1)
    steps = 5 * n
    order = np.concatenate(list(sampler.batches(0, steps)))
    assert len(order) == steps * batch * accum
    for epoch in range(len(order) // n):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_and_seeds_differ() -> None:
    first, second = StepSampler(50, 50, 1, 0).step(0), StepSampler(50, 50, 1, 0).step(1)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, StepSampler(50, 50, 1, 1).step(0))


def test_any_step_is_the_same_however_it_is_reached() -> None:
    walked = list(StepSampler(10, 3, 2, seed=3).batches(0, 40))
    resumed = list(StepSampler(10, 3, 2, seed=3).batches(17, 40))
    assert all(np.array_equal(a, b) for a, b in zip(walked[34:], resumed, strict=True))


def test_division_into_batches_and_ranks_keeps_the_steps_samples() -> None:
    whole = StepSampler(100, 8, 1, seed=0).step(5)
    assert sorted(np.concatenate(StepSampler(100, 2, 4, seed=0).micro_batches(5))) == sorted(whole)
    ranks = [StepSampler(100, 2, 2, seed=0, rank=r, world=2).micro_batches(5) for r in range(2)]
    assert sorted(np.concatenate([b for rank in ranks for b in rank])) == sorted(whole)


@pytest.mark.parametrize(
    ("n", "size", "epochs", "steps"),
    [(558_128, 256, 1, 2181), (4900, 16, 3, 919), (10, 3, 0.5, 2), (1, 512, 1, 1)],
)
def test_steps_in_epochs(n: int, size: int, epochs: float, steps: int) -> None:
    assert StepSampler(n, size, 1, 0).steps_in(epochs) == steps


def test_in_order_covers_all_with_a_short_last_batch() -> None:
    assert [b.tolist() for b in in_order(5, 2)] == [[0, 1], [2, 3], [4]]
    assert list(in_order(0, 2)) == []
