"""Writes featcache's store. Apart from its readers, which need not import an encoder."""

from __future__ import annotations

from pathlib import Path

from align.bench.providers.base import SHARD_IMAGES, STORE, Data
from align.bench.synthetic import write_store


def write(folder: Path, data: Data) -> None:
    write_store(folder / STORE, *data.shape, shard_images=SHARD_IMAGES)
