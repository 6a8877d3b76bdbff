"""One flat array in a file, memory-mapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from align.bench.providers.base import Data, Features, Reader, Rows


def write(folder: Path, data: Data) -> None:
    with (folder / "features.bin").open("wb") as file:
        for image in data.rows():
            file.write(image.data)


class Memmap(Reader):
    """`np.take` of rows of a memory map into a reused buffer."""

    def __init__(self, path: Path, data: Data) -> None:
        super().__init__(path, data)
        file = path / "features.bin"
        self.source: Features = np.memmap(file, np.float16, "r", shape=data.shape)

    def read(self, rows: Rows) -> Features:
        # With mode="raise", the default, np.take copies through a buffer of its own.
        return np.take(self.source, rows, axis=0, out=self.out[: len(rows)], mode="clip")
