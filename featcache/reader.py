"""Random rows of stored features -> one reused buffer, by positional reads, ahead of need.

Why this shape: fresh memory per batch costs more than the read (benchmarks/bench_store.py), worker
processes pay for it in every batch, and memory maps read too much when the data exceeds RAM.

What is read is what was written: each row's checksum is compared, by default when the reader meets
it for the first time.

Letters: I images of a batch, P patches, D encoder width, C codes of a patch.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import xxhash
from torch import Tensor

from featcache.codecs import LayerCodec, StoredFeatures
from featcache.errors import ConfigError, CorruptStoreError, StoreError
from featcache.layout import CHUNK_ALIGNMENT_BYTES, Placement, Status

OPEN_FILES_PER_THREAD = 128
MAX_IOVECS = 512  # half of Linux's IOV_MAX; each image may need a second one for the padding
CHECKS = ("once", "always", "never")
"""When a row's checksum is compared: the first time a reader reads it, every time, or never."""


class FeatureReader:
    """Reads batches of rows of one layer.

    `read` returns own memory; `stream` prefetches `depth` batches on `threads` background threads
    into a ring of `depth + 1` buffers, reused by later streams too. RAM: that ring, plus 9 bytes a
    row of mapped index and 1 of what was checked. Use as a context manager, or call `close`. Not
    usable in a forked child: open the store there.
    """

    def __init__(
        self,
        codes: Placement,
        scales: Placement | None,
        layer: LayerCodec,
        status: np.ndarray[Any, Any],
        checksums: np.ndarray[Any, Any],
        *,
        threads: int,
        depth: int,
        pin_memory: bool,
        check: str,
    ) -> None:
        """codes, scales: where the rows lie. status: uint8[rows]; only OK rows can be read.
        checksums: uint64[rows] of codes and then scales. depth: batches read ahead. pin_memory:
        page-locked buffers, for CUDA. check: one of `CHECKS`.

        Raises ConfigError for another `check`.
        """
        if check not in CHECKS:
            raise ConfigError(f"check={check!r}: must be one of {', '.join(CHECKS)}")
        self._codes = codes
        self._scales = scales
        self._layer = layer
        self._status = status
        self._checksums = checksums
        self._check = check
        self._checked = np.zeros(len(status), np.bool_)
        self._forgotten = 0  # of `_KnownFiles.replaced`, when `_checked` was last cleared
        self._depth = depth
        self._pin_memory = pin_memory
        self._threads = threads
        self._pid = os.getpid()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="featcache-read")
        self._local = threading.local()
        self._files = _KnownFiles()
        self._caches: list[_OpenFiles] = []
        self._free: list[StoredFeatures] = []
        self._padding = memoryview(bytearray(CHUNK_ALIGNMENT_BYTES))

    def read(self, rows: np.ndarray[Any, Any], dtype: torch.dtype | None = None) -> Tensor:
        """rows: int64[I]. Returns dtype[I, P, D] in the order of `rows`; the stored dtype of an
        unscaled codec, else float32, where `dtype` is None.

        Raises StoreError for a row out of range or without features, CorruptStoreError for a
        shard file that is missing, too short, or holds other bytes than were written.
        """
        return self.read_stored(rows).decode(dtype)

    def read_stored(self, rows: np.ndarray[Any, Any]) -> StoredFeatures:
        """`read`, as it lies in the store."""
        buffer = self._buffer(len(rows))
        for future in self._submit(rows, buffer):
            future.result()
        return buffer

    def stream(self, batches: Iterable[np.ndarray[Any, Any]]) -> Iterator[StoredFeatures]:
        """The features of each batch of rows, in order, read ahead in the background.

        Each is a view of a reused buffer: valid until the next iteration.
        Raises as `read` does, at the batch concerned.
        """
        pending: deque[tuple[list[Future[None]], StoredFeatures, int]] = deque()
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

    def _buffer(self, count: int) -> StoredFeatures:
        dtype = self._layer.codec.dtype
        codes = torch.empty(
            (count, *self._layer.code_shape), dtype=dtype, pin_memory=self._pin_memory
        )
        if self._scales is None:
            return StoredFeatures(codes, None, self._layer)
        shape = (count, self._layer.num_patches)
        scales = torch.empty(shape, dtype=torch.float32, pin_memory=self._pin_memory)
        return StoredFeatures(codes, scales, self._layer)

    def _submit(self, rows: np.ndarray[Any, Any], buffer: StoredFeatures) -> list[Future[None]]:
        if os.getpid() != self._pid:
            raise StoreError(
                "this feature reader was opened before a fork, where its threads do not exist; "
                "open the store inside the worker process"
            )
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self._status)):
            raise StoreError(
                f"row {rows.min() if rows.min() < 0 else rows.max()} is out of range; the store "
                f"has rows 0 to {len(self._status) - 1}"
            )
        without = rows[self._status[rows] != Status.OK]
        if len(without):
            raise StoreError(f"row {without[0]} has no features; ask Store.rows which images have")
        codes = _as_bytes(buffer.codes)
        scales = None if buffer.scales is None else _as_bytes(buffer.scales)
        # Ascending rows are ascending offsets: neighbours become one read.
        order = np.argsort(rows, kind="stable")
        return [
            self._pool.submit(self._read_part, rows[part], part, codes, scales)
            for part in np.array_split(order, min(self._threads, max(1, len(rows))))
            if len(part)
        ]

    def _read_part(
        self,
        rows: np.ndarray[Any, Any],
        places: np.ndarray[Any, Any],
        codes: np.ndarray[Any, Any],
        scales: np.ndarray[Any, Any] | None,
    ) -> None:
        """Read and check `rows` (ascending) into codes[places] and scales[places]."""
        files: _OpenFiles | None = getattr(self._local, "files", None)
        if files is None:
            files = self._local.files = _OpenFiles(self._files)
            self._caches.append(files)
        files.renew()
        self._gather(files, self._codes, rows, places, codes)
        if self._scales is not None and scales is not None:
            self._gather(files, self._scales, rows, places, scales)
        if self._check == "never":
            return
        replaced = files.seen_replaced
        if self._check == "once":
            with self._files.lock:
                if self._files.replaced != self._forgotten:
                    # `featcache gc` may have dropped a row that a run wants which opened the store
                    # before its image changed. What was checked was the old file.
                    self._checked[:] = False
                    self._forgotten = self._files.replaced
            new = ~self._checked[rows]
            rows, places = rows[new], places[new]
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            checksum = xxhash.xxh3_64(codes[place].data)
            if scales is not None:
                checksum.update(scales[place].data)
            if checksum.intdigest() != self._checksums[row]:
                path = self._codes.paths(row // self._codes.rows_per_file)
                raise CorruptStoreError(
                    f"{path}: the features of row {row} are not the bytes that were written; "
                    f"{self._codes.cure}"
                )
        with self._files.lock:
            # Where a thread has met a newer file since, this was perhaps read from the old one.
            if self._files.replaced == self._forgotten == replaced:
                self._checked[rows] = True

    def _gather(
        self,
        files: _OpenFiles,
        where: Placement,
        rows: np.ndarray[Any, Any],
        places: np.ndarray[Any, Any],
        raw: np.ndarray[Any, Any],
    ) -> None:
        """Read `rows` (ascending) of one array into raw[places]."""
        size, gap = where.row_bytes, where.pitch_bytes - where.row_bytes
        padding = self._padding[:gap]
        offsets = (rows % where.rows_per_file * where.pitch_bytes + where.start_bytes).tolist()
        shards = (rows // where.rows_per_file).tolist()
        positions = places.tolist()
        first = 0
        while first < len(positions):
            # A run: rows that follow each other in one file, with only padding between.
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
            path = where.paths(shard)
            if os.preadv(files.descriptor(path, where.cure), views, start) != end - start:
                _read_rest(files.descriptor(path, where.cure), views, start, path, where.cure)
            first = last


def _as_bytes(values: Tensor) -> np.ndarray[Any, Any]:
    """uint8[I, bytes of one], the tensor's own memory."""
    row_bytes = values[0].numel() * values.itemsize if len(values) else 0
    return values.view(torch.uint8).numpy().reshape(len(values), row_bytes)


def _read_rest(descriptor: int, views: list[memoryview], at: int, path: Path, cure: str) -> None:
    """The slow way, after a short read: fill each view, or find that the file ends."""
    for view in views:
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], at + done)
            if count == 0:
                raise CorruptStoreError(f"{path} is truncated; {cure}")
            done += count
        at += len(view)


class _KnownFiles:
    """What a reader's threads know together of its files.

    replaced: how often a file was opened that was another one before. lock: for it, and for what
    follows from it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.replaced = 0
        self._identities: dict[Path, tuple[int, int]] = {}

    def note(self, path: Path, status: os.stat_result) -> None:
        """A file that was opened."""
        identity = (status.st_ino, status.st_mtime_ns)
        with self.lock:
            if self._identities.setdefault(path, identity) != identity:
                self._identities[path] = identity
                self.replaced += 1


class _OpenFiles:
    """The descriptors of one thread's most recently used shard files.

    seen_replaced: `_KnownFiles.replaced` when `renew` was last called.
    """

    def __init__(self, known: _KnownFiles) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._known = known
        self.seen_replaced = 0

    def renew(self) -> None:
        """Let go of files that another thread may have found replaced."""
        if self.seen_replaced != self._known.replaced:
            self.seen_replaced = self._known.replaced
            self.close()

    def descriptor(self, path: Path, cure: str) -> int:
        """Raises CorruptStoreError where the file cannot be opened."""
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CorruptStoreError(f"{path}: {error.strerror}; if it is gone, {cure}") from None
        self._known.note(path, os.fstat(descriptor))
        self._open[path] = descriptor
        if len(self._open) > OPEN_FILES_PER_THREAD:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
