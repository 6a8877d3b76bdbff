"""What a provider is: a format that it writes, and a reader of random or sequential batches.

Letters: I images of a batch, P patches, D encoder width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.bench.features import features

BATCH_IMAGES = 32
SHARD_IMAGES = 128
"""Images of a file, in the formats that put several into one."""
STORE = "store.zarr"
ARRAY = f"{STORE}/features/-2"
"""featcache's store, and the array in it that any reader of Zarr can open."""

Rows = np.ndarray[Any, Any]
Features = np.ndarray[Any, Any]


class UnavailableError(Exception):
    """This provider cannot do here what its name says; the text says why."""


@dataclass(frozen=True, slots=True)
class Data:
    """The features that every format holds: row r is `features(r)`."""

    images: int
    num_patches: int = 729
    width: int = 1152

    @property
    def image_bytes(self) -> int:
        return self.num_patches * self.width * 2

    @property
    def nbytes(self) -> int:
        return self.images * self.image_bytes

    @property
    def image_shape(self) -> tuple[int, int]:
        return self.num_patches, self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.images, self.num_patches, self.width

    def image(self, row: int) -> Features:
        """float16[P, D]."""
        return features(row, self.num_patches, self.width)

    def rows(self) -> Iterator[Features]:
        """Every image in turn; one at a time is in memory."""
        return (self.image(row) for row in range(self.images))


class Reader:
    """Delivers batches of rows, each as one contiguous array: float16[I, P, D].

    A reader of whole batches implements `read`; one that reads ahead implements `batches`. What is
    delivered may be a buffer that is reused: it is valid until the next iteration.
    """

    def __init__(self, path: Path, data: Data) -> None:
        """path: what the format's writer wrote."""
        self.path = path
        self.data = data
        self.out = np.empty((BATCH_IMAGES, *data.image_shape), np.float16)

    def batches(self, batches: Sequence[Rows]) -> Iterator[Features]:
        """The features of each batch of rows, in order."""
        for rows in batches:
            yield self.read(rows)

    def read(self, rows: Rows) -> Features:
        """rows: int64[I]."""
        raise NotImplementedError

    def close(self) -> None:
        """End threads and processes."""


class Sequential(Reader):
    """Rows in their order only: a batch that begins with row 0 begins a new pass."""

    images: Iterator[Features]

    def read(self, rows: Rows) -> Features:
        if rows[0] == 0:
            self.images = self.start()
        for place in range(len(rows)):
            self.out[place] = next(self.images)
        if rows[-1] == self.data.images - 1:
            next(self.images, None)  # lets it end
        return self.out[: len(rows)]

    def start(self) -> Iterator[Features]:
        raise NotImplementedError
