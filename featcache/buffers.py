"""Memory that batches are read into, used again and again: fresh pages cost more than the read."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections import deque

import torch
from torch import Tensor

from featcache.codecs import LayerCodec, StoredFeatures

_HUGE_BYTES = 4 << 20


class Buffers:
    """Buffers of one layer's features, within a budget. `take` is not safe for several threads at
    once; `give_back` is, and in a garbage collection too, wherever that comes."""

    def __init__(self, layer: LayerCodec, budget_bytes: int, pin_memory: bool) -> None:
        """budget_bytes: of all that are alive, in use or not; two batches of each stream are always
        granted, one to use and one to read. pin_memory: page-locked, for CUDA; its allocator may
        take up to twice as much."""
        self._layer = layer
        self._budget_bytes = budget_bytes
        self._pin_memory = pin_memory
        self._free: list[StoredFeatures] = []
        self._returned: deque[StoredFeatures] = deque()
        self._in_use_bytes = 0

    @property
    def nbytes(self) -> int:
        """Of all that are alive."""
        waiting = sum(buffer.nbytes for buffer in self._free)
        return self._in_use_bytes + waiting  # those that came back since the last `take` are in use

    def take(self, images: int, must: bool) -> StoredFeatures | None:
        """One of at least so many images; None where the budget is used up, unless it `must`."""
        self._take_back()
        wanted = images * self._layer.image_bytes
        self._budget_bytes = max(self._budget_bytes, 2 * wanted)
        if self._in_use_bytes + wanted > self._budget_bytes and not must:
            return None
        fitting = [buffer for buffer in self._free if len(buffer) >= images]
        if fitting:
            chosen = min(fitting, key=len)
            self._free = [buffer for buffer in self._free if buffer is not chosen]
        else:
            while self._free and self.nbytes + wanted > self._budget_bytes:
                self._free.pop()  # all of them are too small
            chosen = allocate(self._layer, images, self._pin_memory)
        self._in_use_bytes += chosen.nbytes
        return chosen

    def clear(self) -> None:
        """Free what nobody uses. Not safe for several threads at once."""
        self._take_back()
        self._free.clear()

    def give_back(self, buffer: StoredFeatures) -> None:
        """One that was taken, and that nothing reads or writes any more."""
        self._returned.append(buffer)

    def _take_back(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())
            self._in_use_bytes -= self._free[-1].nbytes


def allocate(layer: LayerCodec, images: int, pin_memory: bool = False) -> StoredFeatures:
    """Memory for the stored form of so many images, its content undefined."""
    codes = _empty((images, *layer.code_shape), layer.codec.dtype, pin_memory)
    if not layer.codec.scaled:
        return StoredFeatures(codes, None, layer)
    scales = torch.empty((images, layer.num_patches), dtype=torch.float32, pin_memory=pin_memory)
    return StoredFeatures(codes, scales, layer)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, pin_memory: bool) -> Tensor:
    """`torch.empty`, in huge pages where there is enough of it: to touch fresh memory for the first
    time takes a seventh as long (benchmarks/bench_reader.py)."""
    count = math.prod(shape)
    if pin_memory or count * dtype.itemsize < _HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
    # Private: shared memory has no huge pages, and a forked child would write into it.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
