"""Files that are read like folders of images: a tar, a parquet file, a saved Hugging Face dataset.

An image key may lead into one: `00000.tar/000012.jpg`, `train-00003.parquet/1234` (the row), so
plans, index and ledger need not know that there are such files. Images are read in place, without a
second copy on the disk; what is kept of each file is found again whenever the file has changed.

RAM of a process: at most `TABLES_BYTES` of member tables, and what featcache/parquets.py says.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from featcache.errors import ImageError, ManifestError
from featcache.once import OnceCache
from featcache.parquets import MAGIC, ParquetImages
from featcache.saved_datasets import STATE, SavedDataset, is_saved_dataset
from featcache.tars import BLOCK, Member, TarTable, is_tar, walk

TABLES_BYTES = 256 << 20
"""Of tables: ten million members of tars."""

CONTAINER_SUFFIXES = (".tar", ".parquet")
"""Of containers in a bucket, which are not read there; on a disk their first bytes tell."""

Container = TarTable | ParquetImages | SavedDataset
Identity = tuple[int, int, int, int]
"""By which a file that was replaced or written to is known: device, inode, bytes, time."""

_containers: OnceCache[tuple[str, Identity], Container] = OnceCache(
    TABLES_BYTES, lambda container: container.nbytes
)


def kind_of(path: Path) -> str | None:
    """ "tar" or "parquet", by the file's first bytes; None for another file. Raises OSError."""
    with path.open("rb") as file:
        return _kind(file.read(BLOCK), path)


def _kind(head: bytes, path: Path) -> str | None:
    if head.startswith(MAGIC):
        return "parquet"
    return "tar" if is_tar(head, path) else None


def tar_members(path: Path) -> list[Member]:
    """A tar's members, in order; where they lie is kept for `read_member`. Raises ManifestError."""
    place = _place(path, path.stat())
    members = list(walk(path))
    _containers.get(place, lambda: TarTable(members))
    return members


def open_parquet(path: Path) -> ParquetImages:
    """Raises ManifestError."""
    found = _containers.get(_place(path, path.stat()), lambda: ParquetImages(path.absolute()))
    assert isinstance(found, ParquetImages)
    return found


def open_dataset(path: Path) -> SavedDataset:
    """Raises ManifestError."""
    place = _place(path, (path / STATE).stat())
    found = _containers.get(place, lambda: SavedDataset(path.absolute()))
    assert isinstance(found, SavedDataset)
    return found


def read_member(root: str, key: str) -> bytes | None:
    """The bytes of an image whose key leads into a container; None where the key does not.

    root: absolute path of the image root.
    Raises ImageError: "missing" (no such member), "unreadable" (a damaged container), "too_large";
    and FeatcacheError where an optional library is not installed.
    """
    found = _leading_container(root, key)
    if found is None:
        return None
    path, member = found
    try:
        if path.is_dir():
            return open_dataset(path).read(member)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            place = _place(path, os.fstat(descriptor))
            container = _containers.get(place, lambda: _open(path, descriptor))
            if isinstance(container, TarTable):
                return container.read(path, descriptor, member)
            return container.read(member)
        finally:
            os.close(descriptor)
    except ManifestError as error:
        raise ImageError("unreadable", str(error)) from None
    except OSError as error:
        raise ImageError("unreadable", f"{path}: {error.strerror or error}") from None
    except MemoryError:
        raise ImageError("too_large", f"{path}/{member} does not fit in memory") from None


def _leading_container(root: str, key: str) -> tuple[Path, str] | None:
    """The shortest part of the key that is a file, or a dataset's folder; and the rest."""
    parts = key.split("/")
    path = Path(root)
    for i, part in enumerate(parts[:-1], 1):
        path = path / part
        try:
            mode = path.stat().st_mode
        except OSError:
            return None
        rest = "/".join(parts[i:])
        if stat.S_ISREG(mode):
            return path, rest
        if parts[i].isdecimal() and is_saved_dataset(path):
            return path, rest
    return None


def _open(path: Path, descriptor: int) -> Container:
    """Raises ManifestError where it is damaged, and ImageError where it is no container."""
    kind = _kind(os.pread(descriptor, BLOCK, 0), path)
    if kind is None:
        raise ImageError("unreadable", f"{path} is a file, and neither a tar nor parquet")
    return ParquetImages(path) if kind == "parquet" else TarTable(list(walk(path)))


def _place(path: Path, found: os.stat_result) -> tuple[str, Identity]:
    identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    return str(path.absolute()), identity
