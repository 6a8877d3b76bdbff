"""Which records are held out for validation: of the seed and the records alone.

A record's rank is a hash of (seed, first image, id) and the lowest are held out. So a record's side
does not depend on the order of the file, and hardly on which other records there are. Records of
one image are neighbours in that order, so that an image's captions stay on one side.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from align.data.templates import answer
from featcache.manifests import Record

STRATA = ("none", "length")
"""How `data.stratify` divides the records before it holds some out of each part."""


def num_held_out(samples: int, ratio: float) -> int:
    """How many of `samples` go to validation: the nearest whole number, at least 1 if ratio > 0.

    558,128 at 0.02 are 11,163; one sample stays for training whatever the ratio.
    """
    if ratio == 0 or samples < 2:
        return 0
    return min(samples - 1, max(1, math.floor(samples * ratio + 0.5)))


def hold_out(
    records: Sequence[Record], ratio: float, seed: int, stratify: str = "none"
) -> NDArray[np.bool_]:
    """bool[n], true where a record belongs to validation; `num_held_out` of them.

    stratify: "none" ranks all records together; dropping one moves at most one other, and the
        captions of at most one image, at the border, are divided. "length" ranks the records of
        each length bucket among themselves, and takes of each its share of the total: the exact
        share rounded down or up. Dropping one record then moves at most one other in each bucket.

    A length bucket holds the images whose answers have 1, 2-3, 4-7, 8-15, ... words in the mean,
    0 in a bucket of its own: ratios, so that they fit captions of any style, and fixed, so that a
    record's bucket does not depend on other images' captions. An image's captions share a bucket.
    """
    mask = np.zeros(len(records), np.bool_)
    total = num_held_out(len(records), ratio)
    order = sorted(range(len(records)), key=lambda i: _rank(records[i], seed))
    if stratify == "none":
        mask[order[:total]] = True
        return mask
    members: dict[int, list[int]] = defaultdict(list)
    buckets = _length_buckets(records)
    for i in order:
        members[buckets[i]].append(i)
    sizes = {bucket: len(members[bucket]) for bucket in sorted(members)}
    for bucket, share in shares(sizes, total).items():
        mask[members[bucket][:share]] = True
    return mask


def shares(sizes: dict[int, int], total: int) -> dict[int, int]:
    """How much of `total` falls to each part, in proportion to its size: the exact share rounded
    down, and up where the largest remainders are, until the sum is `total`.

    total: at most the sum of the sizes.
    """
    whole = sum(sizes.values())
    if not whole:
        return {}
    down = {part: size * total // whole for part, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda part: (-(sizes[part] * total % whole), part))
    for part in by_remainder[: total - sum(down.values())]:
        down[part] += 1
    return down


def _group(record: Record) -> str:
    """What stays on one side: a record's first image, or the record where it has none."""
    return record.images[0] if record.images else record.id


def _rank(record: Record, seed: int) -> tuple[int, str]:
    return xxhash.xxh3_64_intdigest(f"{seed}:{_group(record)}".encode()), record.id


def _length_buckets(records: Sequence[Record]) -> list[int]:
    """Each record's bucket: how many bits its image's mean number of words has."""
    words: dict[str, list[int]] = defaultdict(list)
    for record in records:
        words[_group(record)].append(len(answer(record).split()))
    bucket = {group: (sum(each) // len(each)).bit_length() for group, each in words.items()}
    return [bucket[_group(record)] for record in records]
