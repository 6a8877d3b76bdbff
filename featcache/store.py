"""A finished store, opened for reading: what it holds, and which row an image has."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from featcache import layout
from featcache.codecs import Codec, LayerCodec, get_codec
from featcache.errors import ConfigError, CorruptStoreError, StoreError
from featcache.forms import StoreForm, ZarrForm
from featcache.gather import Pool
from featcache.index import Index, checksummed
from featcache.journal import Commit, Failure, Plan
from featcache.layout import Placement, Status, StoreInfo, read_array
from featcache.object_path import ObjectPath, StorePath, parse_location
from featcache.read_mode import choose_mode, choose_tier_mode
from featcache.reader import FeatureReader, ReaderOptions
from featcache.tier import Tier, default_tier
from featcache.tiles import Grid, Tiling, tiles_of_all
from featcache.writer import ShardSpec


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of one image. grid: (columns, rows). rows: int64[columns * rows], the store's row
    of each, counted along the grid's rows; -1 where a tile has no features."""

    grid: Grid
    rows: np.ndarray[Any, Any]


class Store:
    """A feature store on a disk or in a bucket. Opening maps the index; nothing is read row by row.

    form: where its parts lie, in a folder or bucket (Zarr) or in one HDF5 file.

    Letters: P patches, D encoder width.
    """

    def __init__(
        self,
        path: StorePath | str,
        *,
        cache_dir: Path | str | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        """path: a folder, an HDF5 file, or s3://bucket/..., gs://..., az://...
        cache_dir, cache_bytes: of a store in a bucket, where what is fetched is kept on a local
        disk, and how much of it: see `Tier`.

        Raises StoreError (not a store, newer format; ObjectStoreError), IncompleteStoreError (the
        first extraction has not finished), CorruptStoreError (a damaged index)."""
        self.path = parse_location(path)
        self._cache = cache_dir, cache_bytes
        self.form = form_of(self.path, lambda: self.tier)
        self.info = self.form.load_info()
        while True:
            try:
                self.index = Index.load_from(self.form.array, self.info)
                return
            except CorruptStoreError:
                # An extraction may have replaced the index between the two readings.
                stale, self.info = self.info.index, self.form.load_info()
                if self.info.index == stale:
                    raise

    def __reduce__(self) -> tuple[Callable[[], Store], tuple[()]]:
        """Another process opens it anew: an index of gigabytes is mapped, not sent."""
        return self._again, ()

    @property
    def _again(self) -> Callable[[], Store]:
        folder, nbytes = self._cache
        return functools.partial(Store, self.path, cache_dir=folder, cache_bytes=nbytes)

    @functools.cached_property
    def tier(self) -> Tier:
        """Keeps on a local disk what is fetched of a store in a bucket. Raises StoreError."""
        folder, nbytes = self._cache
        return default_tier() if folder is None and nbytes is None else Tier(folder, nbytes)

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
        """{"data": data files, "images": image root} of the latest extraction, and where the codes
        were made from those of another codec {"converted_from": {"codec": its name, ...}}."""
        return self.info.source

    @property
    def sizes(self) -> np.ndarray[Any, Any]:
        """int32[rows, 2]: each image's original (width, height) in pixels."""
        return self.index.sizes

    @property
    def grids(self) -> np.ndarray[Any, Any] | None:
        """int32[rows, 2]: each image's (height, width) in patches, zeros where it has no features;
        None where all images have the same."""
        return self.index.grids

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """int32[rows]: how many of each image's P patches are its own; zeros follow them (what the
        codec makes of zeros). P for all where they do not vary."""
        if self.grids is None:
            return np.full(self.num_rows, self.num_patches, np.int32)
        return self.grids.prod(1, dtype=np.int32)

    @functools.cached_property
    def spec(self) -> ShardSpec:
        """What its shards are made of. Raises CorruptStoreError."""
        return _shard_spec(self.form.array, self.info)

    @functools.cached_property
    def plans(self) -> list[Plan]:
        """Which images its rows are. Raises CorruptStoreError."""
        return [self.form.plan(number)[0] for number in range(1, self.info.generation + 1)]

    def require_indexed(self, commit: Commit) -> None:
        """Raises StoreError where a shard's commit record and the index say different things."""
        first = commit.shard * self.spec.images
        names = checksummed(self.info)
        for row, record in enumerate(commit.rows[: self.num_rows - first], first):
            sums = {name: int(self.index.checksums[name][row]) for name in names}
            is_ok = record.status == Status.OK
            if self.index.status[row] != record.status or (is_ok and sums != record.checksums):
                raise StoreError(
                    f"{self.path} was changed while it was read, or what changed it was stopped; "
                    "let that finish, then run the same command again"
                )

    def rows(self, keys: Sequence[str]) -> np.ndarray[Any, Any]:
        """int64[len(keys)]: the row of each image, -1 where it has no features."""
        return self.index.find(keys)

    @functools.cached_property
    def tiling(self) -> Tiling | None:
        """How its images were cut into tiles; None where they were not."""
        return Tiling.of(self.info.fingerprint)

    def tiles(self, keys: Sequence[str]) -> list[Tiles | None]:
        """The tiles of each image; None where it has no features as a whole.

        The whole images' rows are `rows(keys)`. Raises ConfigError where the store has no tiles.
        """
        if self.tiling is None:
            raise ConfigError(f"{self.path} holds whole images only; extract with --tiles")
        rows = self.rows(keys)
        there = np.flatnonzero(rows >= 0).tolist()
        sizes = self.sizes[rows[there]].tolist()
        names, counts = tiles_of_all(self.tiling, [keys[i] for i in there], sizes)
        own = self.rows(names)
        found: list[Tiles | None] = [None] * len(keys)
        start = 0
        for i, size, count in zip(there, sizes, counts, strict=True):
            found[i] = Tiles(self.tiling.grid_of(size), own[start : start + count])
            start += count
        return found

    def reason(self, key: str) -> str:
        """Why an image has no features, for a message."""
        failure = self.index.failures.get(key)
        return f"{failure.reason}: {failure.detail}" if failure else "not in the store"

    def failures(self) -> list[Failure]:
        """The ledger: every image of the data without features, and why."""
        return list(self.index.failures.values())

    def reader(self, layer: str | None = None, **options: Any) -> FeatureReader:
        """A reader of one layer (the first where None). options: see `ReaderOptions`.

        Raises ConfigError for a layer that the store does not hold, and for wrong options.
        """
        chosen = self.layers[0] if layer is None else layer
        layer_codec = self.layer_codec(chosen)
        wanted = ReaderOptions(**options)
        codes, scales = self.placements(chosen)
        checksums = self.index.checksums[chosen]
        stored, through = self.stored_bytes(chosen), None
        if isinstance(self.path, ObjectPath):
            from featcache.tier_pool import TierPool

            placements = [where for where in (codes, scales) if where]
            mode = choose_tier_mode(wanted.io, str(self.path), stored, self.tier)
            made = xxhash.xxh3_64_hexdigest(json.dumps(self.fingerprint, sort_keys=True).encode())

            def through(pool: Pool) -> Pool:
                return TierPool(pool, self.tier, placements, checksums, made)
        else:
            mode = choose_mode(wanted.io, stored, self.example(chosen))
        return FeatureReader(
            codes,
            scales,
            layer_codec,
            self.index.status,
            checksums,
            mode,
            wanted,
            functools.partial(_open_reader, self._again, chosen, wanted),
            through,
        )

    def stored_bytes(self, layer: str) -> int:
        """Of all images' features on the disk."""
        return self.num_images * sum(where.pitch_bytes for where in self.placements(layer) if where)

    def example(self, layer: str) -> Path | None:
        """A file with features, if there are any on a disk."""
        if not self.num_images:
            return None
        where = self.placements(layer)[0]
        first = where.paths(int(np.argmax(self.index.status == Status.OK)) // where.rows_per_file)
        return None if isinstance(first, ObjectPath) else first

    def placements(self, layer: str) -> tuple[Placement, Placement | None]:
        """Where the rows of a layer's codes lie, and of its patch scales where it has any."""
        codes = self.form.placement(self.spec, layout.features_path(layer))
        if not self.codec.scaled:
            return codes, None
        return codes, self.form.placement(self.spec, layout.scales_name(layer))

    def layer_codec(self, layer: str) -> LayerCodec:
        """How a layer is coded. Raises ConfigError for one that the store does not hold, and
        CorruptStoreError."""
        if layer not in self.layers:
            raise ConfigError(
                f"{self.path} holds no layer {layer!r}, only {', '.join(self.layers)}; extract "
                f"it with --layer {layer}"
            )
        return self.spec.layers[layer]


def _open_reader(store: Callable[[], Store], layer: str, options: ReaderOptions) -> FeatureReader:
    return store().reader(layer, **asdict(options))


def codecs_before(source: dict[str, Any]) -> list[str]:
    """The codecs whose rounding the features of a converted store carry, the latest first.

    source: `Store.source`.
    """
    found = []
    while made_of := source.get("converted_from"):
        found.append(made_of["codec"])
        source = made_of
    return found


def form_of(path: StorePath, tier: Callable[[], Tier] = default_tier) -> StoreForm:
    """By content. tier: see `ZarrForm`.

    Raises StoreError for a file that is no HDF5 and a path that cannot be.
    """
    if isinstance(path, ObjectPath):
        return ZarrForm(path, tier)
    try:
        if not path.is_file():
            return ZarrForm(path)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    # h5py takes a third of a second to import.
    from featcache.hdf5 import Hdf5Form, is_hdf5

    if not is_hdf5(path):
        raise StoreError(
            f"{path} is a file, not a feature store (neither a Zarr folder nor an HDF5 file)"
        )
    return Hdf5Form(path)


def shard_spec(root: StorePath, info: StoreInfo) -> ShardSpec:
    """What a Zarr store's shards are made of.

    Raises CorruptStoreError where the channel values of a scaled codec are damaged.
    """
    return _shard_spec(functools.partial(read_array, root), info)


def blank_spec(info: StoreInfo) -> ShardSpec:
    """What the store's shards are made of, but for the channel values: enough to look at bytes."""
    codec = get_codec(info.codec)
    layers = {name: LayerCodec(codec, info.num_patches, info.width) for name in info.layers}
    pooled = codec.pooled_dtype if info.pooled else None
    return ShardSpec(info.shard_images, layers, pooled, info.width)


def _shard_spec(array: Callable[[str, str], np.ndarray[Any, Any]], info: StoreInfo) -> ShardSpec:
    blank = blank_spec(info)
    layers = dict(blank.layers)
    for layer, coded in blank.layers.items():
        path = layout.channels_path(layer)
        if coded.codec.scaled and path in info.checksums:  # a store without rows has none
            values = array(path, info.checksums[path])
            channels = torch.from_numpy(np.array(values, np.float32))
            layers[layer] = replace(coded, channels=channels, _on={})
    return replace(blank, layers=layers)
