"""The ceilings: a copy of rows in memory, and a plain read of the disk."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from align.bench.providers.base import Data, Features, Reader, Rows

BLOCK_BYTES = 8 << 20


class Memcpy(Reader):
    """Rows of an array in memory into a reused buffer, on `threads` threads."""

    def __init__(self, path: Path, data: Data, threads: int) -> None:
        super().__init__(path, data)
        self.source = np.empty(data.shape, np.float16)
        for row, image in enumerate(data.rows()):
            self.source[row] = image
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)

    def read(self, rows: Rows) -> Features:
        parts = np.array_split(np.arange(len(rows)), self.threads)
        if self.threads == 1:
            self.copy(rows, parts[0])
        else:
            list(self.pool.map(self.copy, [rows] * self.threads, parts))
        return self.out[: len(rows)]

    def copy(self, rows: Rows, places: Rows) -> None:
        for place in places.tolist():
            np.copyto(self.out[place], self.source[rows[place]])

    def close(self) -> None:
        self.pool.shutdown()


class PlainRead(Reader):
    """One flat file from its start to its end, in blocks of 8 MiB, into a reused buffer."""

    def __init__(self, path: Path, data: Data) -> None:
        super().__init__(path, data)
        self.descriptor = os.open(path / "features.bin", os.O_RDONLY)

    def read(self, rows: Rows) -> Features:
        """rows: neighbours, ascending."""
        flat = self.out[: len(rows)].reshape(-1).view(np.uint8).data
        at = int(rows[0]) * self.data.image_bytes
        done = 0
        while done < len(flat):
            done += os.preadv(self.descriptor, [flat[done : done + BLOCK_BYTES]], at + done)
        return self.out[: len(rows)]

    def close(self) -> None:
        os.close(self.descriptor)
