"""Whether a store is, byte for byte, what was written, and what of it can be mended.

Each data file is read once, from its beginning to its end in blocks: its checksum is compared with
the commit record's, and its values are checked to be finite on the way. Only where a checksum
differs are the rows looked at one by one. Everything that is derived (array metadata, index) is
worked out again and compared.

RAM: one block (`BLOCK_BYTES`, at least a row) and one shard's patch scales and pooled outputs a
worker, and what the plans and the index take.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featcache.codecs import get_codec
from featcache.errors import StoreError
from featcache.extract import metadata
from featcache.files import render_json
from featcache.journal import num_rows
from featcache.layout import StoreInfo, copy_path, group_metadata
from featcache.store import form_of
from featcache.verify.files import check_channels, check_content, check_plans, check_root
from featcache.verify.index import check_index, note_leftovers
from featcache.verify.report import (
    RECOMPILE,
    REWRITE,
    Inspection,
    OnProgress,
    Problem,
    VerifyProgress,
    VerifyReport,
)
from featcache.verify.shards import BLOCK_BYTES, check_shards

__all__ = [
    "BLOCK_BYTES",
    "RECOMPILE",
    "Inspection",
    "OnProgress",
    "Problem",
    "VerifyProgress",
    "VerifyReport",
    "inspect",
    "require_folder",
    "verify",
]


def verify(
    root: Path, *, workers: int = 2, on_progress: OnProgress = lambda _: None
) -> VerifyReport:
    """Check everything in the store at `root`, and change nothing.

    Raises StoreError for what is no store, one of a newer format, or one that is being written.
    """
    start = time.monotonic()
    if form_of(root).one_file:
        from featcache.verify.hdf5 import inspect_hdf5

        found = inspect_hdf5(root, on_progress)
    else:
        require_folder(root)
        with _not_written(root):
            found = inspect(root, workers, on_progress)
    return found.report(time.monotonic() - start)


def require_folder(root: Path) -> None:
    """Raises StoreError where `root` is not a store's folder, be it a damaged one."""
    begun = (root / "journal").exists() and (root / "zarr.json").exists()
    if not begun and not (root / copy_path("zarr.json")).exists():
        StoreInfo.load(root)


@contextmanager
def _not_written(root: Path) -> Iterator[None]:
    """Keep writers away meanwhile. A store on a read-only medium has none."""
    try:
        lock = (root / "journal" / "lock").open("rb")
    except OSError:
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"another process is writing {root}; wait for it, or stop it and run again"
            ) from None
        yield


def inspect(
    root: Path,
    workers: int,
    on_progress: OnProgress = lambda _: None,
    only: frozenset[int] | None = None,
) -> Inspection:
    """Look at a store that no one writes meanwhile. only: the shards whose data files are read.

    Raises StoreError for a newer format.
    """
    found = Inspection(root)
    check_root(found)
    if found.info is None:
        return found
    check_plans(found)
    check_channels(found, found.info)
    if found.plans_whole:
        documents: dict[str, Any] = dict(
            metadata(found.info, get_codec(found.info.codec), num_rows(found.plans))
        )
        if found.info.index:
            for group in ("index", found.info.index, f"{found.info.index}/checksums"):
                documents[f"{group}/zarr.json"] = group_metadata()
        for path, document in documents.items():
            check_content(found, path, render_json(document), REWRITE)
    check_shards(found, found.info, workers, on_progress, only)
    check_index(found, found.info)
    if found.plans_whole:
        note_leftovers(found, found.info)
    if found.unfinished:
        found.notes.append(
            f"{found.unfinished} planned shards are not there yet: the extraction was stopped; run "
            "the same `featcache extract` command again to finish it"
        )
    return found
