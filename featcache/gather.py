"""A batch of rows out of files into memory, on background threads.

In C where that was built (featcache/_gather.c): a batch is then one hand-over, and nothing of it
waits for Python's lock. The same in Python elsewhere: equal results, but a thread that computes in
Python holds it up (docs/performance.md).
"""

from __future__ import annotations

import enum
import errno
import itertools
import mmap
import os
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import xxhash

from featcache.errors import ConfigError

try:
    from featcache import _gather
except ImportError:  # there was no compiler when it was installed
    _gather = None  # type: ignore[assignment]

DIRECT_BYTES = 4096
"""O_DIRECT's unit of offset, length and address."""
SHORTEST_NATIVE_BYTES = 241
"""Shorter rows have another checksum, which only xxhash computes: they are read in Python."""
_MAX_IOVECS = 512  # half of Linux's IOV_MAX; each row may need a second one for the padding
_RUN_BYTES = 1 << 20  # neighbours are read together up to here


class Outcome(enum.IntEnum):
    """What became of a job; numbered as in _gather.c."""

    DONE = 0
    CANNOT_OPEN = 1
    CANNOT_READ = 2
    TRUNCATED = 3
    OTHER_BYTES = 4


class Result(NamedTuple):
    """outcome: of the job's first failure, or DONE. error: its errno. row, part: where."""

    outcome: int
    error: int
    row: int
    part: int


class Part(NamedTuple):
    """Where rows of one array lie, and where they go: row k at offsets[k] of file file_of[k], to
    memory[places[k]].

    memory: uint8[at least rows, size]. size: bytes of a row. gap: between neighbours in a file.
    file_of: int32[rows], into the job's files. offsets, places: int64[rows].
    """

    memory: np.ndarray[Any, Any]
    size: int
    gap: int
    file_of: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]
    places: np.ndarray[Any, Any]


class Job(Protocol):
    """A batch that is being read."""

    def wait(self) -> tuple[int, int, int, int]:
        """Until no thread touches it any more. Returns a `Result`."""

    def cancel(self) -> None:
        """Skip what nobody has begun, and wait for the rest."""

    def take_opened(self) -> list[tuple[int, int, int, int]]:
        """(file, descriptor, inode, modified in ns) of what it opened, the caller's to close."""


class Pool(Protocol):
    """Threads that read."""

    def submit(
        self,
        rows: int,
        files: list[int | bytes],
        parts: tuple[Part, ...],
        checksums: np.ndarray[Any, Any] | None,
        compare: np.ndarray[Any, Any] | None,
        /,
    ) -> Job:
        """files: a descriptor, or the path of a file to open. parts: one for each array.
        checksums: uint64[rows], of a row in all parts, compared where bool[rows] `compare` says."""

    def close(self) -> None:
        """End the threads; what they have not begun is skipped."""


def open_pool(
    threads: int, row_bytes: int, *, direct: bool, keep: bool, native: bool | None
) -> Pool:
    """direct: read with O_DIRECT. keep: the page cache has room for all that may be read; what is
    read then goes there in a form that is fast to read again. native: whether in C; None takes it
    where it can be had.

    Raises ConfigError where it must be C and cannot, or for more threads than can be had.
    """
    if native is None:
        native = _gather is not None and row_bytes >= SHORTEST_NATIVE_BYTES
    if not native:
        return PythonPool(threads, direct, keep)
    if _gather is None:
        raise ConfigError(
            "native=True: featcache._gather was not built; install featcache again where a C "
            "compiler and Python's headers are"
        )
    if row_bytes < SHORTEST_NATIVE_BYTES:
        raise ConfigError(
            f"native=True: rows of {row_bytes} bytes are read in Python; native=None does so"
        )
    try:
        pool: Pool = _gather.Pool(threads, direct, keep)
    except OSError as error:
        raise ConfigError(f"threads={threads}: {error.strerror}; take fewer") from None
    return pool


class PythonPool:
    """`Pool` without C: every read and every checksum takes Python's lock once. So a row is one
    read, also where the page cache will keep it."""

    def __init__(self, threads: int, direct: bool, keep: bool) -> None:
        self._threads = threads
        self._direct = direct
        self._keep = keep
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="featcache-read")

    def submit(
        self,
        rows: int,
        files: list[int | bytes],
        parts: tuple[Part, ...],
        checksums: np.ndarray[Any, Any] | None,
        compare: np.ndarray[Any, Any] | None,
    ) -> PythonJob:
        job = PythonJob(files, parts, checksums, compare, self._direct, self._keep)
        bounds = np.linspace(0, rows, min(self._threads, rows) + 1).astype(int).tolist()
        job.futures = [
            self._executor.submit(job.read, first, last)
            for first, last in itertools.pairwise(bounds)
        ]
        return job

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


class _ReadError(Exception):
    def __init__(self, result: Result) -> None:
        self.result = result


@dataclass(slots=True)
class PythonJob:
    """See `Pool.submit`."""

    files: list[int | bytes]
    parts: Sequence[Part]
    checksums: np.ndarray[Any, Any] | None
    compare: np.ndarray[Any, Any] | None
    direct: bool
    keep: bool
    futures: list[Future[None]] = field(default_factory=list)
    _opened: list[tuple[int, int, int, int]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _pid: int = field(default_factory=os.getpid)

    def wait(self) -> Result:
        if os.getpid() != self._pid and not all(future.done() for future in self.futures):
            return Result(Outcome.CANNOT_READ, errno.ECANCELED, 0, 0)  # the threads are not here
        result = Result(Outcome.DONE, 0, 0, 0)
        for future in self.futures:  # all of them: until then memory is written to
            try:
                future.result()
            except _ReadError as failed:
                result = result if result.outcome else failed.result
            except CancelledError:
                result = Result(Outcome.CANNOT_READ, errno.ECANCELED, 0, 0)
        return result

    def cancel(self) -> None:
        if os.getpid() != self._pid:
            return
        wait([future for future in self.futures if not future.cancel()])

    def take_opened(self) -> list[tuple[int, int, int, int]]:
        opened, self._opened = self._opened, []
        return opened

    def __del__(self) -> None:
        self.cancel()
        for _, descriptor, _, _ in self._opened:
            os.close(descriptor)

    def read(self, first: int, last: int) -> None:
        """Rows [first, last). Raises _ReadError."""
        for index, part in enumerate(self.parts):
            self._read_part(index, part, first, last)
        for row in range(first, last):
            if self.checksums is None or self.compare is None or not self.compare[row]:
                continue
            checksum = xxhash.xxh3_64()
            for part in self.parts:
                checksum.update(part.memory[part.places[row]].data)
            if checksum.intdigest() != self.checksums[row]:
                raise _ReadError(Result(Outcome.OTHER_BYTES, 0, row, 0))

    def _read_part(self, index: int, part: Part, first: int, last: int) -> None:
        padding = memoryview(bytearray(part.gap))
        while first < last:
            # A run: rows that follow each other in one file, with only padding between.
            end = first + 1
            while (
                end < last
                and end - first < _MAX_IOVECS
                and (end - first) * (part.size + part.gap) < _RUN_BYTES
                and part.file_of[end] == part.file_of[first]
                and part.offsets[end] == part.offsets[end - 1] + part.size + part.gap
            ):
                end += 1
            views: list[memoryview] = []
            for place in part.places[first:end].tolist():
                views += [padding] if views and part.gap else []
                views.append(part.memory[place].data)
            try:
                descriptor = self._descriptor(int(part.file_of[first]))
            except OSError as error:
                code = error.errno or errno.EIO
                raise _ReadError(Result(Outcome.CANNOT_OPEN, code, first, index)) from None
            read = _read_units if self.direct else _read_views
            try:
                whole = read(descriptor, views, int(part.offsets[first]))
            except OSError as error:
                code = error.errno or errno.EIO
                raise _ReadError(Result(Outcome.CANNOT_READ, code, first, index)) from None
            if not whole:
                raise _ReadError(Result(Outcome.TRUNCATED, 0, first, index))
            first = end

    def _descriptor(self, index: int) -> int:
        with self._lock:
            file = self.files[index]
            if isinstance(file, int):
                return file
            flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0)
            descriptor = os.open(file, flags)
            if not self.direct and not self.keep and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            status = os.fstat(descriptor)
            self._opened.append((index, descriptor, status.st_ino, status.st_mtime_ns))
            self.files[index] = descriptor
            return descriptor


def _read_views(descriptor: int, views: list[memoryview], at: int) -> bool:
    """Fill the views from `at` on. False where the file ends before. Raises OSError."""
    total = sum(map(len, views))
    if (count := os.preadv(descriptor, views, at)) == total:
        return True
    for view in views:  # the slow way, after a short read
        done = min(count, len(view))
        count -= done
        while done < len(view):
            read = os.preadv(descriptor, [view[done:]], at + done)
            if read == 0:
                return False
            done += read
        at += len(view)
    return True


def _read_units(descriptor: int, views: list[memoryview], at: int) -> bool:
    """`_read_views` with O_DIRECT: whole units into aligned memory, then to their places."""
    first = at // DIRECT_BYTES * DIRECT_BYTES
    wanted = at - first + sum(map(len, views))
    size = -(-wanted // DIRECT_BYTES) * DIRECT_BYTES
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, size, flags=flags) as aligned, memoryview(aligned) as memory:
        done = 0
        while done < wanted:  # a file may end within its last unit
            count = os.preadv(descriptor, [memory[done:]], first + done)
            done += count
            if done < wanted and (count == 0 or done % DIRECT_BYTES):
                return False
        start = at - first
        for view in views:
            view[:] = memory[start : start + len(view)]
            start += len(view)
    return True
