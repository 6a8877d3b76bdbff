"""Near duplicates, against a comparison of everything with everything."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from align.data.near_duplicates import NearDuplicates


def jaccard(a: str, b: str) -> Fraction:
    """Written from the definition, in exact numbers; two captions without words share nothing."""
    left, right = (Counter(re.findall(r"\w+", text.casefold())) for text in (a, b))
    union = (left | right).total()
    return Fraction((left & right).total(), union) if union else Fraction(0)


def by_comparing_all(texts: list[str], threshold: Fraction) -> tuple[list[bool], list[str]]:
    """For each text whether it repeats an earlier one that was new; and the new ones."""
    new: list[str] = []
    repeats = []
    for text in texts:
        repeats.append(any(jaccard(text, earlier) >= threshold for earlier in new))
        if not repeats[-1]:
            new.append(text)
    return repeats, new


def captions(count: int, vocabulary: int, seed: int) -> list[str]:
    """Of 0 to 12 words, rare and common ones, a third of them changed copies of earlier ones."""
    rng = np.random.default_rng(seed)
    words = np.minimum(rng.zipf(1.5, (count, 12)), vocabulary)
    found: list[str] = []
    for i in range(count):
        text = [f"w{word}" for word in words[i, : rng.integers(0, 13)]]
        if found and rng.random() < 1 / 3:
            text = found[rng.integers(len(found))].replace(".", "").split()
            for _ in range(rng.integers(0, 3)):
                if text:
                    text[rng.integers(len(text))] = f"w{rng.integers(vocabulary)}"
        found.append(" ".join(text) + "." * int(rng.integers(2)))
    return found


@pytest.mark.parametrize("threshold", ["1/2", "2/3", "7/10", "4/5", "9/10", "1"])
@pytest.mark.parametrize("vocabulary", [15, 400])
def test_nothing_is_missed_and_nothing_else_found(threshold: str, vocabulary: int) -> None:
    texts = captions(600, vocabulary, seed=vocabulary)
    exact = Fraction(threshold)
    expected, new = by_comparing_all(texts, exact)
    near = NearDuplicates(float(exact))
    for text, repeats in zip(texts, expected, strict=True):
        earlier = near.find_or_add(text)
        assert (earlier is not None) == repeats, text
        if earlier is not None:
            assert jaccard(new[earlier], text) >= exact
    assert any(expected) and not all(expected)


@pytest.mark.parametrize(
    ("threshold", "first", "second", "same"),
    [
        (1.0, "A dog, on a sofa!", "on a SOFA a dog", True),
        (1.0, "a dog", "a a dog", False),  # words count as often as they come
        (0.8, "one two three four", "one two three four five", True),  # 4 of 5
        (0.8, "one two three four", "one two three five", False),  # 3 of 5
        (0.9, "w " * 9, "w " * 10, True),
        (0.91, "w " * 9, "w " * 10, False),
        (0.5, "...", "...", False),  # no word: nothing to compare
        (0.5, "", "", False),
    ],
)
def test_similarity(threshold: float, first: str, second: str, same: bool) -> None:
    near = NearDuplicates(threshold)
    assert near.find_or_add(first) is None
    assert near.find_or_add(second) == (0 if same else None)


def test_what_was_dropped_is_not_compared_with() -> None:
    """Each is like the one before; the third is not like the first."""
    near = NearDuplicates(0.6)
    assert near.find_or_add("a b c d") is None
    assert near.find_or_add("b c d e") == 0
    assert near.find_or_add("c d e f") is None


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01])
def test_thresholds_that_mean_nothing(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\]"):
        NearDuplicates(threshold)
