"""A place in an object store, with as much of pathlib.Path's interface as a store needs.

So `root / layout.shard_path(...)` is written, found and read alike in a folder and in a bucket. An
object is whole or absent at any time. There are no folders: a prefix "is a directory" as long as an
object's name begins with it.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

from featcache import object_requests, object_store
from featcache.errors import ConfigError, StoreError

READS_AT_ONCE = 32
"""Small objects asked for at the same time; each answer takes some 30 ms."""


class ObjectStat(NamedTuple):
    """What `os.stat_result` would say. version: changes whenever the object is written."""

    st_size: int
    version: str


@dataclass(frozen=True, slots=True, order=True)
class ObjectPath:
    """An object, or the prefix of some.

    bucket: with its scheme, "s3://name". key: its name in there, without slashes at either end; ""
    is the whole bucket.

    Methods raise as pathlib.Path's: FileNotFoundError, PermissionError, other OSErrors; and
    ObjectStoreError where the bucket cannot be used at all.
    """

    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.bucket}/{self.key}" if self.key else self.bucket

    def __truediv__(self, below: str) -> ObjectPath:
        key = "/".join(part for part in (self.key, below.strip("/")) if part)
        return ObjectPath(self.bucket, key)

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.bucket, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:
        return self.parent / name

    def absolute(self) -> ObjectPath:
        return self

    def relative_to(self, other: StorePath) -> PurePosixPath:
        """Raises ValueError where it is not below `other`."""
        if not isinstance(other, ObjectPath) or self.bucket != other.bucket:
            raise ValueError(f"{self} is not below {other}")
        return PurePosixPath(self.key).relative_to(other.key)

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        return bool(self._ask(object_requests.has_any, self.key))

    def stat(self) -> ObjectStat:
        return ObjectStat(*self._ask(object_requests.head, self._object_key()))

    def read_bytes(self) -> bytes:
        found: bytes = self._ask(object_requests.get, self._object_key())
        return found

    def read_at_most(self, nbytes: int) -> bytes | int:
        """The bytes, or their number where there are more than `nbytes`; those are not fetched."""
        found: bytes | int = self._ask(object_requests.get_at_most, self._object_key(), nbytes)
        return found

    def read_range(self, start: int, length: int) -> memoryview:
        """`length` bytes from `start`, fewer where the object ends before; none of them copied."""
        return memoryview(self._ask(object_requests.get_range, self._object_key(), start, length))

    def open(self, *, encoding: str) -> io.TextIOWrapper:
        """As text, for reading: all of it is fetched into memory."""
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding=encoding)

    def download(self, place: Path) -> None:
        """Write the object to a local file, in pieces."""
        self._ask(object_requests.download, self._object_key(), place)

    def write(self, parts: Sequence[bytes | memoryview | int]) -> None:
        """Put an object of these parts, holes as zeros, in the place of what is there.

        RAM: `PART_BYTES` x `PARTS_AT_ONCE` at the most, whatever its size.
        """
        self._ask(object_requests.put, self._object_key(), list(parts))

    def write_after(self, content: bytes | memoryview, before: bytes | None) -> None:
        """Put `content` if the object still is `before` (None: if there is none), or `content`
        already. Two writers never both succeed with different contents.

        Raises FileExistsError where it is something else. The server must know conditional
        requests (If-None-Match, If-Match); where it does not, OSError (ENOTSUP).
        """
        self._ask(object_requests.put_after, self._object_key(), content, before)

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok:
            self.stat()
        with contextlib.suppress(FileNotFoundError):  # not all servers say so
            self._ask(object_requests.delete, self._object_key())

    def remove_tree(self) -> None:
        """Remove every object below."""
        keys = [f"{self.key}/{name}".lstrip("/") for name, _ in self.listing()]
        with contextlib.suppress(FileNotFoundError):  # another attempt of ours removed some
            self._ask(object_requests.delete, keys)

    def listing(self) -> list[tuple[str, int]]:
        """(name relative to this, bytes) of every object below; one request for each 1,000."""
        cut = len(self.key) + 1 if self.key else 0
        return [(key[cut:], nbytes) for key, nbytes in self._ask(object_requests.listed, self.key)]

    def iterdir(self) -> Iterator[ObjectPath]:
        """What is directly below, objects and prefixes."""
        for key in self._ask(object_requests.listed_directly, self.key):
            yield ObjectPath(self.bucket, key.strip("/"))

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """pattern: of a name directly below."""
        assert "/" not in pattern
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def _object_key(self) -> str:
        if not self.key:
            raise IsADirectoryError(errno.EISDIR, "is a bucket, not an object", str(self))
        return self.key

    def _ask(self, what: Callable[..., Any], *arguments: Any) -> Any:
        ask = functools.partial(_with_store, what, arguments)
        return object_store.request(str(self), self.bucket, ask)


def _with_store(what: Callable[..., Any], arguments: tuple[Any, ...], store: Any) -> Any:
    return what(store, *arguments)


StorePath: TypeAlias = Path | ObjectPath


def is_url(text: str) -> bool:
    """Whether it names a place in an object store."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", text) is not None


def parse_location(text: str | Path | ObjectPath) -> StorePath:
    """A folder or file of this machine, or s3://bucket/prefix, gs://..., az://container/prefix.

    Raises ConfigError for another scheme, without a bucket, and for s3:/bucket, which pathlib makes
    of s3://bucket (a folder of that name is ./s3:/bucket).
    """
    if isinstance(text, ObjectPath):
        return text
    if not is_url(str(text)):
        scheme, _, rest = str(text).partition(":/")
        if scheme in object_store.SCHEMES and rest:
            raise ConfigError(f"{text}: a bucket is written with two slashes: {scheme}://{rest}")
        return Path(text)
    scheme, _, rest = str(text).partition("://")
    name, _, key = rest.partition("/")
    if scheme not in object_store.SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in object_store.SCHEMES)
        raise ConfigError(f"{text}: unknown scheme {scheme}://; known are {known}, and paths")
    if not name:
        raise ConfigError(f"{text}: names no bucket; it must be like {scheme}://bucket/folder")
    if "//" in key.strip("/") or any(part in (".", "..") for part in key.split("/")):
        raise ConfigError(f"{text}: a name in a bucket has no empty, `.` or `..` parts")
    return ObjectPath(f"{scheme}://{name}", key.strip("/"))


def require_disk(path: StorePath, what: str) -> Path:
    """`path`, which must be on a disk. what: that needs it, e.g. "`featcache gc`".

    Raises StoreError.
    """
    if isinstance(path, ObjectPath):
        raise StoreError(
            f"{path}: {what} works on a store on a disk; copy it there (e.g. `aws s3 sync`, "
            "`gcloud storage rsync`, `azcopy sync`), and back afterwards"
        )
    return path


def read_each(paths: Sequence[StorePath]) -> Iterator[bytes | None]:
    """The bytes of files in their order, None of those that do not exist; many at once from a
    bucket. Raises OSError, ObjectStoreError."""

    def read(path: StorePath) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    if not any(isinstance(path, ObjectPath) for path in paths):
        yield from map(read, paths)
        return
    block = 8 * READS_AT_ONCE
    with ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="featcache-fetch") as pool:
        for start in range(0, len(paths), block):
            yield from pool.map(read, paths[start : start + block])


def size_of(root: StorePath, folders: Sequence[str] = ()) -> Callable[[str], int | None]:
    """How long the file at a path below `root` is, None where there is none: asked of a disk each
    time, of a bucket too unless `folders` are named, which are then listed once, now."""
    if folders and isinstance(root, ObjectPath):
        known = {
            f"{folder}/{name}": nbytes
            for folder in folders
            for name, nbytes in (root / folder).listing()
        }
        return known.get

    def ask(path: str) -> int | None:
        try:
            return (root / path).stat().st_size
        except FileNotFoundError:
            return None

    return ask
