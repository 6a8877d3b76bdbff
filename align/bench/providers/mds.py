"""MosaicML Streaming shards."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from align.bench.providers.base import SHARD_IMAGES, Data, Features, Reader, Rows

if "streaming" not in sys.modules:
    # The package's own start needs a torchvision built for just this torch, of which nothing is
    # used here: go past it.
    spec = importlib.util.find_spec("streaming")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("No module named 'streaming'")
    package = ModuleType("streaming")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["streaming"] = package

from streaming.base import LocalDataset, MDSWriter


def write(folder: Path, data: Data) -> None:
    shape = ",".join(map(str, data.image_shape))
    limit = SHARD_IMAGES * (data.image_bytes + 8)
    columns = {"features": f"ndarray:float16:{shape}"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=limit) as writer:
        for image in data.rows():
            writer.write({"features": image})


class Mds(Reader):
    """MosaicML Streaming's `LocalDataset`, `dataset[i]`."""

    def __init__(self, path: Path, data: Data) -> None:
        super().__init__(path, data)
        self.dataset: Any = LocalDataset(str(path))

    def read(self, rows: Rows) -> Features:
        for place, row in enumerate(rows.tolist()):
            self.out[place] = self.dataset[row]["features"]
        return self.out[: len(rows)]
