"""Plain files: one flat array (np.memmap), safetensors shards, one .pt file an image."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from align.bench.providers.base import SHARD_IMAGES, Data, Features, Reader, Rows


def write_flat(folder: Path, data: Data) -> None:
    with (folder / "features.bin").open("wb") as file:
        for image in data.rows():
            file.write(image.data)


def write_safetensors(folder: Path, data: Data) -> None:
    from safetensors.numpy import save_file

    for first in range(0, data.images, SHARD_IMAGES):
        rows = range(first, min(first + SHARD_IMAGES, data.images))
        file = folder / f"{first // SHARD_IMAGES:05d}.safetensors"
        save_file({str(row): data.image(row) for row in rows}, file)


def write_pt(folder: Path, data: Data) -> None:
    import torch

    for row, image in enumerate(data.rows()):
        torch.save(torch.from_numpy(image.copy()), folder / f"{row}.pt")


class Memmap(Reader):
    """`np.take` of rows of a memory map into a reused buffer."""

    def __init__(self, path: Path, data: Data) -> None:
        super().__init__(path, data)
        self.source = self.map()

    def map(self) -> Features:
        return np.memmap(self.path / "features.bin", np.float16, "r", shape=self.data.shape)

    def read(self, rows: Rows) -> Features:
        # With mode="raise", the default, np.take copies through a buffer of its own.
        return np.take(self.source, rows, axis=0, out=self.out[: len(rows)], mode="clip")

    def release(self) -> None:
        del self.source
        self.source = self.map()


class Safetensors(Reader):
    """One key an image; the shards stay open."""

    def __init__(self, path: Path, data: Data) -> None:
        super().__init__(path, data)
        self.open()

    def open(self) -> None:
        from safetensors import safe_open

        self.opened = ExitStack()
        self.shards: list[Any] = [
            self.opened.enter_context(safe_open(file, framework="numpy"))
            for file in sorted(self.path.glob("*.safetensors"))
        ]

    def read(self, rows: Rows) -> Features:
        for place, row in enumerate(rows.tolist()):
            self.out[place] = self.shards[row // SHARD_IMAGES].get_tensor(str(row))
        return self.out[: len(rows)]

    def release(self) -> None:
        self.opened.close()
        self.open()

    def close(self) -> None:
        self.opened.close()


class PtFiles(Reader):
    """`torch.load` of one file an image."""

    def read(self, rows: Rows) -> Features:
        import torch

        for place, row in enumerate(rows.tolist()):
            image = torch.load(self.path / f"{row}.pt", weights_only=True, mmap=False)
            self.out[place] = image.numpy()
        return self.out[: len(rows)]
