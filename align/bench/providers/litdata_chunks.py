"""LitData chunks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litdata import StreamingDataset
from litdata.streaming.cache import Cache

from align.bench.providers.base import SHARD_IMAGES, Data, Features, Reader, Rows, Sequential


def write(folder: Path, data: Data) -> None:
    cache = Cache(str(folder), chunk_size=SHARD_IMAGES)
    for row, image in enumerate(data.rows()):
        cache[row] = image
    cache.done()
    cache.merge()


class LitData(Reader):
    """LitData's `StreamingDataset`, `dataset[i]`."""

    def __init__(self, path: Path, data: Data) -> None:
        super().__init__(path, data)
        self.dataset: Any = StreamingDataset(str(path), shuffle=False)

    def read(self, rows: Rows) -> Features:
        for place, row in enumerate(rows.tolist()):
            self.out[place] = self.dataset[row]
        return self.out[: len(rows)]


class LitDataIterated(LitData, Sequential):
    """LitData's `StreamingDataset`, iterated."""

    def read(self, rows: Rows) -> Features:
        return Sequential.read(self, rows)

    def start(self) -> Iterator[Features]:
        return iter(self.dataset)
