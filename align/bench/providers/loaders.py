"""torch's DataLoader with two persistent worker processes, over featcache's own store."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from align.bench.providers.base import ARRAY, BATCH_IMAGES, STORE, Data, Features, Reader, Rows
from featcache.store import Store

WORKERS = 2
PREFETCH = 2  # batches asked of each worker before they are needed; torch's default


class Loader(Reader):
    """A DataLoader whose batches are given anew for each pass."""

    def __init__(self, path: Path, data: Data) -> None:
        self.data = data
        self.sampler: list[Any] = []
        self.loader: DataLoader[Any] = DataLoader(
            self.dataset(path, data),
            batch_sampler=self.sampler,
            num_workers=WORKERS,
            prefetch_factor=PREFETCH,
            persistent_workers=True,
            # Linux's default up to Python 3.13; a spawned process would hand on its own.
            multiprocessing_context="fork",
            collate_fn=self.collate(),
        )

    def dataset(self, path: Path, data: Data) -> Dataset[Any]:
        raise NotImplementedError

    def collate(self) -> Any:
        """None: torch's own."""
        return None

    def batches(self, batches: Sequence[Rows]) -> Iterator[Features]:
        self.sampler[:] = [rows.tolist() for rows in batches]
        for batch in self.loader:
            yield batch.numpy()

    def close(self) -> None:
        # The workers of a persistent loader live as long as its iterator.
        del self.loader


class ZarrImages(Dataset[Any]):
    """One image an item, by zarr-python. Opened in the worker: zarr-python's thread survives no
    fork."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.array: Any = None

    def __getitem__(self, row: int) -> torch.Tensor:
        if self.array is None:
            import zarr

            self.array = zarr.open_array(self.path / ARRAY, mode="r")
        return torch.from_numpy(self.array[row])


class ZarrLoader(Loader):
    """The usual recipe: an item is `array[i]`, the default collate makes the batch."""

    def dataset(self, path: Path, data: Data) -> Dataset[Any]:
        return ZarrImages(path)


class Pread(Dataset[Any]):
    """Rows by `os.preadv` at known offsets of the shard files."""

    def __init__(self, path: Path, data: Data) -> None:
        store = Store(path / STORE)
        self.image_shape = data.image_shape
        self.codes, _ = store.placements(store.layers[0])
        self.descriptors: dict[int, int] = {}

    def read(self, rows: Sequence[int], memory: torch.Tensor) -> None:
        """Into memory: float16[at least len(rows), P, D]."""
        raw = memory.numpy().reshape(len(memory), -1).view(np.uint8)
        for place, row in enumerate(rows):
            shard = row // self.codes.rows_per_file
            if shard not in self.descriptors:
                self.descriptors[shard] = os.open(str(self.codes.paths(shard)), os.O_RDONLY)
            os.preadv(self.descriptors[shard], [raw[place].data], self.codes.offset(row))


class PreadBatches(Pread):
    """An item is a whole batch, in a tensor of its own."""

    def __getitems__(self, rows: list[int]) -> torch.Tensor:
        memory = torch.empty((len(rows), *self.image_shape), dtype=torch.float16)
        self.read(rows, memory)
        return memory


class PreadSlots(Pread):
    """An item is a whole batch, in a slot of memory that all processes share: (slot, row) of each
    image are asked for, the slot's number and the count of images come back.

    slots: float16[slots, I, P, D].
    """

    def __init__(self, path: Path, data: Data, slots: torch.Tensor) -> None:
        super().__init__(path, data)
        self.slots = slots

    def __getitems__(self, items: list[tuple[int, int]]) -> tuple[int, int]:
        self.read([row for _, row in items], self.slots[items[0][0]])
        return items[0][0], len(items)


def as_it_is(batch: Any) -> Any:
    return batch


class PreadLoader(Loader):
    """What knows where rows lie, and otherwise leaves all to the DataLoader: it moves each batch to
    the main process as shared memory."""

    def dataset(self, path: Path, data: Data) -> Dataset[Any]:
        return PreadBatches(path, data)

    def collate(self) -> Any:
        return as_it_is


class SlotLoader(Loader):
    """The same without fresh memory: only processes and queues are left of the DataLoader."""

    def dataset(self, path: Path, data: Data) -> Dataset[Any]:
        # One more than can be asked for while one is being used.
        count = WORKERS * PREFETCH + 2
        self.slots = torch.empty((count, BATCH_IMAGES, *data.image_shape), dtype=torch.float16)
        self.slots.share_memory_()
        return PreadSlots(path, data, self.slots)

    def collate(self) -> Any:
        return as_it_is

    def batches(self, batches: Sequence[Rows]) -> Iterator[Features]:
        self.sampler[:] = [
            [(number % len(self.slots), row) for row in rows.tolist()]
            for number, rows in enumerate(batches)
        ]
        for slot, count in self.loader:
            yield self.slots[slot, :count].numpy()
