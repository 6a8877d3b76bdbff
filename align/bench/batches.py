"""Which rows a pass reads: batches of int64[I]."""

from __future__ import annotations

import numpy as np

from align.bench.providers.base import BATCH_IMAGES, Rows


def random_batches(images: int, at_least: int, seed: int) -> list[Rows]:
    """At least so many rows, each of the data's `images` once before one comes again."""
    rng = np.random.default_rng(seed)
    return [rows for _ in range(repeats(images, at_least)) for rows in cut(rng.permutation(images))]


def sequential_batches(images: int, at_least: int) -> list[Rows]:
    return cut(np.arange(images)) * repeats(images, at_least)


def repeats(images: int, at_least: int) -> int:
    return max(1, -(-at_least // images))


def cut(rows: Rows) -> list[Rows]:
    return [rows[at : at + BATCH_IMAGES] for at in range(0, len(rows), BATCH_IMAGES)]
