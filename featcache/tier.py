"""A folder on a local disk that keeps what was fetched from buckets: between them and memory.

    <folder>/lock                         held while something is removed
    <folder>/arrays/<checksum>/...        a store's small arrays, whole, by their checksum
    <folder>/shards/<hash>                the mirror of one features, scales or pooled file

A *mirror* is a sparse file: the rows at the places that they have in the bucket's file, and behind
them one byte for each row, 1 once its bytes are there. The byte is written after the row: so any
number of processes may fill a mirror and be killed at any moment, and what was fetched stays. What
a power loss may tear, and what another store once left under the same name, the rows' checksums
tell (featcache/tier_pool.py).

The budget counts what the files really take on the disk. When it is used up, the files that were
not used for longest go first; whoever has one open reads on. Several processes that fill one folder
may together exceed it by an eighth each.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from featcache.errors import ConfigError, CorruptStoreError, StoreError
from featcache.files import read_json
from featcache.layout import chunk_name, map_array, repair_cure
from featcache.object_path import ObjectPath

FREE_SHARE = 0.5
"""Of the disk's free space (and what the folder holds already), where no budget is given."""
_KEPT = 0.9  # of the budget, after something had to go
_CHECKED = 8  # times in which a process may fill the budget before it looks what others did
_TOUCH_S = 60.0
_FETCHED = ".fetch-"  # begins the name of a folder into which something is being fetched
_FETCHED_S = 3600.0  # after that nobody fetches into it any more
FULL = (errno.ENOSPC, errno.EDQUOT)


def cache_folder() -> Path:
    """FEATCACHE_CACHE_DIR, else "featcache" in the user's folder for caches."""
    if given := os.environ.get("FEATCACHE_CACHE_DIR"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "featcache"


@functools.cache
def default_tier() -> Tier:
    """The one for whoever asks for none."""
    return Tier()


@dataclass(slots=True)
class Mirror:
    """One mirror, open for as long as somebody holds this. nbytes: of the rows' region; rows: how
    many have their place in it."""

    descriptor: int
    nbytes: int
    rows: int
    _touched: float = -1e9

    def present(self) -> np.ndarray[Any, Any]:
        """bool[rows]: which are there."""
        return np.frombuffer(os.pread(self.descriptor, self.rows, self.nbytes), np.bool_)

    def touch(self) -> None:
        """It is in use."""
        now = time.monotonic()
        if now - self._touched > _TOUCH_S:
            self._touched = now
            os.utime(self.descriptor)

    @property
    def removed(self) -> bool:
        """Whether the tier has removed it: what is written into it is lost."""
        return os.fstat(self.descriptor).st_nlink == 0

    def write(self, content: memoryview, at: int, first: int, last: int) -> None:
        """Put rows [first, last), which begin at byte `at`, in place. Raises OSError."""
        while content:
            written = os.pwrite(self.descriptor, content, at)
            content, at = content[written:], at + written
        os.pwrite(self.descriptor, b"\1" * (last - first), self.nbytes + first)

    def __del__(self) -> None:
        os.close(self.descriptor)


class Tier:
    """See the module. May be used by several threads, and in forked and pickled copies."""

    def __init__(self, folder: Path | str | None = None, nbytes: int | None = None) -> None:
        """folder: None takes `cache_folder()`. nbytes: of all that it holds; None takes
        `FREE_SHARE` of the disk that is free or already its own.

        Raises ConfigError for a budget that is none, StoreError for a folder that cannot be used.
        """
        self.folder = cache_folder() if folder is None else Path(folder).expanduser()
        if nbytes is not None and nbytes < 0:
            raise ConfigError(f"cache_bytes={nbytes}: must be at least 0")
        try:
            for name in ("arrays", "shards"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
            held = sum(size for _, size, _ in self._files())
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise self.unusable(error) from None
        self.nbytes = int(FREE_SHARE * (free + held)) if nbytes is None else nbytes
        self._given = nbytes
        self._lock = threading.Lock()
        self._held = held
        self._added = 0

    def __reduce__(self) -> tuple[type[Tier], tuple[Path, int | None]]:
        return Tier, (self.folder, self._given)

    def array(self, root: ObjectPath, name: str, checksum: str) -> np.ndarray[Any, Any]:
        """A small array of the store at `root`, mapped from a local copy, which is fetched where
        there is none, or a damaged one.

        Raises CorruptStoreError where the bucket's is not that of `checksum`, StoreError.
        """
        own = self.folder / "arrays" / f"{checksum or 'none'}"
        try:
            found = map_array(own, checksum)
            for path in own.rglob("*"):
                os.utime(path)
            return found
        except (ValueError, FileNotFoundError):
            pass  # never fetched, or damaged, or removed at this moment
        try:
            arrays = self.folder / "arrays"
            with tempfile.TemporaryDirectory(dir=arrays, prefix=_FETCHED) as work:
                self._fetch(root / name, Path(work) / "array")
                # What is mapped stays readable where another process replaces it.
                found = map_array(Path(work) / "array", checksum)
                shutil.rmtree(own, ignore_errors=True)
                try:
                    (Path(work) / "array").rename(own)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
        except ValueError as error:
            raise CorruptStoreError(f"{root / name} {error}; {repair_cure(root)}") from None
        except OSError as error:
            raise self.unusable(error) from None
        self.added(found.nbytes)
        return found

    def _fetch(self, array: ObjectPath, folder: Path) -> None:
        """Raises ValueError where it is missing or no array, OSError for the local disk."""
        folder.mkdir()
        try:
            (array / "zarr.json").download(folder / "zarr.json")
            dimensions = len(read_json(folder / "zarr.json")["shape"])
            chunk = chunk_name(dimensions)
            (folder / chunk).parent.mkdir(parents=True)
            if 0 not in read_json(folder / "zarr.json")["shape"]:
                (array / chunk).download(folder / chunk)
        except FileNotFoundError:
            raise ValueError("is missing, or a part of it") from None
        except (KeyError, TypeError) as error:
            raise ValueError(f"is damaged ({error})") from None

    def mirror(self, url: ObjectPath, identity: str, nbytes: int, rows: int) -> Mirror:
        """Open the mirror of a bucket's file, of `rows` rows in `nbytes` bytes; it is made where
        there is none. identity: of what else decides the rows' places.

        Raises OSError.
        """
        name = xxhash.xxh3_128_hexdigest(f"{url}\n{identity}\n{nbytes}\n{rows}".encode())
        path = self.folder / "shards" / name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if os.fstat(descriptor).st_size != nbytes + rows:
                os.ftruncate(descriptor, nbytes + rows)
        except BaseException:
            os.close(descriptor)
            raise
        return Mirror(descriptor, nbytes, rows)

    def added(self, nbytes: int) -> None:
        """So much was written into the folder: make room where that was too much."""
        with self._lock:
            self._added += nbytes
            if self._added + self._held > self.nbytes or self._added > self.nbytes // _CHECKED:
                self._make_room()

    def shrink(self) -> None:
        """The disk is full: do with less than there is now."""
        with self._lock:
            self.nbytes = min(self.nbytes, int(0.8 * sum(size for _, size, _ in self._files())))
            self._make_room()

    def _make_room(self) -> None:
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._held, self._added = self._held + self._added, 0
                return  # another process is at it
            files = self._files()
            held = sum(size for _, size, _ in files)
            if held > self.nbytes:
                for _, size, path in sorted(files):
                    if held <= _KEPT * self.nbytes:
                        break
                    path.unlink(missing_ok=True)
                    held -= size
            self._held, self._added = held, 0

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes on the disk, path) of each file."""
        found = []
        for folder in ("arrays", "shards"):
            for path in (self.folder / folder).rglob("*"):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                busy = _FETCHED in str(path) and time.time() - status.st_mtime < _FETCHED_S
                if path.is_file() and not busy:
                    found.append((status.st_mtime, status.st_blocks * 512, path))
        return found

    def unusable(self, error: OSError) -> StoreError:
        """The user's line for a folder that cannot be written."""
        return StoreError(
            f"{self.folder}: features of a bucket cannot be kept there ({error.strerror}); name "
            "another folder with FEATCACHE_CACHE_DIR, or train.cache_dir"
        )
