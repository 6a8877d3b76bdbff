"""A cache of frozen vision-encoder features: encode once, read back at memory speed.

import featcache
store = featcache.open("store.zarr")
rows = store.rows(["000/1.jpg", "000/2.jpg"])
with store.reader() as reader:
    features = reader.read(rows)          # float16[2, 729, 1152]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from featcache.object_path import ObjectPath
    from featcache.store import Store

__all__ = ["open"]


def open(
    path: Path | ObjectPath | str,
    *,
    cache_dir: Path | str | None = None,
    cache_bytes: int | None = None,
) -> Store:
    """Open a finished feature store for reading, on a disk or in a bucket (s3://bucket/store.zarr).

    cache_dir, cache_bytes: the folder on a local disk that keeps what is fetched from a bucket, and
    how much at the most; None takes a folder of the user's caches, and half of what is free there.

    Raises StoreError, IncompleteStoreError or CorruptStoreError (featcache/errors.py).
    """
    # Imported here so that `import featcache` and every --help stay instant.
    from featcache.store import Store

    return Store(path, cache_dir=cache_dir, cache_bytes=cache_bytes)
