"""Formats made for streaming: WebDataset tars, MosaicML Streaming shards, LitData chunks."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from align.bench.providers.base import (
    BATCH_IMAGES,
    SHARD_IMAGES,
    Data,
    Features,
    Reader,
    Rows,
)


def write_tar(folder: Path, data: Data) -> None:
    import webdataset

    for first in range(0, data.images, SHARD_IMAGES):
        with webdataset.TarWriter(str(folder / f"{first // SHARD_IMAGES:05d}.tar")) as tar:
            for row in range(first, min(first + SHARD_IMAGES, data.images)):
                tar.write({"__key__": f"{row:08d}", "bin": data.image(row).tobytes()})


def write_mds(folder: Path, data: Data) -> None:
    shape = ",".join(map(str, data.image_shape))
    limit = SHARD_IMAGES * (data.image_bytes + 8)
    columns = {"features": f"ndarray:float16:{shape}"}
    with streaming().MDSWriter(out=str(folder), columns=columns, size_limit=limit) as writer:
        for image in data.rows():
            writer.write({"features": image})


def write_litdata(folder: Path, data: Data) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_size=SHARD_IMAGES)
    for row, image in enumerate(data.rows()):
        cache[row] = image
    cache.done()
    cache.merge()


def streaming() -> Any:
    """`streaming.base`, past the package's own start, which needs a torchvision built for just
    this torch although none of it is used here."""
    if "streaming" not in sys.modules:
        spec = importlib.util.find_spec("streaming")
        assert spec is not None and spec.submodule_search_locations is not None
        package = ModuleType("streaming")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["streaming"] = package
    return importlib.import_module("streaming.base")


class Sequential(Reader):
    """Rows in their order only: a batch that begins with row 0 begins a new pass."""

    images: Iterator[Features]

    def read(self, rows: Rows) -> Features:
        if rows[0] == 0:
            self.images = self.start()
        for place in range(len(rows)):
            self.out[place] = next(self.images)
        return self.out[: len(rows)]

    def start(self) -> Iterator[Features]:
        raise NotImplementedError


class WebDataset(Sequential):
    """Tar files of raw bytes, one after another."""

    def start(self) -> Iterator[Features]:
        import webdataset

        files = [str(file) for file in sorted(self.path.glob("*.tar"))]
        for sample in webdataset.WebDataset(files, shardshuffle=False):
            yield np.frombuffer(sample["bin"], np.float16).reshape(self.data.image_shape)


class Mds(Reader):
    """MosaicML Streaming's `LocalDataset`, `dataset[i]`."""

    def __init__(self, path: Path, data: Data) -> None:
        super().__init__(path, data)
        self.dataset: Any = streaming().LocalDataset(str(path))

    def read(self, rows: Rows) -> Features:
        for place, row in enumerate(rows.tolist()):
            self.out[place] = self.dataset[row]["features"]
        return self.out[: len(rows)]


class LitData(Reader):
    """LitData's `StreamingDataset`, `dataset[i]`."""

    def __init__(self, path: Path, data: Data) -> None:
        super().__init__(path, data)
        self.dataset = self.open()

    def open(self) -> Any:
        from litdata import StreamingDataset

        return StreamingDataset(str(self.path), shuffle=False)

    def read(self, rows: Rows) -> Features:
        for place, row in enumerate(rows.tolist()):
            self.out[place] = self.dataset[row]
        return self.out[: len(rows)]

    def release(self) -> None:
        del self.dataset
        self.dataset = self.open()


class LitDataIterated(LitData, Sequential):
    """LitData's `StreamingDataset`, iterated."""

    def read(self, rows: Rows) -> Features:
        return Sequential.read(self, rows)

    def start(self) -> Iterator[Features]:
        return iter(self.dataset)
