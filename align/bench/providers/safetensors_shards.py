"""safetensors shards, one key an image."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import save_file

from align.bench.providers.base import SHARD_IMAGES, Data, Features, Reader, Rows


def write(folder: Path, data: Data) -> None:
    for first in range(0, data.images, SHARD_IMAGES):
        rows = range(first, min(first + SHARD_IMAGES, data.images))
        file = folder / f"{first // SHARD_IMAGES:05d}.safetensors"
        save_file({str(row): data.image(row) for row in rows}, file)


class Safetensors(Reader):
    """One key an image; the shards stay open."""

    def __init__(self, path: Path, data: Data) -> None:
        super().__init__(path, data)
        self.open()

    def open(self) -> None:
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
