"""What an epoch of training is made of: how often each record comes, and which go in pairs.

Decided on records, before it is known which of them have features, from hashes of the seed and of
each record: neither the order of the files, the number of ranks nor what a store lacks moves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from align.data.templates import answer
from align.errors import DataError
from featcache.manifests import IMAGE_TOKEN, Record, Turn

COMPOSED = "composed"
"""The `source` of records that were put together of two."""


@dataclass(frozen=True, slots=True)
class FileShare:
    """What became of one of `data.files`.

    records: its training records that have features. samples: how often they come in an epoch, by
    themselves or as one half of a pair.
    """

    file: str
    weight: float
    records: int
    samples: int


@dataclass(frozen=True, slots=True)
class Mixture:
    """What the training samples are made of. pairs: samples composed of two records."""

    files: tuple[FileShare, ...]
    pairs: int

    def __str__(self) -> str:
        """E.g. 'a.json x 0.5: 50 of 100 records; b.json x 2: 80 of 40 records; 10 pairs'; empty
        where every record comes once and by itself."""
        told = [
            f"{each.file} x {each.weight:g}: {each.samples:,} samples of {each.records:,} records"
            for each in self.files
            if any(share.weight != 1 for share in self.files)
        ]
        told += [f"{self.pairs:,} samples composed of two records each"] * bool(self.pairs)
        return "; ".join(told)


def repeats(
    records: Sequence[Record], file_of: NDArray[np.int32], weights: Sequence[float], seed: int
) -> NDArray[np.int64]:
    """int64[n]: how often each record comes in an epoch.

    file_of: int32[n], which of the files each record is from. weights: of each file; empty: all 1.

    A weight's whole part is how often every record of its file comes. By its fraction, the nearest
    whole number of them, those with the lowest hash of (seed, id, images), come once more: the same
    ones in every epoch, and for a larger weight the same and others.
    """
    times = np.ones(len(records), np.int64)
    for number, weight in enumerate(weights):
        of_file = np.flatnonzero(file_of == number)
        times[of_file] = math.floor(weight)
        once_more = math.floor((weight - math.floor(weight)) * len(of_file) + 0.5)
        ranked = sorted(of_file.tolist(), key=lambda i: _hash("weight", seed, records[i]))
        times[ranked[:once_more]] += 1
    return times


def unroll(times: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[sum(times)]: every record in order, then those that come twice, then three times..."""
    passes = range(int(times.max(initial=0)))
    return np.concatenate([np.flatnonzero(times > k) for k in passes] or [times[:0]])


def pair_up(entries: Sequence[Record], ratio: float, seed: int) -> list[tuple[int, int]]:
    """Pairs of indices of `entries` that become one two-image sample each, the first image first.

    ratio: of the samples after pairing, the share that are pairs: of n entries, p pairs make n - p
        samples, so p is n * ratio / (1 + ratio) rounded down. Every entry is in one pair at the
        most, and never with one of the same image.

    Entries of one image, one question and one answer can be paired. Those with the lowest hashes of
    (seed, id, image) are, each of the lower half with one of the upper.

    Raises DataError where fewer than 2p can be paired.
    """
    # 0.1 / 1.1 * 11 is below 1 in binary.
    wanted = math.floor(len(entries) * ratio / (1 + ratio) + 1e-9)
    if not wanted:
        return []
    fitting = [i for i, record in enumerate(entries) if _is_single(record)]
    if 2 * wanted > len(fitting):
        raise DataError(
            f"data.multi_image_ratio={ratio:g}: takes {wanted:,} pairs, and {len(fitting):,} of "
            f"{len(entries):,} training records have one image, one question and one answer; make "
            "it smaller"
        )
    # Copies of a record, of weights above 1, must not all rank alike: they would meet each other.
    seen: dict[tuple[str, str], int] = {}
    rank: dict[int, int] = {}
    for i in fitting:
        name = entries[i].id, entries[i].images[0]
        seen[name] = seen.get(name, -1) + 1
        rank[i] = _hash(f"pair {seen[name]}", seed, entries[i])
    fitting.sort(key=rank.__getitem__)
    first, second = fitting[:wanted], fitting[wanted : 2 * wanted]
    _part_equal_images(entries, first, second)
    return [
        (i, j)
        for i, j in zip(first, second, strict=True)
        if entries[i].images != entries[j].images  # all are of one image
    ]


def compose(first: Record, second: Record, question: str) -> Record:
    """Two single-image records as one of two images.

    The target is 'Image 1: ... Image 2: ...' on one line: template B of the Qwen3 alignment
    specification. question: what is asked, under the two images.
    """
    return Record(
        id=f"{first.id}+{second.id}",
        images=first.images + second.images,
        turns=(
            Turn("human", f"{IMAGE_TOKEN}\n{IMAGE_TOKEN}\n{question}"),
            Turn("gpt", f"Image 1: {answer(first)} Image 2: {answer(second)}"),
        ),
        source=COMPOSED,
        origin=f"{first.origin}+{second.origin}",
    )


def _is_single(record: Record) -> bool:
    return len(record.images) == 1 and [turn.role for turn in record.turns] == ["human", "gpt"]


def _part_equal_images(entries: Sequence[Record], first: list[int], second: list[int]) -> None:
    """Exchanges second halves, in place, until no pair that can be helped shows one image twice."""
    count = len(first)
    hopeless: set[tuple[str, ...]] = set()
    for k in range(count):
        image = entries[first[k]].images
        if image != entries[second[k]].images or image in hopeless:
            continue
        for step in range(1, count):
            other = (k + step) % count
            if image != entries[second[other]].images and image != entries[first[other]].images:
                second[k], second[other] = second[other], second[k]
                break
        else:
            hopeless.add(image)  # it is in every other pair


def _hash(what: str, seed: int, record: Record) -> int:
    """Of one draw for one record. Each draw has its own: what is held out are the lowest ranks of
    another, and must not be the ones that are left to draw from."""
    name = "\0".join((record.id, *record.images))
    return xxhash.xxh3_64_intdigest(f"{what}:{seed}:{name}".encode())
