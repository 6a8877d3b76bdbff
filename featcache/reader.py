"""Random rows of stored features -> reused buffers, by positional reads, ahead of need.

Why this shape: fresh memory per batch costs more than the read, worker processes pay for it in
every batch, and memory maps read too much when the data exceeds RAM (docs/performance.md has the
figures). The reads are featcache/row_reads.py's, the buffers featcache/buffers.py's.

What is read is what was written: each row's checksum is compared, by default when the reader meets
it for the first time.

Letters: I images of a batch, P patches, D encoder width, C codes of a patch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from featcache.buffers import Buffers, allocate
from featcache.codecs import LayerCodec, StoredFeatures
from featcache.device import num_cores
from featcache.errors import ConfigError, StoreError
from featcache.gather import Pool, open_pool
from featcache.layout import Placement
from featcache.read_mode import ReadMode
from featcache.row_reads import CHECKS, Pending, RowReads
from featcache.transfer import on_device

DEPTH = 8
"""Batches read ahead, as far as the budget allows."""
BUDGET_BYTES = 512 << 20
"""For all batches that are read ahead or in use."""
_DIRECT_THREADS = 8  # that many outstanding reads keep a disk busy; they wait more than they work
_BUFFERED_THREADS = 4


@dataclass(frozen=True, slots=True)
class ReaderOptions:
    """How a reader reads. None of it changes what is read.

    threads: that read; None takes 8 for a disk without page cache, else up to 4 but no more than
        there are cores.
    depth: batches read ahead at most.
    budget_bytes: of the batches read ahead and in use; two batches are always granted.
    pin_memory: page-locked buffers, for asynchronous copies to CUDA.
    check: one of `CHECKS`.
    io: "buffered" (through the page cache), "direct" (O_DIRECT), or "auto": buffered where all
        features of the layer fit into memory.
    native: whether the C code reads; None takes it where it was built.
    """

    threads: int | None = None
    depth: int = DEPTH
    budget_bytes: int = BUDGET_BYTES
    pin_memory: bool = False
    check: str = "once"
    io: str = "auto"
    native: bool | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.check not in CHECKS:
            raise ConfigError(f"check={self.check!r}: must be one of {', '.join(CHECKS)}")
        for name in ("threads", "depth", "budget_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        if self.pin_memory and not torch.cuda.is_available():
            raise ConfigError("pin_memory=True: there is no CUDA device to copy to")


@dataclass(frozen=True, slots=True)
class _Failed:
    """A batch whose rows cannot be read."""

    buffer: StoredFeatures
    error: StoreError

    def cancel(self) -> None:
        """Nothing was begun."""


class FeatureReader:
    """Reads batches of rows of one layer.

    `read` returns own memory; `stream` reads batches ahead in the background into buffers that are
    used again, by later streams too. RAM: `budget_bytes`, 10 bytes a row (9 of them mapped from
    the index), and with O_DIRECT a row per thread. May be used by several threads. After a fork,
    and where it is pickled, the other process reads with threads and files of its own. Use as a
    context manager, or call `close`.
    """

    def __init__(
        self,
        codes: Placement,
        scales: Placement | None,
        layer: LayerCodec,
        status: np.ndarray[Any, Any],
        checksums: np.ndarray[Any, Any],
        mode: ReadMode,
        options: ReaderOptions,
        again: Callable[[], FeatureReader],
        through: Callable[[Pool], Pool] | None = None,
    ) -> None:
        """codes, scales: where the rows lie. status: uint8[rows]; only OK rows can be read.
        checksums: uint64[rows] of codes and then scales. mode: what `options.io` came to.
        again: opens an equal reader, in another process. through: what stands between the threads
        that read files and the bucket that the rows lie in.
        """
        self.mode = mode
        self.options = options
        at_most = _DIRECT_THREADS if mode.direct else min(_BUFFERED_THREADS, num_cores())
        self.threads = threads = options.threads or at_most
        self._layer = layer
        self._again = again
        self._buffers = Buffers(layer, options.budget_bytes, options.pin_memory)
        placements = [where for where in (codes, scales) if where]
        row_bytes = sum(where.row_bytes for where in placements)

        def new_pool() -> Pool:
            pool = open_pool(
                threads, row_bytes, direct=mode.direct, keep=mode.fits, native=options.native
            )
            return pool if through is None else through(pool)

        self._reads = RowReads(placements, status, checksums, options.check, new_pool)

    def read(self, rows: np.ndarray[Any, Any], dtype: torch.dtype | None = None) -> Tensor:
        """rows: int64[I]. Returns dtype[I, P, D] in the order of `rows`; the stored dtype of an
        unscaled codec, else float32, where `dtype` is None.

        Raises StoreError for a row out of range or without features, and where no more files can
        be opened; CorruptStoreError for a shard file that is missing, too short, or holds other
        bytes than were written.
        """
        return self.read_stored(rows).decode(dtype)

    def read_stored(self, rows: np.ndarray[Any, Any]) -> StoredFeatures:
        """`read`, as it lies in the store."""
        return self.begin(rows).result()

    def begin(self, rows: np.ndarray[Any, Any]) -> Reading:
        """Begin `read_stored` in the background. Raises StoreError for wrong rows."""
        buffer = allocate(self._layer, len(rows), self.options.pin_memory)
        return Reading(self, self._reads.submit(rows, buffer))

    def stream(
        self, batches: Iterable[np.ndarray[Any, Any]], device: torch.device | None = None
    ) -> Generator[StoredFeatures, None, None]:
        """The features of each batch of rows, in order, read ahead in the background.

        Each is valid until the next iteration: it may be a view of a reused buffer.
        device: where they are wanted; to CUDA they are copied one batch ahead, on a stream of its
        own. None leaves them in the buffer.

        Raises as `read` does, at the batch concerned.
        """
        return on_device(self._stream(batches), device)

    def _stream(
        self, batches: Iterable[np.ndarray[Any, Any]]
    ) -> Generator[StoredFeatures, None, None]:
        pending: deque[Pending | _Failed] = deque()
        source = iter(batches)
        rows: np.ndarray[Any, Any] | None = None  # asked for, but without a buffer yet
        exhausted = False
        try:
            while True:
                while not exhausted and len(pending) <= self.options.depth:
                    if rows is None:
                        rows = next(source, None)
                    if rows is None:
                        exhausted = True
                        break
                    must = len(pending) < 2
                    buffer = None
                    if must or self._reads.may_open_more(len(rows)):
                        with self._reads.lock:
                            buffer = self._buffers.take(len(rows), must)
                    if buffer is None:
                        break
                    try:
                        pending.append(self._reads.submit(rows, buffer))
                    except StoreError as error:  # told when its turn comes
                        pending.append(_Failed(buffer, error))
                        exhausted = True
                    except BaseException:
                        self._buffers.give_back(buffer)
                        raise
                    rows = None
                if not pending:
                    return
                batch = pending[0]
                if isinstance(batch, _Failed):
                    raise batch.error
                self._reads.finish(batch)
                yield batch.buffer[: len(batch.rows)]
                self._buffers.give_back(pending.popleft().buffer)
        finally:
            for batch in pending:
                batch.cancel()
                self._buffers.give_back(batch.buffer)

    def close(self) -> None:
        """Stop the threads and close every shard file; what is being read is given up."""
        self._reads.close()
        with self._reads.lock:
            self._buffers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[], FeatureReader], tuple[()]]:
        return self._again, ()


@dataclass(frozen=True, slots=True)
class Reading:
    """A batch that `FeatureReader.begin` began."""

    _reader: FeatureReader
    _batch: Pending

    def result(self) -> StoredFeatures:
        """Wait for it. Raises as `FeatureReader.read` does."""
        self._reader._reads.finish(self._batch)
        return self._batch.buffer
