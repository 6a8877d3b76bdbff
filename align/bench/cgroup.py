"""A memory cgroup: processes whose page cache and own memory together stay below a limit."""

from __future__ import annotations

import os
import time
from pathlib import Path

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A cgroup of this process's making, v1 or v2; `close` moves what is in it back and removes it.

    Raises OSError where none can be made: not as root, or in a container that lends none.
    """

    def __init__(self, name: str) -> None:
        parent = V1 if V1.is_dir() else V2
        self.limit_file = "memory.limit_in_bytes" if parent == V1 else "memory.max"
        self.parent = parent
        self.folder = parent / f"{name}-{os.getpid()}"
        self.folder.mkdir()
        if not (self.folder / self.limit_file).exists():
            self.folder.rmdir()
            raise FileNotFoundError(f"{self.folder} has no {self.limit_file}")

    def add(self, pid: int) -> None:
        """Charge to the group what `pid` and its future children take from now on."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def limit(self, limit_bytes: int) -> None:
        (self.folder / self.limit_file).write_text(str(limit_bytes))

    def close(self) -> None:
        """Its processes have ended."""
        for attempt in range(50):
            try:
                self.folder.rmdir()
                return
            except OSError:  # an ended process stays in its group until the kernel is done with it
                if attempt == 49:
                    raise
                time.sleep(0.1)
