"""What a process and its children use, by /proc, and the page cache."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a process and those of its children that live. cpu_s: since their starts.
    read_bytes: really fetched from a disk, read-ahead included."""

    cpu_s: float
    read_bytes: int

    def since(self, before: Usage) -> Usage:
        return Usage(self.cpu_s - before.cpu_s, self.read_bytes - before.read_bytes)


def usage(pid: int) -> Usage:
    tree = process_tree(pid)
    return Usage(sum(map(cpu_s, tree)), sum(map(read_bytes, tree)))


def process_tree(pid: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found


def cpu_s(pid: int) -> float:
    """In nanoseconds' resolution, where /proc/PID/stat counts ticks of 10 ms: by the CPU clock of
    another process, whose number Linux makes of the pid (clock_getcpuclockid)."""
    return time.clock_gettime(~pid << 3 | 2)


def read_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def memory_bytes(pid: int, *names: str) -> int:
    """The sum of lines of /proc/PID/status, e.g. VmHWM, RssAnon, RssShmem."""
    found = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return sum(int(found[name].split()[0]) * 1024 for name in names)


def proportional_bytes(pid: int) -> int:
    """Memory of a process in which what it shares counts by its share (Pss)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def forget_peak() -> None:
    """Lower this process's VmHWM to what it has in memory now."""
    Path("/proc/self/clear_refs").write_text("5")


def unmap_pages(folder: Path) -> None:
    """Take what this process maps of files below `folder` out of its memory; a touch brings it
    back. The kernel drops no page from its cache that someone has mapped and touched."""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(f"{folder}/"):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            length = end - start
            if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), f"madvise of {fields[5]}")


def sync(paths: Iterable[Path]) -> None:
    """Until a page is on the disk, the kernel does not drop it."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def drop(paths: Iterable[Path]) -> None:
    """Have the kernel forget the pages of files, which are on the disk already."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
