"""Publishing bytes so that a reader sees all of them or none.

Every file of a store is written under a temporary name beside its place, synced, and renamed.
A temporary name starts with `PARTIAL`; what a killed process leaves is swept by the next run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"


def publish(path: Path, parts: Iterable[bytes | memoryview]) -> int:
    """Write `parts` one after the other to `path`, atomically; returns the bytes written.

    Raises OSError as the file system gives it (ENOSPC, EACCES, ...); `path` is then untouched.
    """
    unsynced = [path.parent]
    while not unsynced[-1].exists():
        unsynced.append(unsynced[-1].parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}")
    try:
        with partial.open("wb", buffering=0) as file:
            for part in parts:
                rest = memoryview(part).cast("B")
                while rest:
                    rest = rest[file.write(rest) or 0 :]
            size = file.tell()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    for directory in unsynced:
        sync(directory)
    return size


def publish_json(path: Path, document: object) -> None:
    """`publish` of a JSON document, unless just that is there already.

    Raises OSError, and ValueError for NaN or infinity.
    """
    content = json.dumps(document, indent=1, allow_nan=False).encode()
    if not (path.is_file() and path.read_bytes() == content):
        publish(path, [content])


def read_json(path: Path) -> Any:
    """The JSON document at `path`. Raises FileNotFoundError, and ValueError where it is no JSON."""
    return json.loads(path.read_bytes())


def sweep(root: Path) -> int:
    """Remove what killed writers left below `root`; returns how many files that were.

    Only for the holder of the store's lock: a live writer's partial file would go too.
    """
    partials = list(root.rglob(f"{PARTIAL}*"))
    for partial in partials:
        partial.unlink(missing_ok=True)
    return len(partials)


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, has reached the disk.

    A rename survives a power loss only once its directory has.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
