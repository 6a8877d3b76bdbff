"""The open files of one array, and what became of them meanwhile."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict

import numpy as np

from featcache.layout import Placement

_MOST = 4096
_FEWEST = 8
_SHARE = 8  # of the files that the process may open, for one array of one reader


def most_files() -> int:
    """That this process may open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class OpenFile:
    """A descriptor, open for as long as somebody holds this."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class OpenFiles:
    """The most recently used files of an array. Not safe for several threads at once.

    Remembers of every file which one it was (16 bytes each), so that another one under the same
    name is noticed.
    """

    def __init__(self, where: Placement, rows: int) -> None:
        self.where = where
        self._open: OrderedDict[int, OpenFile] = OrderedDict()
        self._seen = np.zeros((-(-rows // where.rows_per_file), 2), np.int64)
        self._capacity = max(1, min(_MOST, most_files() // _SHARE))

    @property
    def count(self) -> int:
        """Of all files."""
        return len(self._seen)

    def get(self, number: int) -> OpenFile | None:
        """The file of that number, where it is open."""
        file = self._open.get(number)
        if file is not None:
            self._open.move_to_end(number)
        return file

    def add(self, number: int, file: OpenFile, inode: int, modified_ns: int) -> bool:
        """A file that was opened; true where it is another one than it was before."""
        now = (inode, modified_ns)
        before = tuple(self._seen[number].tolist())
        self._seen[number] = now
        self._open[number] = file
        self._open.move_to_end(number)
        while len(self._open) > self._capacity:
            self._open.popitem(last=False)
        return before not in ((0, 0), now)

    def drop(self, number: int) -> None:
        """Let go of one; it is opened again when it is wanted."""
        self._open.pop(number, None)

    def shrink(self) -> None:
        """Let go of all, and keep half as many open from now on."""
        self._capacity = max(min(_FEWEST, self._capacity), self._capacity // 2)
        self.close()

    def close(self) -> None:
        """Let go of all."""
        self._open.clear()
