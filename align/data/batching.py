"""How the samples of an optimizer step are cut into forward passes, and dealt to ranks.

The gradient of a step is a sum over its samples, so how they are cut changes rounding (and, where
the connector has dropout, what is dropped) and nothing else. A step may be cut by length to save
padding, by a budget of tokens, for one process or for many, and for another number of them when a
run is resumed.

G samples of a step, R ranks, T tokens of a sample
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one forward pass may hold.

    samples: at most so many. tokens: at most so many, padding included; None sets no limit, and a
    sample that is longer goes alone. length_multiple: what lengths are padded to a multiple of.
    packed: samples lie one after the other in one row; else each is padded to the longest.
    """

    samples: int
    tokens: int | None = None
    length_multiple: int = 1
    packed: bool = False

    def fits(self, count: int, longest: int, total: int) -> bool:
        """Whether `count` samples of `total` tokens fit, the longest of which has `longest`."""
        if count > self.samples or self.tokens is None:
            return count <= self.samples
        used = self.padded(total) if self.packed else count * self.padded(longest)
        return used <= self.tokens

    def padded(self, length: int) -> int:
        """The next multiple of `length_multiple`."""
        return round_up(length, self.length_multiple)


def round_up(length: int, multiple: int) -> int:
    """The next multiple."""
    return -(-length // multiple) * multiple


def divide(
    lengths: Sequence[int], limits: BatchLimits, ranks: int = 1
) -> list[list[NDArray[np.int64]]]:
    """For each rank the batches that it takes of a step, as places in `lengths`.

    lengths: T of each of the G samples. Returns R lists of equally many int64[<= samples], in which
    every place comes once. Samples of like length share a batch, in the order in which they came,
    and batches of like length are taken by all ranks at the same time, the longest first: where
    ranks wait for one another, it is for little. Where there are fewer samples than ranks, some
    get an empty batch.
    """
    if not lengths:
        return [[] for _ in range(ranks)]
    sizes = np.asarray(lengths, np.int64)
    longest_first = np.argsort(-sizes, kind="stable")
    batches = _spread(_fill(sizes, longest_first, limits), ranks)
    batches = [np.sort(batch) for batch in batches]
    batches += [np.empty(0, np.int64)] * (-len(batches) % ranks)
    return [batches[rank::ranks] for rank in range(ranks)]


def _fill(
    sizes: NDArray[np.int64], order: NDArray[np.int64], limits: BatchLimits
) -> list[NDArray[np.int64]]:
    """Cut by count into equal parts where these fit, else each filled as far as it goes."""
    parts = -(-len(order) // limits.samples)
    equal = np.array_split(order, parts)
    if all(_fits(sizes[part], limits) for part in equal):
        return equal
    batches: list[NDArray[np.int64]] = []
    start, total = 0, 0
    for end, place in enumerate(order.tolist()):
        total += int(sizes[place])
        longest = int(sizes[order[start]])
        if end > start and not limits.fits(end - start + 1, longest, total):
            batches.append(order[start:end])
            start, total = end, int(sizes[place])
    batches.append(order[start:])
    return batches


def _fits(sizes: NDArray[np.int64], limits: BatchLimits) -> bool:
    return limits.fits(len(sizes), int(sizes.max()), int(sizes.sum()))


def _spread(batches: list[NDArray[np.int64]], ranks: int) -> list[NDArray[np.int64]]:
    """As many batches as give every rank the same number, by halving those of most samples."""
    batches = list(batches)
    while len(batches) % ranks:
        widest = max(range(len(batches)), key=lambda i: len(batches[i]))
        if len(batches[widest]) < 2:
            break
        batches[widest : widest + 1] = np.array_split(batches[widest], 2)
    return batches
