"""One .pt file an image."""

from __future__ import annotations

from pathlib import Path

import torch

from align.bench.providers.base import Data, Features, Reader, Rows


def write(folder: Path, data: Data) -> None:
    for row, image in enumerate(data.rows()):
        torch.save(torch.from_numpy(image.copy()), folder / f"{row}.pt")


class PtFiles(Reader):
    """`torch.load` of one file an image."""

    def read(self, rows: Rows) -> Features:
        for place, row in enumerate(rows.tolist()):
            image = torch.load(self.path / f"{row}.pt", weights_only=True, mmap=False)
            self.out[place] = image.numpy()
        return self.out[: len(rows)]
