"""zarr-python over featcache's own store, which is plain Zarr."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.api.asynchronous import open_array

from align.bench.providers.base import ARRAY, Data, Features, Reader, Rows


class Loop(Reader):
    """zarr-python, one `array[i]` after another."""

    def __init__(self, path: Path, data: Data) -> None:
        super().__init__(path, data)
        self.array: Any = zarr.open_array(path / ARRAY, mode="r")

    def read(self, rows: Rows) -> Features:
        for place, row in enumerate(rows.tolist()):
            self.out[place] = self.array[row]
        return self.out[: len(rows)]


class Oindex(Loop):
    """zarr-python, a batch by one orthogonal selection."""

    def read(self, rows: Rows) -> Features:
        return np.asarray(self.array.oindex[rows])


class Gather(Reader):
    """zarr-python's asynchronous API, all images of a batch at once."""

    def __init__(self, path: Path, data: Data) -> None:
        super().__init__(path, data)
        self.loop = asyncio.new_event_loop()
        self.array: Any = self.loop.run_until_complete(open_array(store=path / ARRAY, mode="r"))

    def read(self, rows: Rows) -> Features:
        self.loop.run_until_complete(self.gather(rows))
        return self.out[: len(rows)]

    async def gather(self, rows: Rows) -> None:
        async def place(place: int, row: int) -> None:
            self.out[place] = await self.array.getitem(row)

        await asyncio.gather(*(place(*pair) for pair in enumerate(rows.tolist())))

    def close(self) -> None:
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
