"""Readers of Zarr, all over featcache's own store: zarr-python, the zarrs pipeline, tensorstore."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from align.bench.providers.base import Data, Features, Reader, Rows

ARRAY = "store.zarr/features/-2"


class ZarrLoop(Reader):
    """zarr-python, one `array[i]` after another."""

    def __init__(self, path: Path, data: Data) -> None:
        import zarr

        super().__init__(path, data)
        self.array: Any = zarr.open_array(path / ARRAY, mode="r")

    def read(self, rows: Rows) -> Features:
        for place, row in enumerate(rows.tolist()):
            self.out[place] = self.array[row]
        return self.out[: len(rows)]


class ZarrOindex(ZarrLoop):
    """zarr-python, a batch by one orthogonal selection."""

    def read(self, rows: Rows) -> Features:
        return np.asarray(self.array.oindex[rows])


class ZarrGather(Reader):
    """zarr-python's asynchronous API, all images of a batch at once."""

    def __init__(self, path: Path, data: Data) -> None:
        from zarr.api.asynchronous import open_array

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


class Zarrs(ZarrLoop):
    """zarr-python with the codec pipeline of zarrs, one `array[i]` after another."""

    def __init__(self, path: Path, data: Data) -> None:
        import zarr
        import zarrs  # noqa: F401 - registers its pipeline

        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
        super().__init__(path, data)


class TensorstoreIndex(Reader):
    """tensorstore, a batch by one index array."""

    def __init__(self, path: Path, data: Data) -> None:
        import tensorstore

        super().__init__(path, data)
        self.tensorstore: Any = tensorstore
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / ARRAY)}}
        self.array: Any = tensorstore.open(spec).result()

    def read(self, rows: Rows) -> Features:
        found: Features = self.array[rows].read().result()
        return found


class TensorstoreBatch(TensorstoreIndex):
    """tensorstore, one read an image, sent together as one Batch."""

    def read(self, rows: Rows) -> Features:
        with self.tensorstore.Batch() as batch:
            futures = [self.array[row].read(batch=batch) for row in rows.tolist()]
        for place, future in enumerate(futures):
            self.out[place] = future.result()
        return self.out[: len(rows)]


class TensorstoreWriteInto(TensorstoreIndex):
    """tensorstore, written straight into a reused buffer, each image of a Batch into its place."""

    def __init__(self, path: Path, data: Data) -> None:
        super().__init__(path, data)
        self.places = [self.tensorstore.array(place, copy=False, write=True) for place in self.out]

    def read(self, rows: Rows) -> Features:
        with self.tensorstore.Batch() as batch:
            writes = [
                place.write(self.array[row], batch=batch)
                for place, row in zip(self.places, rows.tolist(), strict=False)
            ]
        for write in writes:
            write.result()
        return self.out[: len(rows)]
