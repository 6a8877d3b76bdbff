"""How fast an encoder and the disk below it are, from a few seconds' work on real images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.encoders import Encoder
from featcache.errors import ImageError
from featcache.sources import ImageRef
from featcache.tiles import digest_of, open_view, prepare

DECODE_RATIO = 0.25
"""Of the budget, for reading images; the rest is the encoder's."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Of extraction, not counting the writing.

    decode_s: seconds one worker takes for an image: read, identify, decode, resize. encode_s:
    seconds the encoder takes for one in a batch of `batch_size`, results on the CPU.
    workers: decoding at once.
    """

    decode_s: float
    encode_s: float
    batch_size: int
    workers: int

    @property
    def images_per_s(self) -> float:
        """Of the slower of the two, which run at the same time."""
        return 1 / max(self.decode_s / self.workers, self.encode_s)


def probe_speed(
    encoder: Encoder,
    images: Sequence[ImageRef],
    batch_size: int,
    workers: int,
    budget_s: float = 5.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed | None:
    """Time the first of `images`; None where none of those tried can be read.

    Starts with a forward of one image, whose time tells how large a batch fits the budget; a
    first forward is the slowest, so a batch that was quicker than thought is followed by a larger
    one. At least two forwards run, however small the budget: it is exceeded by the time of one
    image, or of a batch that was slower than thought.

    Raises EncoderError where memory does not suffice for a single image.
    """
    start = clock()
    pixels, decode_s = _load(encoder, images, batch_size, budget_s, clock)
    if not pixels:
        return None
    measured = 0
    encode_s = _encode(encoder, pixels, 1, clock)
    while True:
        fitting = int((start + budget_s - clock()) / encode_s)
        size = max(1, min(batch_size, fitting))
        if size <= measured:
            return Speed(decode_s, encode_s, measured, workers)
        encode_s = _encode(encoder, pixels, size, clock)
        measured = size


def _load(
    encoder: Encoder,
    images: Sequence[ImageRef],
    most: int,
    budget_s: float,
    clock: Callable[[], float],
) -> tuple[list[np.ndarray[Any, Any]], float]:
    """Pixels of up to `most` images, as many as a part of the budget gives; seconds for each.

    Files that cannot be read are passed over, for as long as the budget lasts.
    """
    pixels: list[np.ndarray[Any, Any]] = []
    spent = 0.0
    start = clock()
    for image in images:
        allowed = budget_s * DECODE_RATIO if pixels else budget_s
        begun = clock()
        if len(pixels) == most or begun - start >= allowed:
            break
        try:
            data = image.read()
            digest_of(data, image.key)  # for its time: extraction compares it with the plan's
            view, _ = open_view(data, image.key, encoder.preprocessing.size)
            pixels.append(prepare(encoder, view, image.key))
        except ImageError:
            continue
        spent += clock() - begun
    return pixels, spent / max(1, len(pixels))


def _encode(
    encoder: Encoder,
    pixels: Sequence[np.ndarray[Any, Any]],
    size: int,
    clock: Callable[[], float],
) -> float:
    """Seconds for each image of a batch of `size`; images recur where there are fewer."""
    batch = encoder.collate([pixels[i % len(pixels)] for i in range(size)])
    start = clock()
    encoded = encoder.encode(batch)
    for values in encoded.features.values():
        values.cpu()  # waits for the device
    return (clock() - start) / size
