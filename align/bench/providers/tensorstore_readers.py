"""tensorstore over featcache's own store, which is plain Zarr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorstore

from align.bench.providers.base import ARRAY, Data, Features, Reader, Rows


class Index(Reader):
    """tensorstore, a batch by one index array."""

    def __init__(self, path: Path, data: Data) -> None:
        super().__init__(path, data)
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / ARRAY)}}
        self.array: Any = tensorstore.open(spec).result()

    def read(self, rows: Rows) -> Features:
        found: Features = self.array[rows].read().result()
        return found


class Batch(Index):
    """tensorstore, one read an image, sent together as one Batch."""

    def read(self, rows: Rows) -> Features:
        with tensorstore.Batch() as batch:
            futures = [self.array[row].read(batch=batch) for row in rows.tolist()]
        for place, future in enumerate(futures):
            self.out[place] = future.result()
        return self.out[: len(rows)]


class WriteInto(Index):
    """tensorstore, each image written straight into its place of a reused buffer, all at once."""

    def __init__(self, path: Path, data: Data) -> None:
        super().__init__(path, data)
        self.places = [tensorstore.array(place, copy=False, write=True) for place in self.out]

    def read(self, rows: Rows) -> Features:
        writes = [
            place.write(self.array[row])
            for place, row in zip(self.places, rows.tolist(), strict=False)
        ]
        for write in writes:
            write.result()
        return self.out[: len(rows)]


class WriteBatchInto(Index):
    """tensorstore, a batch by one index array, as one Batch, straight into a reused buffer."""

    def __init__(self, path: Path, data: Data) -> None:
        super().__init__(path, data)
        self.place: Any = tensorstore.array(self.out, copy=False, write=True)

    def read(self, rows: Rows) -> Features:
        with tensorstore.Batch() as batch:
            write = self.place[: len(rows)].write(self.array[rows], batch=batch)
        write.result()
        return self.out[: len(rows)]
