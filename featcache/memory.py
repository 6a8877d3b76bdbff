"""How much memory this process can have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def available_bytes() -> int:
    """Memory that could be had without swapping, what caches hold of files included: the least
    that the machine and the control groups of this process leave.
    """
    return min(_machine_bytes(), *_group_bytes())


def _machine_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_bytes(proc: Path = Path("/proc"), mount: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What each limit of memory above this process leaves; at least one, however large."""
    yield 1 << 62
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers == "":  # version 2
            root, limit, own = mount, "memory.max", ("anon", "shmem")
        elif "memory" in controllers.split(","):
            root, limit = mount / "memory", "memory.limit_in_bytes"
            own = ("total_rss", "total_shmem")
        else:
            continue
        # In a container the path may be that of the host, of which only the mount's root is seen.
        folder = root / inside.strip("/")
        for group in [folder, *folder.parents]:
            if not group.is_relative_to(root):
                break
            try:
                most = int((group / limit).read_text())  # "max" is no number, and no limit
                used = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
                yield max(0, most - sum(int(used.get(name, 0)) for name in own))
            except (OSError, ValueError):
                continue
