"""How a step's samples are cut into forward passes and dealt to ranks."""

from __future__ import annotations

import numpy as np
import pytest

from align.data.batching import BatchLimits, divide

LENGTHS = np.random.default_rng(0).integers(20, 200, 64).tolist()


def cost(places: np.ndarray, lengths: list[int], limits: BatchLimits) -> int:
    own = [lengths[i] for i in places]
    return (
        limits.padded(sum(own)) if limits.packed else len(own) * limits.padded(max(own, default=0))
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "limits",
    [
        BatchLimits(64),
        BatchLimits(16),
        BatchLimits(7),
        BatchLimits(64, tokens=1000),
        BatchLimits(4, tokens=1000, length_multiple=64),
        BatchLimits(64, tokens=1000, packed=True),
        BatchLimits(1),
    ],
)
def test_every_sample_is_taken_once_within_the_limits(limits: BatchLimits, ranks: int) -> None:
    shares = divide(LENGTHS, limits, ranks)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    taken = np.concatenate([batch for share in shares for batch in share])
    assert sorted(taken) == list(range(64))
    for batch in (batch for share in shares for batch in share):
        assert (limits.samples > 1) <= len(batch) <= limits.samples  # 64 of one are not 66
        assert list(batch) == sorted(batch)
        assert limits.tokens is None or cost(batch, LENGTHS, limits) <= limits.tokens


def test_one_batch_keeps_the_order() -> None:
    [[batch]] = divide([3, 9, 1], BatchLimits(3))
    assert batch.tolist() == [0, 1, 2]


def test_samples_of_like_length_share_a_batch_and_ranks_take_such_at_a_time() -> None:
    lengths = [10, 400, 12, 380, 11, 390, 13, 410]
    first, second = divide(lengths, BatchLimits(2), ranks=2)
    assert [batch.tolist() for batch in first] == [[1, 7], [2, 6]]
    assert [batch.tolist() for batch in second] == [[3, 5], [0, 4]]


def test_a_budget_saves_padding() -> None:
    def padding(limits: BatchLimits) -> float:
        [batches] = divide(LENGTHS, limits)
        return sum(cost(batch, LENGTHS, limits) for batch in batches) / sum(LENGTHS) - 1

    one_pass = max(LENGTHS) * 64 / sum(LENGTHS) - 1
    assert padding(BatchLimits(64, tokens=1600)) < one_pass / 4
    assert padding(BatchLimits(64, tokens=1600, packed=True)) == 0


def test_a_sample_longer_than_the_budget_goes_alone() -> None:
    [batches] = divide([50, 2000, 60], BatchLimits(8, tokens=128))
    assert [batch.tolist() for batch in batches] == [[1], [0, 2]]


def test_fewer_samples_than_ranks() -> None:
    shares = divide([5, 6], BatchLimits(8), ranks=4)
    assert sorted(len(batch) for [batch] in shares) == [0, 0, 1, 1]
    assert divide([], BatchLimits(8), ranks=2) == [[], []]
