"""Where the bytes of images lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.containers import CONTAINER_SUFFIXES, read_member
from featcache.errors import ImageError
from featcache.images import MAX_FILE_BYTES, read_bytes
from featcache.journal import Plan
from featcache.object_path import ObjectPath, StorePath, is_url, parse_location
from featcache.tiles import image_key


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image by its key below an image root; small, and good on any machine that sees the root.

    root: absolute path of a folder, or a prefix in a bucket (s3://bucket/images). key: POSIX path
    below it.
    """

    root: str
    key: str

    def read(self) -> bytes:
        """The bytes of the image's file, or of a member of the container that its key leads into;
        for the key of a tile (featcache/tiles.py) those of the image that it is cut from.

        Raises ImageError as `featcache.images.read_bytes` and `featcache.containers.read_member`,
        and ObjectStoreError.
        """
        key = image_key(self.key)
        if is_url(self.root):
            return read_object(parse_location(self.root), key)
        try:
            return read_bytes(Path(self.root, key))
        except ImageError as error:
            if error.reason not in ("missing", "unreadable"):
                raise
            data = read_member(self.root, key)
            if data is None:
                raise
            return data

    def __str__(self) -> str:
        if is_url(self.root):
            return f"{self.root}/{self.key}"
        return str(Path(self.root, self.key))


def image_at(place: StorePath) -> ImageRef:
    """The image at one place, which may lie below a tar or parquet file."""
    if isinstance(place, ObjectPath):
        return ImageRef(place.bucket, place.key)
    absolute = place.absolute()
    return ImageRef(absolute.anchor, absolute.relative_to(absolute.anchor).as_posix())


def read_object(root: StorePath, key: str) -> bytes:
    """The bytes of an image in a bucket. Raises ImageError as `featcache.images.read_bytes`, and
    ObjectStoreError where that is not about this one image."""
    path = root / key
    assert isinstance(path, ObjectPath)
    try:
        data = path.read_at_most(MAX_FILE_BYTES)
    except FileNotFoundError:
        container = _container(root, key)
        if container is not None:
            raise ImageError(
                "unreadable", f"{container}: images in it are read from a disk; copy it there"
            ) from None
        raise ImageError("missing", f"{path} does not exist") from None
    except OSError as error:
        raise ImageError("unreadable", f"{path}: {error.strerror}") from None
    except MemoryError:
        raise ImageError("too_large", f"{path} does not fit in memory") from None
    if isinstance(data, int):
        raise ImageError("too_large", f"{path} has {data:,} bytes")
    return data


def _container(root: StorePath, key: str) -> StorePath | None:
    """The object that a key leads into, where it is named like a tar or a parquet file."""
    parts = key.split("/")
    for i, part in enumerate(parts[:-1], 1):
        if part.endswith(CONTAINER_SUFFIXES):
            place = root / "/".join(parts[:i])
            return place if place.is_file() else None
    return None


class Sources:
    """Where the images of rows lie: under every key that any plan gave them, below the image root
    of now and that of the plan, newest plan first. A file may have been renamed since."""

    def __init__(self, plans: Sequence[Plan], image_root: str) -> None:
        self._plans = [
            (plan, tuple(dict.fromkeys((image_root, plan.image_root))), order, plan.rows[order])
            for plan in reversed(plans)
            for order in (np.argsort(plan.rows, kind="stable"),)
        ]

    def refs(self, first_row: int, count: int = 1) -> list[tuple[ImageRef, ...]]:
        """Of each of `count` rows, each place once, the likeliest first."""
        found: list[dict[ImageRef, None]] = [{} for _ in range(count)]
        for plan, roots, order, rows in self._plans:
            first, last = np.searchsorted(rows, [first_row, first_row + count])
            here = zip(order[first:last].tolist(), rows[first:last].tolist(), strict=True)
            for at, row in here:
                refs = ((ImageRef(root, plan.keys[at]), None) for root in roots)
                found[row - first_row].update(refs)
        return [tuple(places) for places in found]
