"""Near-duplicate captions, exactly: by how many of their words they share.

The similarity of two captions is the Jaccard index of their words, case and punctuation aside, each
counted as often as it comes: shared / (all of both - shared). "a dog on a sofa" and "A dog, on the
sofa" share 4 of 6: 0.67. The order of the words does not count.

Every caption is compared with all that came before it and were new. That is done without looking at
most of them, and nothing is missed: where n words of two captions of at least similarity t are put
into one order that all captions use, the first n - ceil(t * n) + 1 of each have a word in common
(prefix filtering; Bayardo, Ma, Srikant, "Scaling Up All Pairs Similarity Search", WWW 2007). Words
that were first met late are put first: they are the rare ones, so few captions have to be looked
at. These are thinned out by their lengths, then by 64-bit sets of their words, and compared.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+")
_TOLERANCE = 1e-9
"""Thresholds such as 0.8 are no binary numbers: 0.8 * 5 words must not round up to 5."""


class NearDuplicates:
    """The captions that were new, and the question whether another one is like one of them.

    threshold: the least similarity of a duplicate, in (0, 1]; 1 finds the same words.

    Memory: about 100 B a caption of 10 words, and 200 B a word of the vocabulary.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {threshold}")
        self.threshold = threshold
        # A word's number of its k-th occurrence within a caption; in the order of first meeting.
        self._numbers: dict[tuple[str, int], int] = {}
        # By word number: the captions in whose prefix it is.
        self._holders: list[_Integers] = []
        self._lengths = _Integers(np.int32)
        self._bits = _Integers(np.uint64)
        # Of all captions, one after the other: the word numbers, largest first.
        self._words = _Integers(np.int32)
        self._starts = _Integers(np.int64)

    def find_or_add(self, text: str) -> int | None:
        """The earliest caption that `text` nearly repeats, as its number among those that were
        added (from 0); None where there is none, and then it is added.

        A text without any word is like no other, and is added.
        """
        words = self._number(text)
        length = len(words)
        # At least so many words must be shared, with a caption of whatever length.
        least = max(1, math.ceil(self.threshold * length - _TOLERANCE))
        prefix = words[: length - least + 1]
        bits = _bits_of(words)
        found = self._find(words, prefix, bits)
        if found is None:
            self._add(words, prefix, bits)
        return found

    def _number(self, text: str) -> list[int]:
        """Numbers of the words of a text, largest first, i.e. those met last."""
        numbers = self._numbers
        found: list[int] = []
        for word, count in Counter(_WORD.findall(text.casefold())).items():
            for k in range(count):
                number = numbers.setdefault((word, k), len(numbers))
                if number == len(self._holders):
                    self._holders.append(_Integers(np.int32))
                found.append(number)
        return sorted(found, reverse=True)

    def _find(self, words: list[int], prefix: list[int], bits: int) -> int | None:
        held = [self._holders[word].values for word in prefix]
        candidates = np.concatenate(held) if held else np.empty(0, np.int32)
        length, t = len(words), self.threshold
        lengths = self._lengths.values[candidates]
        fits = (lengths >= t * length - _TOLERANCE) & (lengths * t <= length + _TOLERANCE)
        candidates = candidates[fits]
        if not len(candidates):
            return None
        # Each bit that only one of two sets has stands for a word that only this one has.
        others = self._bits.values[candidates]
        lengths = lengths[fits]
        mine = np.uint64(bits)
        shared = np.minimum(
            length - np.bitwise_count(mine & ~others), lengths - np.bitwise_count(others & ~mine)
        )
        candidates = np.unique(candidates[self._is_enough(shared, length, lengths)])
        own = set(words)
        for number in candidates.tolist():
            start = self._starts.values[number]
            other = self._words.values[start : start + self._lengths.values[number]].tolist()
            if self._is_enough(len(own.intersection(other)), length, len(other)):
                return int(number)
        return None

    def _is_enough(self, shared: Any, length: int, other: Any) -> Any:
        """Whether the Jaccard index reaches the threshold; of numbers, or of arrays of them."""
        return shared + _TOLERANCE >= self.threshold * (length + other - shared)

    def _add(self, words: list[int], prefix: list[int], bits: int) -> None:
        number = len(self._lengths)
        for word in prefix:
            self._holders[word].append(number)
        self._starts.append(len(self._words))
        self._words.extend(words)
        self._lengths.append(len(words))
        self._bits.append(bits)


def _bits_of(words: list[int]) -> int:
    bits = 0
    for word in words:
        # Multiplied by an odd constant and cut: neighbouring numbers fall on different bits.
        bits |= 1 << (word * 0x9E3779B97F4A7C15 >> 58 & 63)
    return bits


class _Integers:
    """An array that grows at its end."""

    __slots__ = ("_array", "_size")

    def __init__(self, dtype: type[np.integer]) -> None:
        self._array: NDArray[np.integer] = np.empty(2, dtype)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def values(self) -> NDArray[np.integer]:
        """[n], a view that holds until the next `append`."""
        return self._array[: self._size]

    def append(self, value: int) -> None:
        self._reserve(1)
        self._array[self._size] = value
        self._size += 1

    def extend(self, values: list[int]) -> None:
        self._reserve(len(values))
        self._array[self._size : self._size + len(values)] = values
        self._size += len(values)

    def _reserve(self, more: int) -> None:
        if self._size + more > len(self._array):
            grown = np.empty(max(2 * len(self._array), self._size + more), self._array.dtype)
            grown[: self._size] = self.values
            self._array = grown
