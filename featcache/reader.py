"""Random rows of stored features -> reused buffers, by positional reads, ahead of need.

Why this shape: fresh memory per batch costs more than the read, worker processes pay for it in
every batch, and memory maps read too much when the data exceeds RAM (docs/performance.md has the
figures). The reads are featcache/gather.py's, the buffers featcache/buffers.py's.

What is read is what was written: each row's checksum is compared, by default when the reader meets
it for the first time.

Letters: I images of a batch, P patches, D encoder width, C codes of a patch.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import xxhash
from torch import Tensor

from featcache.buffers import Buffers, allocate
from featcache.codecs import LayerCodec, StoredFeatures
from featcache.errors import ConfigError, CorruptStoreError, StoreError
from featcache.gather import Job, Outcome, Part, Pool, Result, open_pool
from featcache.layout import Placement, Status
from featcache.open_files import OpenFile, OpenFiles
from featcache.read_mode import ReadMode
from featcache.transfer import on_device

CHECKS = ("once", "always", "never")
"""When a row's checksum is compared: the first time a reader reads it, every time, or never."""
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


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Pending:
    """A batch under way. rows: ascending; places: where each goes in the buffer.

    compare: bool[I], whose checksums are compared with what is read; None: nobody's.
    opening: (array, number) of the job's files. held: the open ones.
    renewals: of the reader, when it was submitted. job: None for a batch without rows.
    """

    buffer: StoredFeatures
    rows: np.ndarray[Any, Any]
    places: np.ndarray[Any, Any]
    compare: np.ndarray[Any, Any] | None
    opening: list[tuple[int, int]]
    held: list[OpenFile]
    renewals: int
    job: Job | None

    def cancel(self) -> None:
        """Nothing writes into the buffer any more when this returns."""
        if self.job is not None:
            self.job.cancel()


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
    ) -> None:
        """codes, scales: where the rows lie. status: uint8[rows]; only OK rows can be read.
        checksums: uint64[rows] of codes and then scales. mode: what `options.io` came to.
        again: opens an equal reader, in another process.
        """
        self.mode = mode
        self.options = options
        self._layer = layer
        self._status = status
        self._checksums = checksums
        self._again = again
        self._files = [OpenFiles(where, len(status)) for where in (codes, scales) if where]
        self._checked = np.zeros(len(status), np.bool_)
        self._renewals = 0  # how often a file was opened that was another one before
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._under_way: weakref.WeakSet[_Pending] = weakref.WeakSet()
        self._buffers = Buffers(layer, options.budget_bytes, options.pin_memory)
        self._closed = False
        self._pool = self._open_pool()

    @property
    def threads(self) -> int:
        """That read."""
        if self.options.threads is not None:
            return self.options.threads
        return _DIRECT_THREADS if self.mode.direct else min(_BUFFERED_THREADS, os.cpu_count() or 1)

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
        return Reading(self, self._submit(rows, buffer))

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
        pending: deque[_Pending | _Failed] = deque()
        source = iter(batches)
        rows: np.ndarray[Any, Any] | None = None  # asked for, but without a buffer yet
        exhausted = False
        try:
            while True:
                while not exhausted and len(pending) < self.options.depth:
                    if rows is None:
                        rows = next(source, None)
                    if rows is None:
                        exhausted = True
                        break
                    with self._lock:
                        buffer = self._buffers.take(len(rows), must=len(pending) < 2)
                    if buffer is None:
                        break
                    try:
                        pending.append(self._submit(rows, buffer))
                    except StoreError as error:  # told when its turn comes
                        pending.append(_Failed(buffer, error))
                        exhausted = True
                    rows = None
                if not pending:
                    return
                batch = pending[0]
                if isinstance(batch, _Failed):
                    raise batch.error
                self._finish(batch)
                yield batch.buffer[: len(batch.rows)]
                self._buffers.give_back(pending.popleft().buffer)
        finally:
            for batch in pending:
                batch.cancel()
                self._buffers.give_back(batch.buffer)

    def close(self) -> None:
        """Stop the threads and close every shard file; what is being read is given up."""
        self._closed = True
        if os.getpid() == self._pid:
            self._pool.close()
        else:
            self._lock = threading.Lock()  # a forked child's own: who held the other is not there
        with self._lock:
            for files in self._files:
                files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[], FeatureReader], tuple[()]]:
        return self._again, ()

    def _open_pool(self) -> Pool:
        row_bytes = sum(files.where.row_bytes for files in self._files)
        mode, native = self.mode, self.options.native
        return open_pool(self.threads, row_bytes, direct=mode.direct, keep=mode.fits, native=native)

    def _submit(self, rows: np.ndarray[Any, Any], buffer: StoredFeatures) -> _Pending:
        if self._closed:
            raise StoreError("this feature reader is closed; ask the store for another one")
        if os.getpid() != self._pid:
            # A forked child has neither the threads nor, perhaps, a lock that will ever open.
            self._pid, self._lock, self._pool = os.getpid(), threading.Lock(), self._open_pool()
            self._under_way = weakref.WeakSet()
        rows = np.asarray(rows)
        if rows.ndim != 1 or (len(rows) and rows.dtype.kind not in "iu"):
            raise StoreError(
                f"rows must be a one-dimensional array of integers, not {rows.dtype}{rows.shape}"
            )
        rows = rows.astype(np.int64, copy=False)
        self._require_readable(rows)
        # Ascending rows are ascending offsets: neighbours become one read.
        places = np.argsort(rows, kind="stable")
        rows = rows[places]
        with self._lock:
            batch = _Pending(buffer, rows, places, self._unchecked(rows), [], [], 0, None)
            self._start(batch)
            self._under_way.add(batch)
        return batch

    def _require_readable(self, rows: np.ndarray[Any, Any]) -> None:
        if not len(rows):
            return
        if rows.min() < 0 or rows.max() >= len(self._status):
            raise StoreError(
                f"row {rows.min() if rows.min() < 0 else rows.max()} is out of range; the store "
                f"had rows 0 to {len(self._status) - 1} when it was opened: if it has grown since, "
                "open it again"
            )
        without = rows[self._status[rows] != Status.OK]
        if len(without):
            raise StoreError(f"row {without[0]} has no features; ask Store.rows which images have")

    def _unchecked(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        if self.options.check == "never":
            return None
        compare = ~self._checked[rows]
        return compare if compare.any() else None

    def _start(self, batch: _Pending) -> None:
        """Hand the batch's job in. Needs the lock."""
        batch.renewals = self._renewals
        batch.opening, batch.held = [], []
        if not len(batch.rows):
            return
        files: list[int | bytes] = []
        parts = []
        stored = (batch.buffer.codes, batch.buffer.scales)
        for array, (open_files, values) in enumerate(zip(self._files, stored, strict=False)):
            assert values is not None
            where = open_files.where
            numbers, file_of = np.unique(batch.rows // where.rows_per_file, return_inverse=True)
            first = len(files)
            for number in numbers.tolist():
                file = open_files.get(number)
                batch.opening.append((array, number))
                if file is None:
                    files.append(os.fsencode(open_files.path(number)))
                else:
                    files.append(file.descriptor)
                    batch.held.append(file)
            offsets = batch.rows % where.rows_per_file * where.pitch_bytes + where.start_bytes
            parts.append(
                Part(
                    _as_bytes(values[: len(batch.rows)]),
                    where.row_bytes,
                    where.pitch_bytes - where.row_bytes,
                    (file_of + first).astype(np.int32),
                    offsets,
                    batch.places,
                )
            )
        checksums = None if batch.compare is None else self._checksums[batch.rows]
        batch.job = self._pool.submit(
            len(batch.rows), files, tuple(parts), checksums, batch.compare
        )

    def _finish(self, batch: _Pending) -> None:
        """Wait for the batch and believe it. Raises as `read` says."""
        if batch.job is None:
            return
        result = Result(*batch.job.wait())
        self._adopt(batch)
        if result.error in (errno.EMFILE, errno.ENFILE):
            result = self._with_fewer_files(batch)
        with self._lock:
            self._under_way.discard(batch)
            # `featcache gc` may have dropped a row that a run wants which opened the store before
            # its image changed: what was compared was perhaps the file of before.
            doubtful = self._renewals != batch.renewals
        if result.outcome != Outcome.DONE:
            raise self._failure(batch, result)
        if self.options.check == "never":
            return
        if doubtful:
            for row in range(len(batch.rows)):
                if batch.compare is None or not batch.compare[row]:
                    self._compare(batch, row)
        elif batch.compare is not None and self.options.check == "once":
            with self._lock:
                if self._renewals == batch.renewals:
                    self._checked[batch.rows] = True

    def _adopt(self, batch: _Pending) -> None:
        """Keep the files that an ended job opened, and let go of those it needed."""
        assert batch.job is not None
        with self._lock:
            batch.held = []
            for file, descriptor, inode, modified_ns in batch.job.take_opened():
                array, number = batch.opening[file]
                files, opened = self._files[array], OpenFile(descriptor)
                if files.add(number, opened, inode, modified_ns):
                    where = files.where
                    first = number * where.rows_per_file
                    self._checked[first : first + where.rows_per_file] = False
                    self._renewals += 1

    def _with_fewer_files(self, batch: _Pending) -> Result:
        """Once more, after closing what can be closed."""
        for other in list(self._under_way):
            if other is not batch and other.job is not None:
                other.job.wait()
                self._adopt(other)
        with self._lock:
            for files in self._files:
                files.shrink()
            renewals = batch.renewals
            self._start(batch)
            batch.renewals = renewals
            job = batch.job
        assert job is not None
        result = Result(*job.wait())
        self._adopt(batch)
        return result

    def _compare(self, batch: _Pending, row: int) -> None:
        """Compare a row that was read with its checksum. Raises CorruptStoreError."""
        place = int(batch.places[row])
        checksum = xxhash.xxh3_64(_as_bytes(batch.buffer.codes)[place].data)
        if batch.buffer.scales is not None:
            checksum.update(_as_bytes(batch.buffer.scales)[place].data)
        if checksum.intdigest() != self._checksums[batch.rows[row]]:
            raise self._failure(batch, Result(Outcome.OTHER_BYTES, 0, row, 0))

    def _failure(self, batch: _Pending, result: Result) -> StoreError:
        row = int(batch.rows[result.row])
        where = self._files[result.part].where
        path, why = where.paths(row // where.rows_per_file), os.strerror(result.error)
        match result.outcome:
            case Outcome.OTHER_BYTES:
                return CorruptStoreError(
                    f"{path}: the features of row {row} are not the bytes that were written; "
                    f"{where.cure}"
                )
            case Outcome.TRUNCATED:
                return CorruptStoreError(f"{path} is truncated; {where.cure}")
            case _ if result.error == errno.ECANCELED:
                return StoreError(
                    "this feature reader was closed, or its process was forked, while it read; "
                    "begin anew"
                )
            case _ if result.error in (errno.EMFILE, errno.ENFILE):
                return StoreError(
                    f"{path}: {why}, although the reader has closed its own; raise the limit "
                    "(`ulimit -n`), or close files of this process"
                )
            case Outcome.CANNOT_OPEN:
                return CorruptStoreError(f"{path}: {why}; if it is gone, {where.cure}")
            case _:
                return CorruptStoreError(f"{path}: {why}; {where.cure}")


@dataclass(frozen=True, slots=True)
class Reading:
    """A batch that `FeatureReader.begin` began."""

    _reader: FeatureReader
    _batch: _Pending

    def result(self) -> StoredFeatures:
        """Wait for it. Raises as `FeatureReader.read` does."""
        self._reader._finish(self._batch)
        return self._batch.buffer


def _as_bytes(values: Tensor) -> np.ndarray[Any, Any]:
    """uint8[I, bytes of one], the tensor's own memory."""
    row_bytes = values[0].numel() * values.itemsize if len(values) else 0
    return values.view(torch.uint8).numpy().reshape(len(values), row_bytes)
