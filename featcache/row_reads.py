"""Batches of rows from their files into buffers, and whether to believe what was read.

What a batch of rows means as a job for the threads of featcache/gather.py, which files stay open,
and which rows' checksums have been compared; featcache/reader.py is what users see.

Letters: I images of a batch.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from featcache.codecs import StoredFeatures
from featcache.errors import CorruptStoreError, StoreError
from featcache.gather import Job, Outcome, Part, Pool, Result
from featcache.layout import Placement, Status
from featcache.open_files import OpenFile, OpenFiles, most_files

CHECKS = ("once", "always", "never")
"""When a row's checksum is compared: the first time it is read here, every time, or never."""
_ATTEMPTS = 5  # at a batch for which there were too few files


@dataclass(slots=True, eq=False, weakref_slot=True)
class Pending:
    """A batch under way. rows: ascending; places: where each goes in the buffer.

    compare: bool[I], whose checksums are compared with what is read; None: nobody's.
    renewals: of the reader, when that was decided. job: None for a batch without rows.
    opening: (array, number) of the job's files. held: the open ones.
    """

    job: Job | None  # the first to go: what it uses goes after it
    buffer: StoredFeatures
    rows: np.ndarray[Any, Any]
    places: np.ndarray[Any, Any]
    compare: np.ndarray[Any, Any] | None
    renewals: int
    opening: list[tuple[int, int]] = field(default_factory=list)
    held: list[OpenFile] = field(default_factory=list)

    def cancel(self) -> None:
        """Nothing writes into the buffer any more when this returns."""
        if self.job is not None:
            self.job.cancel()


class RowReads:
    """The reads of one layer's rows. May be used by several threads, and after a fork.

    RAM: 10 bytes a row, 9 of them mapped from the index, and 16 bytes a file.

    lock: held for moments only, and another one after a fork; the reader's buffers use it as well.
    """

    def __init__(
        self,
        placements: list[Placement],
        status: np.ndarray[Any, Any],
        checksums: np.ndarray[Any, Any],
        check: str,
        open_pool: Callable[[], Pool],
    ) -> None:
        """placements: of codes, and of scales where there are any. status: uint8[rows]; only OK
        rows can be read. checksums: uint64[rows] of codes and then scales. check: one of `CHECKS`.
        """
        self._status = status
        self._checksums = checksums
        self._check = check
        self._open_pool = open_pool
        self._files = [OpenFiles(where, len(status)) for where in placements]
        self._checked = np.zeros(len(status), np.bool_)
        self._renewals = 0  # how often a file was opened that was another one before
        self.lock = threading.Lock()
        self._alone = threading.Lock()  # who is short of files, one at a time
        self._under_way: weakref.WeakSet[Pending] = weakref.WeakSet()
        self._closed = False
        self._pool: Pool | None = open_pool()
        _all.add(self)

    def submit(self, rows: np.ndarray[Any, Any], buffer: StoredFeatures) -> Pending:
        """Begin to read int64[I] rows, in any order, into the first I images of `buffer`.

        Raises StoreError for rows that cannot be read, and after `close`.
        """
        if self._closed:
            raise StoreError("this feature reader is closed; ask the store for another one")
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
        with self.lock:
            batch = Pending(None, buffer, rows, places, self._unchecked(rows), self._renewals)
            self._start(batch)
            self._under_way.add(batch)
        return batch

    def may_open_more(self, rows: int) -> bool:
        """Whether a batch of so many rows leaves files for the rest of the process: with those of
        `OpenFiles`, about half of what it may open."""
        with self.lock:
            under_way = sum(len(batch.opening) for batch in self._under_way)
        wanted = sum(min(rows, files.count) for files in self._files)
        return under_way + wanted <= most_files() // 4

    def close(self) -> None:
        """Stop the threads and close every file; what is being read is given up."""
        self._closed = True
        if self._pool is not None:
            self._pool.close()
        with self.lock:
            for files in self._files:
                files.close()

    def begin_anew(self) -> None:
        """In a forked child."""
        self.lock, self._alone = threading.Lock(), threading.Lock()
        self._under_way = weakref.WeakSet()
        self._files = [OpenFiles(files.where, len(self._status)) for files in self._files]
        self._checked = np.zeros(len(self._status), np.bool_)
        self._pool = None

    def _require_readable(self, rows: np.ndarray[Any, Any]) -> None:
        if not len(rows):
            return
        if rows.min() < -1 or rows.max() >= len(self._status):
            raise StoreError(
                f"row {rows.min() if rows.min() < -1 else rows.max()} is out of range; the store "
                f"had {len(self._status)} rows when it was opened: if it has grown since, open it "
                "again"
            )
        # -1 is what `Store.rows` says of an image without features.
        without = rows[(rows < 0) | (self._status[rows] != Status.OK)]
        if len(without):
            raise StoreError(
                f"row {without[0]} has no features; leave out the images for which Store.rows says "
                "-1 (Store.reason says why)"
            )

    def _unchecked(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        if self._check == "never":
            return None
        compare = ~self._checked[rows]
        return compare if compare.any() else None

    def _start(self, batch: Pending) -> None:
        """Hand the batch's job in. Needs the lock."""
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
                    files.append(os.fsencode(str(where.paths(number))))
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
        if self._pool is None:  # in a forked child
            self._pool = self._open_pool()
        try:
            batch.job = self._pool.submit(
                len(batch.rows), files, tuple(parts), checksums, batch.compare
            )
        except (ValueError, RuntimeError):
            if not self._closed:  # meanwhile, by another thread
                raise
            raise StoreError("this feature reader was closed; begin anew") from None

    def finish(self, batch: Pending) -> None:
        """Wait for the batch and believe it. Raises as `read` says."""
        if batch.job is None:
            return
        result = Result(*batch.job.wait())
        self._adopt(batch)
        if result.error in (errno.EMFILE, errno.ENFILE):
            result = self._with_fewer_files(batch)
        with self.lock:
            self._under_way.discard(batch)
            # `featcache gc` may have dropped a row that a run wants which opened the store before
            # its image changed: what was compared was perhaps the file of before.
            doubtful = self._renewals != batch.renewals
        if result.outcome != Outcome.DONE:
            raise self._failure(batch, result)
        if self._check == "never":
            return
        if doubtful:
            for row in range(len(batch.rows)):
                if batch.compare is None or not batch.compare[row]:
                    self._compare(batch, row)
        elif batch.compare is not None and self._check == "once":
            with self.lock:
                if self._renewals == batch.renewals:
                    self._checked[batch.rows] = True

    def _adopt(self, batch: Pending) -> None:
        """Keep the files that an ended job opened, and let go of those it needed."""
        assert batch.job is not None
        with self.lock:
            found, opening = batch.job.take_opened(), batch.opening
            batch.held, batch.opening = [], []
            for file, descriptor, inode, modified_ns in found:
                array, number = opening[file]
                files, opened = self._files[array], OpenFile(descriptor)
                if not self._closed and files.add(number, opened, inode, modified_ns):
                    where = files.where
                    first = number * where.rows_per_file
                    self._checked[first : first + where.rows_per_file] = False
                    self._renewals += 1

    def _with_fewer_files(self, batch: Pending) -> Result:
        """Again, after closing what can be closed; more than once, as other threads open files."""
        with self._alone:
            for _ in range(_ATTEMPTS):
                with self.lock:
                    others = [other for other in self._under_way if other is not batch]
                for other in others:
                    if other.job is not None:
                        other.job.wait()
                        self._adopt(other)
                with self.lock:
                    for files in self._files:
                        files.shrink()
                    self._start(batch)
                    job = batch.job
                assert job is not None
                result = Result(*job.wait())
                self._adopt(batch)
                if result.error not in (errno.EMFILE, errno.ENFILE):
                    break
        return result

    def _compare(self, batch: Pending, row: int) -> None:
        """Compare a row that was read with its checksum. Raises CorruptStoreError."""
        place = int(batch.places[row])
        checksum = xxhash.xxh3_64(_as_bytes(batch.buffer.codes)[place].data)
        if batch.buffer.scales is not None:
            checksum.update(_as_bytes(batch.buffer.scales)[place].data)
        if checksum.intdigest() != self._checksums[batch.rows[row]]:
            raise self._failure(batch, Result(Outcome.OTHER_BYTES, 0, row, 0))

    def _failure(self, batch: Pending, result: Result) -> StoreError:
        row = int(batch.rows[result.row])
        where = self._files[result.part].where
        path, why = where.paths(row // where.rows_per_file), os.strerror(result.error)
        with self.lock:  # once it is mended it is another file
            self._files[result.part].drop(row // where.rows_per_file)
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
                    f"{path}: {why}, although the reader has closed what it does not need for this "
                    "batch; raise the limit (`ulimit -n`), or close files of this process"
                )
            case _ if result.error in (errno.EACCES, errno.EPERM, errno.ENOMEM):
                return StoreError(f"{path}: {why}")
            case Outcome.CANNOT_OPEN:
                return CorruptStoreError(f"{path}: {why}; if it is gone, {where.cure}")
            case _:
                return CorruptStoreError(f"{path}: {why}; {where.cure}")


def _as_bytes(values: Tensor) -> np.ndarray[Any, Any]:
    """uint8[I, bytes of one], the tensor's own memory."""
    row_bytes = values[0].numel() * values.itemsize if len(values) else 0
    return values.view(torch.uint8).numpy().reshape(len(values), row_bytes)


_all: weakref.WeakSet[RowReads] = weakref.WeakSet()


def _begin_anew_after_a_fork() -> None:
    """The child has no threads, nor whoever held a lock or was in the middle of a change."""
    for reads in list(_all):
        reads.begin_anew()


os.register_at_fork(after_in_child=_begin_anew_after_a_fork)
