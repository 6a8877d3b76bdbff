"""A finished store, opened for reading: what it holds, and which row an image has."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featcache import layout
from featcache.codecs import Codec, LayerCodec, get_codec
from featcache.errors import ConfigError, CorruptStoreError, IncompleteStoreError
from featcache.index import Index
from featcache.journal import Failure, Journal
from featcache.layout import Placement, Status, StoreInfo, read_array
from featcache.reader import FeatureReader
from featcache.writer import ShardSpec


class Store:
    """A feature store on a local disk. Opening maps the index; nothing is read row by row.

    Letters: P patches, D encoder width.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises StoreError (not a store, newer format), IncompleteStoreError (the first
        extraction has not finished), CorruptStoreError (a damaged index)."""
        self.path = Path(path)
        self.info = StoreInfo.load(self.path)
        while True:
            try:
                self.index = self._load_index()
                return
            except CorruptStoreError:
                # An extraction may have replaced the index between the two readings.
                stale, self.info = self.info.index, StoreInfo.load(self.path)
                if self.info.index == stale:
                    raise

    def _load_index(self) -> Index:
        if self.info.index is None:
            journal = Journal.load(self.path, self.info.generation)
            planned = journal.num_shards
            raise IncompleteStoreError(
                f"{self.path} is not finished: {planned - len(journal.pending)} of {planned} "
                "shards are there; run the same `featcache extract` command again to finish it"
            )
        return Index.load(self.path, self.info)

    @property
    def codec(self) -> Codec:
        return get_codec(self.info.codec)

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.info.layers)

    @property
    def num_patches(self) -> int:
        """P."""
        return self.info.num_patches

    @property
    def width(self) -> int:
        """D."""
        return self.info.width

    @property
    def num_rows(self) -> int:
        """Rows of the arrays, those without features included."""
        return self.index.num_rows

    @property
    def num_images(self) -> int:
        """Rows that hold features."""
        return int((self.index.status == Status.OK).sum())

    @property
    def fingerprint(self) -> dict[str, Any]:
        """How the features were made; the storage codec is part of it."""
        return {**self.info.fingerprint, "codec": self.info.codec}

    @property
    def source(self) -> dict[str, Any]:
        """{"data": data files, "images": image root} of the latest extraction."""
        return self.info.source

    @property
    def sizes(self) -> np.ndarray[Any, Any]:
        """int32[rows, 2]: each image's original (width, height) in pixels."""
        return self.index.sizes

    @functools.cached_property
    def spec(self) -> ShardSpec:
        """What its shards are made of. Raises CorruptStoreError."""
        return shard_spec(self.path, self.info)

    def rows(self, keys: Sequence[str]) -> np.ndarray[Any, Any]:
        """int64[len(keys)]: the row of each image, -1 where it has no features."""
        return self.index.find(keys)

    def reason(self, key: str) -> str:
        """Why an image has no features, for a message."""
        failure = self.index.failures.get(key)
        return f"{failure.reason}: {failure.detail}" if failure else "not in the store"

    def failures(self) -> list[Failure]:
        """The ledger: every image of the data without features, and why."""
        return list(self.index.failures.values())

    def reader(
        self,
        layer: str | None = None,
        *,
        threads: int = 2,
        depth: int = 3,
        pin_memory: bool = False,
        check: str = "once",
    ) -> FeatureReader:
        """A reader of one layer (the first where None). See FeatureReader.

        Raises ConfigError for a layer that the store does not hold.
        """
        chosen = self.layers[0] if layer is None else layer
        if chosen not in self.layers:
            raise ConfigError(
                f"{self.path} holds no layer {chosen!r}, only {', '.join(self.layers)}; extract "
                f"it with --layer {chosen}"
            )
        codes, scales = self.placements(chosen)
        return FeatureReader(
            codes,
            scales,
            self.layer_codec(chosen),
            self.index.status,
            self.index.checksums[chosen],
            threads=threads,
            depth=depth,
            pin_memory=pin_memory,
            check=check,
        )

    def placements(self, layer: str) -> tuple[Placement, Placement | None]:
        """Where the rows of a layer's codes lie, and of its patch scales where it has any."""
        images = self.info.shard_images
        geometry, scale_bytes = self.spec.geometry(layer), self.layer_codec(layer).scale_bytes
        codes = Placement(
            lambda shard: self.path / layout.shard_path(layer, shard),
            images,
            geometry.chunk_bytes,
            geometry.pitch_bytes,
        )
        if not scale_bytes:
            return codes, None
        scales = Placement(
            lambda shard: self.path / layout.scales_path(layer, shard),
            images,
            scale_bytes,
            scale_bytes,
        )
        return codes, scales

    def layer_codec(self, layer: str) -> LayerCodec:
        """How a layer is coded. Raises CorruptStoreError."""
        return self.spec.layers[layer]


def shard_spec(root: Path, info: StoreInfo) -> ShardSpec:
    """What a store's shards are made of.

    Raises CorruptStoreError where the channel values of a scaled codec are damaged.
    """
    codec = get_codec(info.codec)
    layers = {}
    for layer in info.layers:
        path = layout.channels_path(layer)
        channels = None
        if codec.scaled:
            values = read_array(root, path, info.checksums.get(path, ""))
            channels = torch.from_numpy(np.array(values, np.float32))
        layers[layer] = LayerCodec(codec, info.num_patches, info.width, channels)
    return ShardSpec(
        info.shard_images, layers, codec.pooled_dtype if info.pooled else None, info.width
    )
