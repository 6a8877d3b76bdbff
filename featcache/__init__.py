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
    from featcache.store import Store

__all__ = ["open"]


def open(path: Path | str) -> Store:
    """Open a finished feature store for reading.

    Raises StoreError, IncompleteStoreError or CorruptStoreError (featcache/errors.py).
    """
    # Imported here so that `import featcache` and every --help stay instant.
    from featcache.store import Store

    return Store(path)
