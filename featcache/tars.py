"""Images inside of uncompressed tar files, read in place.

A tar has no table of contents: its headers are walked once (25 us each: 0.8 s for 1 GB of 10,000
samples of three members, of which an eighth is read from the disk), and 24 bytes a member are kept.
After that an image is one positional read.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import xxhash

from featcache.errors import DamagedFileError, ImageError, ManifestError
from featcache.images import MAX_FILE_BYTES

BLOCK = 512
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""First bytes of files by gzip, bzip2, xz and zstd."""
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside of a tar. name: normalised POSIX path; offset, size: of its bytes in the tar.

    problem: why it cannot be used, or "".
    """

    name: str
    offset: int
    size: int
    problem: str = ""


def is_tar(head: bytes, path: Path) -> bool:
    """head: the file's first 512 bytes. A tar without the magic of POSIX (before 1988) is known by
    its suffix. Raises ManifestError for a compressed file."""
    if head.startswith(COMPRESSED):
        refuse_compressed(path)
    return head[257:262] == b"ustar" or path.suffix == ".tar"


def walk(path: Path) -> Iterator[Member]:
    """The members of a tar but its folders, in order; of several with one name the first counts.

    Raises DamagedFileError where the file is damaged, ends too early or is no tar.
    """
    with path.open("rb", buffering=4 * BLOCK) as file:
        if hasattr(os, "posix_fadvise"):  # only headers are wanted
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        names: set[str] = set()
        last, end = "its beginning", 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # or it would keep all of them
                    end = tar.offset
                    if member.isdir():
                        continue
                    last = member.name
                    found = _member(member, names)
                    names.add(found.name)
                    yield found
                end = tar.offset
            damaged = not _ends(file, end)
        except (tarfile.TarError, OSError, ValueError) as error:
            # Whatever is wrong with an entry in the middle, nothing after it can be found.
            raise _damaged(path, last, end, str(error)) from None
        if damaged:
            raise _damaged(path, last, end, "no end-of-archive block follows")


def refuse_compressed(path: Path) -> NoReturn:
    """Raises ManifestError."""
    raise ManifestError(
        f"{path} is compressed; images inside of it could not be read one by one: decompress it "
        "first"
    )


def _member(member: tarfile.TarInfo, names: set[str]) -> Member:
    name = posixpath.normpath(member.name.lstrip("/"))
    problem = ""
    if ".." in name.split("/") or "\0" in name:
        problem = "its name leads out of the tar"
    elif not member.isreg() or member.issparse():
        problem = "it is a link, a special or a sparse file inside of the tar"
    elif name in names:
        problem = "another member of this name comes before it"
    return Member(name, member.offset_data, member.size, problem)


def _ends(file: IO[bytes], end: int) -> bool:
    """Whether the zero block that closes an archive lies at `end`."""
    file.seek(end)
    # tarfile has stepped over that block, unless what it found there was something else.
    block = file.read(BLOCK)
    return len(block) == BLOCK and not any(block)


def _damaged(path: Path, last: str, end: int, why: str) -> DamagedFileError:
    return DamagedFileError(
        f"{path} is damaged or cut short after {last} (byte {end:,}: {why}); fetch it again, or "
        "leave it out of --data"
    )


class TarTable:
    """Where the members of one tar lie: 24 bytes each.

    A name is known by its 64-bit hash, so of 30,000 members two are mistaken for one with a
    probability of 2e-11; an image is compared with its planned digest besides.
    """

    def __init__(self, members: list[Member]) -> None:
        good = [member for member in members if not member.problem]
        hashes = np.fromiter((_hash(member.name) for member in good), np.uint64, len(good))
        order = np.argsort(hashes, kind="stable")
        places = np.array([(member.offset, member.size) for member in good], np.int64)
        self._hashes = hashes[order]
        self._places = places.reshape(-1, 2)[order]

    @property
    def nbytes(self) -> int:
        """That it takes in memory."""
        return self._hashes.nbytes + self._places.nbytes

    def read(self, path: Path, descriptor: int, name: str) -> bytes:
        """The bytes of a member. Raises ImageError: "missing", "too_large", "unreadable"."""
        wanted = np.uint64(_hash(name))
        at = int(np.searchsorted(self._hashes, wanted))
        if at == len(self._hashes) or self._hashes[at] != wanted:
            raise ImageError("missing", f"{path} holds no {name}")
        offset, size = self._places[at].tolist()
        if size > MAX_FILE_BYTES:
            raise ImageError("too_large", f"{path}/{name} has {size:,} bytes")
        data = os.pread(descriptor, size, offset)
        if len(data) < size:
            raise ImageError("unreadable", f"{path}/{name}: the tar ends within it")
        return data


def _hash(name: str) -> Any:
    return xxhash.xxh3_64_intdigest(name.encode(errors="surrogateescape"))
