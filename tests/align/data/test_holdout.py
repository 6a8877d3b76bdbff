"""Which records are held out, in all and of each length."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from align.data.holdout import hold_out, num_held_out, shares
from featcache.manifests import Record, Turn


def captioned(lengths: list[int], prefix: str = "r") -> list[Record]:
    return [
        Record(
            f"{prefix}{i}",
            (f"{prefix}{i}.png",),
            (Turn("human", ""), Turn("gpt", " ".join(["word"] * length))),
            None,
            f"f:{i}",
        )
        for i, length in enumerate(lengths)
    ]


def many(count: int = 3_000) -> list[Record]:
    """Captions of 0 to 70 words, most of them short."""
    rng = np.random.default_rng(0)
    return captioned(np.minimum(70, rng.exponential(9, count).astype(int)).tolist())


def ids_held_out(records: list[Record], seed: int = 0) -> set[str]:
    mask = hold_out(records, 0.1, seed, "length")
    return {record.id for record, out in zip(records, mask, strict=True) if out}


def bucket(record: Record) -> int:
    """Written apart from the code: powers of two by comparison."""
    words = len(record.turns[1].text.split())
    return sum(words >= edge for edge in (1, 2, 4, 8, 16, 32, 64))


@pytest.mark.parametrize("ratio", [0.02, 0.1, 1 / 3, 0.77])
def test_each_length_has_its_share_and_the_total_is_exact(ratio: float) -> None:
    records = many()
    mask = hold_out(records, ratio, 0, "length")
    total = num_held_out(len(records), ratio)
    assert mask.sum() == total
    sizes = Counter(map(bucket, records))
    held = Counter(bucket(r) for r, out in zip(records, mask, strict=True) if out)
    assert len(sizes) == 8
    for each, size in sizes.items():
        assert abs(held[each] - size * total / len(records)) < 1


def test_the_flagships_total() -> None:
    sizes = {1: 5, 2: 1_003, 3: 98_761, 4: 377_359, 5: 81_000}
    assert sum(sizes.values()) == 558_128
    held = shares(sizes, num_held_out(558_128, 0.02))
    assert sum(held.values()) == 11_163
    assert held == {1: 0, 2: 20, 3: 1_975, 4: 7_548, 5: 1_620}


@pytest.mark.parametrize(
    ("sizes", "total", "expected"),
    [
        ({0: 1, 1: 1, 2: 1}, 2, {0: 1, 1: 1, 2: 0}),  # equal remainders: the lower part
        ({0: 3}, 3, {0: 3}),
        ({0: 10, 1: 0}, 5, {0: 5, 1: 0}),
        ({}, 0, {}),
    ],
)
def test_shares(sizes: dict[int, int], total: int, expected: dict[int, int]) -> None:
    assert shares(sizes, total) == expected


def test_order_does_not_matter_and_the_seed_does() -> None:
    records = many()
    shuffled = [records[i] for i in np.random.default_rng(1).permutation(len(records))]
    assert ids_held_out(shuffled) == ids_held_out(records)
    assert ids_held_out(records, seed=1) != ids_held_out(records)


def test_dropping_a_record_moves_at_most_one_of_each_length() -> None:
    records = many()
    fewer = records[:700] + records[701:]
    moved = ids_held_out(records) ^ ids_held_out(fewer)
    assert max(Counter(bucket(r) for r in fewer if r.id in moved).values(), default=0) <= 1


def test_captions_of_one_image_share_a_side_whatever_their_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 1000).tolist()
    records = [
        Record(r.id, (f"{i // 5}.png",), r.turns, None, "")
        for i, r in enumerate(captioned(lengths))
    ]
    mask = hold_out(records, 0.1, 0, "length").reshape(200, 5)
    divided = (mask.any(1) & ~mask.all(1)).sum()
    assert divided <= 6  # one image at the border of each bucket
    assert mask.sum() == 100


def test_without_strata_nothing_has_changed() -> None:
    """Runs of earlier versions must find the same records held out: ids as they came out then."""
    held = [i for i, out in enumerate(hold_out(many(200), 0.05, 0)) if out]
    assert held == [41, 60, 69, 74, 80, 100, 130, 140, 152, 194]
