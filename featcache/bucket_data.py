"""Data in a bucket: JSON and JSONL files, and the image files below a prefix.

Tars, parquet and saved datasets are read in place by random access, which a bucket bills by the
request: they are copied to a disk first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from featcache.containers import CONTAINER_SUFFIXES
from featcache.entries import text_entries
from featcache.errors import ManifestError
from featcache.object_path import ObjectPath, StorePath
from featcache.samples import IMAGE_SUFFIXES, is_image

_OF_DISKS = (*CONTAINER_SUFFIXES, ".yaml", ".yml", ".arrow")


def is_folder(path: ObjectPath) -> bool:
    """Raises ManifestError for what can be neither listed nor read."""
    try:
        if path.key and path.is_file():
            return False
        if path.is_dir():
            return True
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}; check --data") from None
    raise ManifestError(f"{path} does not exist; check --data")


def list_bucket(path: ObjectPath, root: StorePath) -> Iterator[tuple[str, Any]]:
    """As `listing.list_elements`; a prefix takes one request for each 1,000 objects.

    Raises ManifestError, ObjectStoreError.
    """
    if not is_folder(path):
        if path.suffix in _OF_DISKS:
            raise ManifestError(f"{path}: a {path.suffix} file is read from a disk; copy it there")
        yield from text_entries(path)
        return
    try:
        base = path.relative_to(root)
    except ValueError:
        raise ManifestError(
            f"{path} lies outside of the image root {root}; name a prefix above both with --images"
        ) from None
    names = sorted(name for name, _ in path.listing() if is_image(name))
    if not names:
        raise ManifestError(f"{path} holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))})")
    for name in names:
        key = PurePosixPath(base / name).as_posix()
        yield f"{path}/{name}", {"id": key, "images": [key], "conversations": []}
