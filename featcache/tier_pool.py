"""Rows out of a bucket: those that the local tier has from its mirrors, the others from the bucket.

A third kind of `Pool` beside those of featcache/gather.py: it hands what is there to one of them,
and fetches the rest itself, straight into the batch's memory and from there into the mirrors.

Every row that is fetched is compared with its checksum. A row whose mirror holds other bytes is
fetched again; one that the bucket has otherwise than the index says is fetched twice before it
counts as damaged.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import xxhash

from featcache.errors import FeatcacheError
from featcache.gather import Job, Outcome, Part, Pool, Result
from featcache.layout import Placement
from featcache.object_path import READS_AT_ONCE, ObjectPath, parse_location
from featcache.open_files import most_files
from featcache.tier import FULL, Mirror, Tier

RUN_BYTES = 8 << 20
"""Neighbours are fetched by one request up to here."""
_MOST_MIRRORS = 256  # kept open
_SHARE = 8  # of the files that the process may open


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a batch. url: in the bucket; number: of the array's files."""

    url: ObjectPath
    number: int
    mirror: Mirror


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows that follow each other in a file, slots [first, last). rows: int[n], which of the batch
    they are; slots: int[n], of each. files: one for each array."""

    first: int
    last: int
    rows: np.ndarray
    slots: np.ndarray
    files: tuple[_File, ...]


class _FetchError(Exception):
    def __init__(self, result: Result) -> None:
        self.result = result


class TierPool:
    """See the module. RAM: `READS_AT_ONCE` runs of `RUN_BYTES` at the most; of single rows as many.

    Keeps the mirrors open that were used last, but none that the tier has removed: their space is
    free only when they are closed.
    """

    def __init__(
        self,
        inner: Pool,
        tier: Tier,
        placements: Sequence[Placement],
        checksums: np.ndarray,
        identity: str,
    ) -> None:
        """inner: reads files. placements: where the rows lie in the bucket: of codes, and of scales
        where there are any. checksums: uint64[rows of the store]. identity: see `Tier.mirror`."""
        self._inner = inner
        self._tier = tier
        self._placements = list(placements)
        self._checksums = checksums
        self._identity = identity
        self._open: OrderedDict[bytes, _File] = OrderedDict()
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="featcache-fetch")

    def submit(
        self,
        rows: int,
        files: list[int | bytes],
        parts: tuple[Part, ...],
        checksums: np.ndarray | None,
        compare: np.ndarray | None,
    ) -> TierJob:
        """As `Pool.submit`; all files are addresses in the bucket."""
        array_of = {int(part.file_of[0]): array for array, part in enumerate(parts)}
        try:
            found, array = [], 0
            for index, file in enumerate(files):
                array = array_of.get(index, array)  # the files of an array follow each other
                assert isinstance(file, bytes)
                found.append(self._file(file, self._placements[array]))
        except OSError as error:
            code = error.errno or errno.EIO
            return TierJob(self, parts, [], failed=Result(Outcome.CANNOT_OPEN, code, 0, 0))
        job = TierJob(self, parts, found)
        present = np.ones(rows, np.bool_)
        for part in parts:
            for index in np.unique(part.file_of).tolist():
                here = part.file_of == index
                present[here] &= found[index].mirror.present()[job.slots[here]]
        job.local = np.flatnonzero(present)
        descriptors: list[int | bytes] = [file.mirror.descriptor for file in found]
        if len(job.local) == rows:
            job.inner = self._inner.submit(rows, descriptors, parts, checksums, compare)
            return job
        if len(job.local):
            some = job.local
            job.inner = self._inner.submit(
                len(some),
                descriptors,
                tuple(_only(part, some) for part in parts),
                None if checksums is None else checksums[some],
                None if compare is None else compare[some],
            )
        job.futures = self.fetch(job, np.flatnonzero(~present))
        return job

    def fetch(self, job: TierJob, rows: np.ndarray) -> list[Future[None]]:
        """Begin to fetch these rows of a batch, neighbours together."""
        pitch = sum(where.pitch_bytes for where in self._placements)
        most = max(1, RUN_BYTES // pitch)
        file_of, slots = job.parts[0].file_of, job.slots
        futures, start = [], 0
        for end in range(1, len(rows) + 1):
            if end < len(rows):
                first, before, row = rows[start], rows[end - 1], rows[end]
                if (
                    file_of[row] == file_of[before]
                    and slots[row] - slots[before] in (0, 1)
                    and slots[row] - slots[first] < most
                ):
                    continue
            chosen = rows[start:end]
            run = _Run(
                int(slots[chosen[0]]),
                int(slots[chosen[-1]]) + 1,
                chosen,
                slots[chosen],
                tuple(job.files[int(part.file_of[chosen[0]])] for part in job.parts),
            )
            futures.append(self._executor.submit(self._fetch, job, run))
            start = end
        return futures

    def close(self) -> None:
        """As `Pool.close`."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._inner.close()
        with self._lock:
            self._open.clear()

    def _file(self, address: bytes, where: Placement) -> _File:
        """Raises OSError where the mirror cannot be opened."""
        with self._lock:
            found = self._open.get(address)
            if found is None or found.mirror.removed:
                for other in [key for key, file in self._open.items() if file.mirror.removed]:
                    del self._open[other]
                url = parse_location(os.fsdecode(address))
                assert isinstance(url, ObjectPath)
                try:
                    mirror = self._mirror(url, where)
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE):
                        raise
                    self._open.clear()
                    mirror = self._mirror(url, where)
                # .../c/<number>/...: the first of an array's chunk coordinates.
                number = int(url.key.rpartition("/c/")[2].partition("/")[0])
                found = self._open[address] = _File(url, number, mirror)
            self._open.move_to_end(address)
            while len(self._open) > max(1, min(_MOST_MIRRORS, most_files() // _SHARE)):
                self._open.popitem(last=False)
        found.mirror.touch()
        return found

    def _mirror(self, url: ObjectPath, where: Placement) -> Mirror:
        nbytes = where.start_bytes + where.rows_per_file * where.pitch_bytes
        return self._tier.mirror(url, self._identity, nbytes, where.rows_per_file)

    def _fetch(self, job: TierJob, run: _Run) -> None:
        """Into the batch's memory, and then into the mirrors. Raises _FetchError, StoreError."""
        if job.cancelled:
            return
        pieces = self._pieces(run)
        if self._place(job.parts, run, pieces) is not None:
            pieces = self._pieces(run)
            if (bad := self._place(job.parts, run, pieces)) is not None:
                raise _FetchError(Result(Outcome.OTHER_BYTES, 0, bad, 0))
        try:
            for where, file, piece in zip(self._placements, run.files, pieces, strict=True):
                file.mirror.write(piece, where.offset(run.first), run.first, run.last)
        except OSError as error:
            if error.errno not in FULL:
                raise self._tier.unusable(error) from None
            self._tier.shrink()
        else:
            self._tier.added(sum(map(len, pieces)))

    def _pieces(self, run: _Run) -> list[memoryview]:
        """The run's bytes of each array. Raises _FetchError, StoreError."""
        pieces = []
        for part, (where, file) in enumerate(zip(self._placements, run.files, strict=True)):
            length = (run.last - 1 - run.first) * where.pitch_bytes + where.row_bytes
            row = int(run.rows[0])
            try:
                piece = file.url.read_range(where.offset(run.first), length)
            except FileNotFoundError:
                raise _FetchError(Result(Outcome.CANNOT_OPEN, errno.ENOENT, row, part)) from None
            except OSError as error:
                outcome = Outcome.TRUNCATED if error.errno == errno.ERANGE else Outcome.CANNOT_READ
                code = error.errno or errno.EIO
                raise _FetchError(Result(outcome, code, row, part)) from None
            if len(piece) < length:
                raise _FetchError(Result(Outcome.TRUNCATED, 0, row, part))
            pieces.append(piece)
        return pieces

    def _place(self, parts: Sequence[Part], run: _Run, pieces: Sequence[memoryview]) -> int | None:
        """Copy the rows to their places. Returns one whose checksum is another, if there is any."""
        sources = [np.frombuffer(piece, np.uint8) for piece in pieces]
        for row, slot in zip(run.rows.tolist(), run.slots.tolist(), strict=True):
            checksum = xxhash.xxh3_64()
            for part, where, source in zip(parts, self._placements, sources, strict=True):
                start = (slot - run.first) * where.pitch_bytes
                stored = source[start : start + where.row_bytes]
                part.memory[part.places[row]] = stored
                checksum.update(stored.data)
            of_store = run.files[0].number * self._placements[0].rows_per_file + slot
            if checksum.intdigest() != self._checksums[of_store]:
                return int(row)
        return None


def _only(part: Part, rows: np.ndarray) -> Part:
    return part._replace(
        file_of=part.file_of[rows], offsets=part.offsets[rows], places=part.places[rows]
    )


class TierJob:
    """See `TierPool.submit`. files: those of the batch, open for as long as it is under way.

    slots: int64[rows], the place of each row among those of its files; local: those whose bytes the
    mirrors have.
    """

    def __init__(
        self,
        pool: TierPool,
        parts: tuple[Part, ...],
        files: list[_File],
        failed: Result | None = None,
    ) -> None:
        self.parts = parts
        self.files = files
        self.slots = parts[0].offsets // (parts[0].size + parts[0].gap)  # files begin with a row
        self.local = np.zeros(0, np.int64)
        self.inner: Job | None = None
        self.futures: list[Future[None]] = []
        self.cancelled = False
        self._pool = pool
        self._result = failed
        self._error: FeatcacheError | None = None
        self._waiting = threading.Lock()
        self._pid = os.getpid()

    def wait(self) -> Result:
        """As `Job.wait`. Raises StoreError where the bucket or the tier's folder cannot be used."""
        if os.getpid() != self._pid and not all(future.done() for future in self.futures):
            return Result(Outcome.CANNOT_READ, errno.ECANCELED, 0, 0)  # the threads are not here
        with self._waiting:
            if self._result is None:
                self._result = self._finish()
            if self._error is not None:
                raise self._error
            return self._result

    def cancel(self) -> None:
        """As `Job.cancel`."""
        self.cancelled = True
        if os.getpid() == self._pid:
            wait([future for future in self.futures if not future.cancel()])
        if self.inner is not None:
            self.inner.cancel()

    def take_opened(self) -> list[tuple[int, int, int, int]]:
        """None: the pool keeps its files itself."""
        return []

    def __del__(self) -> None:
        self.cancel()

    def _finish(self) -> Result:
        result = self._fetched(self.futures)
        if self.inner is None:
            return result
        outcome = Result(*self.inner.wait())
        if outcome.outcome == Outcome.DONE or result.outcome != Outcome.DONE:
            return result if result.outcome else outcome
        if outcome.error == errno.ECANCELED:
            return outcome
        # A mirror is not what it should be: torn by a power loss, or of a store that was here once.
        self.futures = self._pool.fetch(self, self.local)
        return self._fetched(self.futures)

    def _fetched(self, futures: Sequence[Future[None]]) -> Result:
        """Of all of them: until they end, memory is written to."""
        result = Result(Outcome.DONE, 0, 0, 0)
        for future in futures:
            try:
                future.result()
            except _FetchError as failed:
                result = result if result.outcome else failed.result
            except CancelledError:
                result = Result(Outcome.CANNOT_READ, errno.ECANCELED, 0, 0)
            except FeatcacheError as error:
                self._error = self._error or error
        return result
