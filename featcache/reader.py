"""Random rows of stored features -> one reused buffer, by positional reads, ahead of need.

Why this shape: fresh memory per batch costs more than the read (benchmarks/bench_store.py), worker
processes pay for it in every batch, and memory maps read too much when the data exceeds RAM.

Letters: I images of a batch, P patches, D encoder width.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from featcache.errors import CorruptStoreError, StoreError
from featcache.layout import CHUNK_ALIGNMENT_BYTES, MISSING, ShardGeometry

OPEN_FILES_PER_THREAD = 128
MAX_IOVECS = 512  # half of Linux's IOV_MAX; each image may need a second one for the padding


class FeatureReader:
    """Reads batches of rows of one layer.

    `read` returns own memory; `stream` prefetches `depth` batches on `threads` background threads
    into a ring of `depth + 1` buffers, reused by later streams too. RAM: that ring, plus 16 bytes a
    row of mapped index. Use as a context manager, or call `close`. Not usable in a forked child:
    open the store there.
    """

    def __init__(
        self,
        paths: Callable[[int], Path],
        chunks: np.ndarray[Any, Any],
        geometry: ShardGeometry,
        shape: tuple[int, int],
        dtype: torch.dtype,
        threads: int,
        depth: int,
        pin_memory: bool,
    ) -> None:
        """paths: shard number -> file. chunks: uint64[rows, 2] offset and length of each row.
        shape: (P, D). depth: batches read ahead. pin_memory: page-locked buffers, for CUDA."""
        self._paths = paths
        self._chunks = chunks
        self._geometry = geometry
        self._shape = shape
        self._dtype = dtype
        self._depth = depth
        self._pin_memory = pin_memory
        self._threads = threads
        self._pid = os.getpid()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="featcache-read")
        self._local = threading.local()
        self._caches: list[_OpenFiles] = []
        self._free: list[Tensor] = []
        self._padding = memoryview(bytearray(CHUNK_ALIGNMENT_BYTES))

    def read(self, rows: np.ndarray[Any, Any]) -> Tensor:
        """rows: int64[I]. Returns dtype[I, P, D] in the order of `rows`.

        Raises StoreError for a row out of range or without features, CorruptStoreError for a
        shard file that is missing or shorter than its index says.
        """
        buffer = self._buffer(len(rows))
        for future in self._submit(rows, buffer):
            future.result()
        return buffer

    def stream(self, batches: Iterable[np.ndarray[Any, Any]]) -> Iterator[Tensor]:
        """The features of each batch of rows, in order, read ahead in the background.

        Each tensor (dtype[I, P, D]) is a view of a reused buffer: valid until the next iteration.
        Raises as `read` does, at the batch concerned.
        """
        pending: deque[tuple[list[Future[None]], Tensor, int]] = deque()
        source = iter(batches)
        exhausted = False
        try:
            while True:
                while not exhausted and len(pending) < self._depth:
                    rows = next(source, None)
                    if rows is None:
                        exhausted = True
                        break
                    buffer = self._free.pop() if self._free else self._buffer(len(rows))
                    if len(buffer) < len(rows):
                        buffer = self._buffer(len(rows))
                    pending.append((self._submit(rows, buffer[: len(rows)]), buffer, len(rows)))
                if not pending:
                    return
                futures, buffer, count = pending.popleft()
                for future in futures:
                    future.result()
                yield buffer[:count]
                self._free.append(buffer)
        finally:
            # A buffer is free only when nothing writes into it any more.
            running = [f for futures, _, _ in pending for f in futures if not f.cancel()]
            wait(running)
            self._free += [buffer for _, buffer, _ in pending]

    def close(self) -> None:
        """Stop the threads and close every shard file."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for cache in self._caches:
            cache.close()
        self._caches.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _buffer(self, count: int) -> Tensor:
        return torch.empty((count, *self._shape), dtype=self._dtype, pin_memory=self._pin_memory)

    def _submit(self, rows: np.ndarray[Any, Any], buffer: Tensor) -> list[Future[None]]:
        if os.getpid() != self._pid:
            raise StoreError(
                "this feature reader was opened before a fork, where its threads do not exist; "
                "open the store inside the worker process"
            )
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self._chunks)):
            raise StoreError(
                f"row {rows.min() if rows.min() < 0 else rows.max()} is out of range; the store "
                f"has rows 0 to {len(self._chunks) - 1}"
            )
        raw = buffer.view(torch.uint8).numpy().reshape(len(rows), self._geometry.chunk_bytes)
        # Ascending rows are ascending offsets: neighbours become one read.
        order = np.argsort(rows, kind="stable")
        return [
            self._pool.submit(self._gather, rows[part], part, raw)
            for part in np.array_split(order, min(self._threads, max(1, len(rows))))
            if len(part)
        ]

    def _gather(
        self, rows: np.ndarray[Any, Any], places: np.ndarray[Any, Any], raw: np.ndarray[Any, Any]
    ) -> None:
        """Read `rows` (ascending) into raw[places]; runs on a pool thread."""
        files: _OpenFiles | None = getattr(self._local, "files", None)
        if files is None:
            files = self._local.files = _OpenFiles(self._paths)
            self._caches.append(files)
        size, gap = (
            self._geometry.chunk_bytes,
            self._geometry.pitch_bytes - self._geometry.chunk_bytes,
        )
        padding = self._padding[:gap]
        chunks = self._chunks[rows]
        if (chunks[:, 0] == MISSING).any():
            row = int(rows[chunks[:, 0] == MISSING][0])
            raise StoreError(f"row {row} has no features; ask Store.rows which images have")
        offsets = chunks[:, 0].astype(np.int64).tolist()
        shards = (rows // self._geometry.images).tolist()
        positions = places.tolist()
        first = 0
        while first < len(positions):
            # A run: chunks that follow each other in one file, with only padding between.
            shard, start = shards[first], offsets[first]
            views = [raw[positions[first]].data]
            end = start + size
            last = first + 1
            while (
                last < len(positions)
                and shards[last] == shard
                and offsets[last] == end + gap
                and len(views) < MAX_IOVECS
            ):
                if gap:
                    views.append(padding)
                views.append(raw[positions[last]].data)
                end = offsets[last] + size
                last += 1
            if os.preadv(files.descriptor(shard), views, start) != end - start:
                self._read_rest(files.descriptor(shard), views, start, shard)
            first = last

    def _read_rest(self, descriptor: int, views: list[memoryview], at: int, shard: int) -> None:
        """The slow way, after a short read: fill each view, or find that the file ends."""
        for view in views:
            done = 0
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], at + done)
                if count == 0:
                    raise CorruptStoreError(
                        f"{self._paths(shard)} is truncated; rerun `featcache extract` to write "
                        "it again"
                    )
                done += count
            at += len(view)


class _OpenFiles:
    """The descriptors of one thread's most recently used shards."""

    def __init__(self, paths: Callable[[int], Path]) -> None:
        self._paths = paths
        self._open: OrderedDict[int, int] = OrderedDict()

    def descriptor(self, shard: int) -> int:
        """Raises CorruptStoreError where the file cannot be opened."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        try:
            descriptor = os.open(self._paths(shard), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CorruptStoreError(
                f"{self._paths(shard)}: {error.strerror}; if it is gone, rerun `featcache extract` "
                "to write it again"
            ) from None
        self._open[shard] = descriptor
        if len(self._open) > OPEN_FILES_PER_THREAD:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
