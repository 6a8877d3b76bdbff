"""safetensors shards, one key an image."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
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
        # As torch tensors keys are views of the map; as numpy arrays they would be copies.
        self.places = torch.from_numpy(self.out)
        self.opened = ExitStack()
        self.shards: list[Any] = [
            self.opened.enter_context(safe_open(file, framework="pt"))
            for file in sorted(path.glob("*.safetensors"))
        ]

    def read(self, rows: Rows) -> Features:
        for place, row in enumerate(rows.tolist()):
            self.places[place].copy_(self.shards[row // SHARD_IMAGES].get_tensor(str(row)))
        return self.out[: len(rows)]

    def close(self) -> None:
        self.opened.close()
