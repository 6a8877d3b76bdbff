"""HDF5 through h5py, one image a chunk, uncompressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from align.bench.providers.base import Data, Features, Reader, Rows


def write(folder: Path, data: Data) -> None:
    import h5py

    with h5py.File(folder / "features.h5", "w", libver="latest") as file:
        array = file.create_dataset(
            "features", data.shape, np.float16, chunks=(1, *data.image_shape)
        )
        for row, image in enumerate(data.rows()):
            array[row] = image


class ReadDirect(Reader):
    """`Dataset.read_direct` of each image into its place of a reused buffer."""

    def __init__(self, path: Path, data: Data) -> None:
        import h5py

        super().__init__(path, data)
        self.file: Any = h5py.File(path / "features.h5", "r")
        self.array: Any = self.file["features"]

    def read(self, rows: Rows) -> Features:
        for place, row in enumerate(rows.tolist()):
            self.array.read_direct(self.out, np.s_[row], np.s_[place])
        return self.out[: len(rows)]

    def close(self) -> None:
        self.file.close()


class DirectChunk(ReadDirect):
    """`DatasetID.read_direct_chunk`: a chunk's bytes, past HDF5's filters, into their place."""

    def read(self, rows: Rows) -> Features:
        for place, row in enumerate(rows.tolist()):
            raw = self.out[place].reshape(-1).view(np.uint8)
            self.array.id.read_direct_chunk((row, 0, 0), out=raw)
        return self.out[: len(rows)]
