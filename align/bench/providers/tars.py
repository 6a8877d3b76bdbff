"""WebDataset: tar files of raw bytes, read from start to end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import webdataset

from align.bench.providers.base import SHARD_IMAGES, Data, Features, Sequential


def write(folder: Path, data: Data) -> None:
    for first in range(0, data.images, SHARD_IMAGES):
        with webdataset.TarWriter(str(folder / f"{first // SHARD_IMAGES:05d}.tar")) as tar:
            for row in range(first, min(first + SHARD_IMAGES, data.images)):
                tar.write({"__key__": f"{row:08d}", "bin": data.image(row).tobytes()})


class WebDataset(Sequential):
    """Tar files of raw bytes, one after another."""

    def start(self) -> Iterator[Features]:
        files = [str(file) for file in sorted(self.path.glob("*.tar"))]
        for sample in webdataset.WebDataset(files, shardshuffle=False):
            yield np.frombuffer(sample["bin"], np.float16).reshape(self.data.image_shape)
