"""Several stores of the same images, read together: by two encoders, say, for Cambrian-1's SVA.

Letters: K keys, S stores, I images of a batch, P patches and D width of each store's encoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from featcache.codecs import StoredFeatures
from featcache.compare import require_same_images
from featcache.errors import ConfigError
from featcache.object_path import ObjectPath
from featcache.read_mode import choose_mode
from featcache.reader import BUDGET_BYTES, FeatureReader
from featcache.store import Store


class StoreJoin:
    """Stores in which a key means the same image, byte for byte."""

    def __init__(self, stores: Sequence[Store]) -> None:
        """Raises ConfigError without a store, FingerprintMismatch where a key means other images,
        or the stores have no image in common."""
        if not stores:
            raise ConfigError("a join needs a store")
        self.stores = tuple(stores)
        for left, right in itertools.combinations(self.stores, 2):
            require_same_images(left, right)

    def rows(self, keys: Sequence[str]) -> np.ndarray[Any, Any]:
        """int64[K, S]: the row of each image in each store, -1 where that has no features of it."""
        return np.stack([store.rows(keys) for store in self.stores], axis=1)

    def sizes_of(self, rows: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
        """The images' original (width, height) in pixels, as the first store has them.

        rows: int64[I, S].
        """
        sizes = self.stores[0].sizes[rows[:, 0]]
        return [(width, height) for width, height in sizes.tolist()]

    def reader(
        self,
        layers: Sequence[str] | None = None,
        *,
        budget_bytes: int = BUDGET_BYTES,
        io: str = "auto",
        **options: Any,
    ) -> JoinReader:
        """layers: one of each store, or None for their first ones. budget_bytes: of all stores
        together, shared out by what an image takes in each. io: "auto" asks whether all of them fit
        into memory together. options: of `ReaderOptions`.

        Raises as `Store.reader` does.
        """
        chosen = [store.layers[0] for store in self.stores] if layers is None else layers
        if len(chosen) != len(self.stores):
            raise ConfigError(f"layers: {len(chosen)} are named for {len(self.stores)} stores")
        pairs = list(zip(self.stores, chosen, strict=True))
        sizes = [store.layer_codec(layer).image_bytes for store, layer in pairs]
        shares = [max(1, budget_bytes * size // sum(sizes)) for size in sizes]
        in_a_bucket = any(isinstance(store.path, ObjectPath) for store in self.stores)
        if io == "auto" and len(pairs) > 1 and not in_a_bucket:
            total = sum(store.stored_bytes(layer) for store, layer in pairs)
            together = choose_mode("auto", total, self.stores[0].example(pairs[0][1]))
            io = "direct" if together.direct else "buffered"
        with ExitStack() as opened:
            readers = [
                opened.enter_context(store.reader(layer, budget_bytes=share, io=io, **options))
                for (store, layer), share in zip(pairs, shares, strict=True)
            ]
            opened.pop_all()
        return JoinReader(readers)


class JoinReader:
    """Reads the same images from every store at once: a batch takes as long as its slowest part.

    Each store has a `FeatureReader` of its own, with threads of its own. Use as a context manager,
    or call `close`.
    """

    def __init__(self, readers: Sequence[FeatureReader]) -> None:
        self.readers = tuple(readers)

    def read(
        self, rows: np.ndarray[Any, Any], dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """rows: int64[I, S]. Returns [I, P, D] of each store, see `FeatureReader.read`."""
        return tuple(stored.decode(dtype) for stored in self.read_stored(rows))

    def read_stored(self, rows: np.ndarray[Any, Any]) -> tuple[StoredFeatures, ...]:
        """`read`, as they lie in the stores."""
        begun = [reader.begin(rows[:, s]) for s, reader in enumerate(self.readers)]
        return tuple(reading.result() for reading in begun)

    def stream(
        self, batches: Iterable[np.ndarray[Any, Any]], device: torch.device | None = None
    ) -> Generator[tuple[StoredFeatures, ...], None, None]:
        """The features of each batch of rows int64[I, S] from every store, in order, read ahead.

        Valid until the next iteration; see `FeatureReader.stream`.
        """
        copies = itertools.tee(batches, len(self.readers))

        def column(s: int) -> Iterator[np.ndarray[Any, Any]]:
            return (rows[:, s] for rows in copies[s])

        with ExitStack() as ending:
            streams = [
                ending.enter_context(closing(reader.stream(column(s), device)))
                for s, reader in enumerate(self.readers)
            ]
            yield from zip(*streams, strict=True)

    def close(self) -> None:
        """See `FeatureReader.close`."""
        for reader in self.readers:
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
