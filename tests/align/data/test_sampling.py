"""The order of samples: shuffled globally or in windows, the same from any starting point."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from align.data.dataset import Sample, shards_of
from align.data.sampling import StepSampler, Windows, epoch_order, in_order
from featcache.manifests import Record


@pytest.mark.parametrize(("n", "size"), [(10, 3), (10, 4), (7, 7), (3, 8)])
def test_each_epoch_sees_every_sample_once(n: int, size: int) -> None:
    sampler = StepSampler(n, size, seed=1)
    steps = 5 * n
    order = np.concatenate(list(sampler.steps(0, steps)))
    assert len(order) == steps * size
    for epoch in range(len(order) // n):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_and_seeds_differ() -> None:
    first, second = StepSampler(50, 50, 0).step(0), StepSampler(50, 50, 0).step(1)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, StepSampler(50, 50, 1).step(0))


def test_any_step_is_the_same_however_it_is_reached() -> None:
    walked = list(StepSampler(10, 6, seed=3).steps(0, 40))
    resumed = list(StepSampler(10, 6, seed=3).steps(17, 40))
    assert all(np.array_equal(a, b) for a, b in zip(walked[17:], resumed, strict=True))


@pytest.mark.parametrize(
    ("n", "size", "epochs", "steps"),
    [(558_128, 256, 1, 2181), (4900, 16, 3, 919), (10, 3, 0.5, 2), (1, 512, 1, 1)],
)
def test_steps_in_epochs(n: int, size: int, epochs: float, steps: int) -> None:
    assert StepSampler(n, size, 0).steps_in(epochs) == steps


def test_in_order_covers_all_with_a_short_last_batch() -> None:
    assert [b.tolist() for b in in_order(5, 2)] == [[0, 1], [2, 3], [4]]
    assert list(in_order(0, 2)) == []


def windowed(n: int, shard: int, size: int, seed: int = 0, **changes: Any) -> StepSampler:
    """Samples in the order of the store, all shards but the last full."""
    windows = Windows((np.arange(n) // shard).astype(np.int32), size)
    return StepSampler(n, **{"step_size": 4, "seed": seed, "windows": windows, **changes})


SIZES = [(100, 8, 3), (96, 8, 4), (7, 2, 1), (10, 3, 99), (1, 1, 1)]


def test_the_global_order_is_that_of_earlier_versions() -> None:
    """Recorded results depend on it, to the last index."""
    for n, seed, epoch in [(1, 0, 0), (1000, 0, 0), (4321, 7, 3)]:
        before = np.random.default_rng([seed, epoch]).permutation(n)
        np.testing.assert_array_equal(epoch_order(n, seed, epoch), before)
    first = StepSampler(10, 5, seed=3).step(0)
    assert (first.tolist(), first.dtype) == ([9, 6, 0, 2, 1], np.dtype(np.int64))


@pytest.mark.parametrize(("n", "shard", "size"), SIZES)
def test_windows_see_every_sample_once_an_epoch(n: int, shard: int, size: int) -> None:
    order = np.concatenate(list(windowed(n, shard, size).steps(0, n)))
    for epoch in range(4):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


@pytest.mark.parametrize(("n", "shard", "size"), SIZES)
def test_windows_are_the_same_however_a_step_is_reached(n: int, shard: int, size: int) -> None:
    walked = list(windowed(n, shard, size).steps(0, n))
    for start in {0, n // 3, n - 1}:
        resumed = list(windowed(n, shard, size).steps(start, n))
        np.testing.assert_array_equal(walked[start:], resumed)


def windows_of(sampler: StepSampler, epoch: int, shard: int, size: int) -> list[frozenset[int]]:
    """The shards of each window, in order; the samples must be a whole number of windows."""
    order = epoch_order(sampler.num_samples, sampler.seed, epoch, sampler.windows)
    return [frozenset(window) for window in (order // shard).reshape(-1, shard * size).tolist()]


def test_samples_of_a_window_come_together() -> None:
    """20 shards in windows of 4: every shard in one window, every window of 4."""
    seen = windows_of(windowed(160, 8, 4), 0, shard=8, size=4)
    assert [len(window) for window in seen] == [4] * 5
    assert frozenset.union(*seen) == set(range(20))


def test_windows_and_their_inside_are_shuffled_anew_every_epoch_and_seed() -> None:
    seen = [windows_of(windowed(160, 8, 4), epoch, shard=8, size=4) for epoch in range(5)]
    seen.append(windows_of(windowed(160, 8, 4, seed=1), 0, shard=8, size=4))
    assert len({frozenset(windows) for windows in seen}) == 6  # which shards share one
    assert all(any(max(w) - min(w) > 4 for w in windows) for windows in seen)  # not neighbours
    one = epoch_order(160, 0, 0, windowed(160, 8, 4).windows)[:32]
    assert len(set((one // 8)[:8].tolist())) > 2  # rows of its shards are mixed
    assert not np.array_equal(one, np.sort(one))


def test_a_window_of_all_shards_is_the_global_shuffle() -> None:
    for size in (13, 14, 1000):
        order = epoch_order(100, 5, 2, windowed(100, 8, size).windows)
        np.testing.assert_array_equal(order, epoch_order(100, 5, 2))


@pytest.mark.parametrize("num_shards", [255, 257, 70_000])
def test_any_number_of_windows(num_shards: int) -> None:
    """Windows are numbered in as few bits as hold them."""
    shards = np.repeat(np.arange(num_shards, dtype=np.int32), 2)
    order = epoch_order(len(shards), 0, 0, Windows(shards, 1))
    pairs = shards[order].reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all()


def sample(*rows: int) -> Sample:
    return Sample(Record("id", (), (), None, "origin"), np.array(rows, np.int64).reshape(-1, 1))


def test_shards_of_samples() -> None:
    """Of the first image; shards in use are counted; samples without images are dealt out."""
    samples = [sample(9, 0), sample(), sample(41), sample(8), sample(), sample(17), sample()]
    assert shards_of(samples, 8).tolist() == [0, 0, 2, 0, 1, 1, 2]
    assert shards_of([sample(), sample()], 8).tolist() == [0, 0]
    assert shards_of([], 8).tolist() == []


def test_samples_without_images_come_in_every_window() -> None:
    rows = [sample(i) for i in range(80)] + [sample() for _ in range(20)]
    windows = Windows(shards_of(rows, 8), 2)
    order = epoch_order(100, 0, 0, windows).reshape(5, 20)
    assert ((order >= 80).sum(axis=1) == 4).all()
