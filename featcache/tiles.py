"""Any-resolution tiling: an image as a whole and cut into tiles, each a row of the store.

The rule is LLaVA-NeXT's (llava/mm_utils.py: select_best_resolution, resize_and_pad_image,
divide_to_patches; `image_aspect_ratio` "anyres"; transformers' LlavaNextImageProcessor does the
same). Of the grids allowed, the one in which the image keeps most pixels is chosen, and of those
the one that wastes least; the image is resized into it with its aspect ratio (bicubic), centred on
black, and cut into views of the encoder's size. The whole image stays a row of its own, under its
own key, prepared as ever.

Tile `i` of `a.jpg` in a grid of 2 columns and 3 rows has the key `a.jpg#2x3:i`; tiles are counted
along the rows. No image key ends like that (featcache/manifests.py refuses them), so a key alone
tells what is to be encoded. A tile's identity is a digest of its image's digest and its place.

RAM of a process: `CANVASES_BYTES` for the latest resized images, and one image being decoded for
each thread. An image is decoded twice: as a whole, and for all its tiles.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import xxhash
from PIL import Image

from featcache.errors import ConfigError, ImageError
from featcache.images import decode, digest, header_size
from featcache.once import OnceCache

if TYPE_CHECKING:
    from featcache.encoders import Encoder

CANVASES_BYTES = 64 << 20
"""Of resized images that one process keeps: 48 of 2 x 2 views of 336 pixels."""
MOST_TILES = 64
"""That a grid may have."""
RULE = {"rule": "llava-next", "resample": "bicubic", "pad": "black"}
"""How tiles are made, as it stands in a store's fingerprint."""

Grid = tuple[int, int]
"""(columns, rows) of tiles."""

_SUFFIX = re.compile(r"#([1-9]\d*)x([1-9]\d*):(\d+)\Z")
_GRID = re.compile(r"([1-9]\d*)x([1-9]\d*)")
_canvases: OnceCache[tuple[bytes, Grid, tuple[int, int]], tuple[Image.Image, tuple[int, int]]] = (
    OnceCache(CANVASES_BYTES, lambda made: 3 * made[0].width * made[0].height)
)


@dataclass(frozen=True, slots=True)
class Tiling:
    """Which grids images may be cut into. view: (height, width) of the encoder's input, in pixels.

    The order of `grids` decides between two that suit an image equally.
    """

    grids: tuple[Grid, ...]
    view: tuple[int, int]

    @classmethod
    def for_encoder(cls, grids: tuple[Grid, ...], fingerprint: Mapping[str, Any]) -> Self | None:
        """Of these grids, for an encoder by its fingerprint; None for no grids. Raises ConfigError
        where the encoder takes images of any size."""
        if not grids:
            return None
        pixels = fingerprint["preprocessing"]
        if not {"height", "width"} <= set(pixels):
            raise ConfigError(
                f"--tiles: {fingerprint['encoder']['name']} has no fixed input size to cut tiles of"
            )
        return cls(grids, (pixels["height"], pixels["width"]))

    @classmethod
    def of(cls, fingerprint: Mapping[str, Any]) -> Self | None:
        """That of a store by its fingerprint; None where images are not tiled."""
        stated = fingerprint.get("tiles")
        if stated is None:
            return None
        return cls(parse_grids(",".join(stated["grids"])), (stated["height"], stated["width"]))

    def describe(self) -> dict[str, Any]:
        """The settings as they stand in a store's fingerprint."""
        height, width = self.view
        grids = [f"{columns}x{rows}" for columns, rows in self.grids]
        return {"grids": grids, "height": height, "width": width, **RULE}

    def grid_of(self, size: tuple[int, int]) -> Grid:
        """The grid for an image of `size` (width, height) in pixels."""
        height, width = self.view
        best, most, least = self.grids[0], -1, 0
        for columns, rows in self.grids:
            area = columns * width * rows * height
            scale = min(columns * width / size[0], rows * height / size[1])
            kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
            wasted = area - kept
            if kept > most or (kept == most and wasted < least):
                best, most, least = (columns, rows), kept, wasted
        return best

    def keys_of(self, key: str, size: tuple[int, int]) -> list[str]:
        """The keys of the tiles of an image of `size` (width, height)."""
        columns, rows = self.grid_of(size)
        return [f"{key}#{columns}x{rows}:{i}" for i in range(columns * rows)]

    def keys_in(self, key: str, data: bytes) -> list[str]:
        """The same from the image's bytes; none where not even their header can be read."""
        try:
            return self.keys_of(key, header_size(data))
        except ImageError:
            return []


def with_tiles(fingerprint: Mapping[str, Any], tiling: Tiling | None) -> dict[str, Any]:
    """An encoder's fingerprint as that of a store whose images are cut like that."""
    return {**fingerprint, **({"tiles": tiling.describe()} if tiling else {})}


def parse_grids(text: str) -> tuple[Grid, ...]:
    """ "1x2,2x1,2x2" (columns x rows), or "1x1..3x3" for all between, in LLaVA-NeXT's order.

    Raises ConfigError.
    """
    found: list[Grid] = []
    for part in text.replace(" ", "").split(","):
        ends = [_GRID.fullmatch(end) for end in part.split("..")]
        if not 1 <= len(ends) <= 2 or None in ends:
            raise ConfigError(
                f"--tiles {text!r}: {part!r} is no grid; write columns x rows, e.g. 1x2,2x1,2x2, "
                "or a range of them, e.g. 1x1..3x3"
            )
        first, last = (tuple(map(int, end.groups())) for end in (ends[0], ends[-1]) if end)
        grids = [
            (columns, rows)
            for columns in range(first[0], last[0] + 1)
            for rows in range(first[1], last[1] + 1)
        ]
        if not grids or max(columns * rows for columns, rows in grids) > MOST_TILES:
            raise ConfigError(
                f"--tiles {text!r}: {part!r} "
                + ("is empty" if not grids else f"has more than {MOST_TILES} tiles an image")
            )
        found += grids
    return tuple(dict.fromkeys(found))


def split_key(key: str) -> tuple[str, Grid | None, int]:
    """(the image's key, the grid, the number of the tile); (key, None, 0) for a whole image."""
    found = _SUFFIX.search(key)
    if not found:
        return key, None, 0
    return key[: found.start()], (int(found[1]), int(found[2])), int(found[3])


def image_key(key: str) -> str:
    """The key of the image that a row's key is of: itself, or what a tile is cut from."""
    return split_key(key)[0]


def is_tile(key: str) -> bool:
    return _SUFFIX.search(key) is not None


def digest_of(data: bytes, key: str) -> bytes:
    """The identity of what a row's key means: that of the image, or of one tile of it; 16 bytes.

    data: the bytes of the image.
    """
    image = digest(data)
    return tile_digest(image, key) if is_tile(key) else image


def tile_digest(image: bytes, key: str) -> bytes:
    """image: digest of the image that tile `key` is cut from."""
    _, _, place = key.rpartition("#")
    return hashlib.blake2b(image + place.encode(), digest_size=16).digest()


def open_view(data: bytes, key: str, view: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """What the encoder is shown for a row's key, RGB: the image, or a tile of `view` (height,
    width) pixels; and the image's original (width, height).

    data: the bytes of the image. Raises ImageError as `featcache.images.decode`.
    """
    _, grid, number = split_key(key)
    if grid is None:
        return decode(data)
    height, width = view
    image = xxhash.xxh3_128_digest(data)
    canvas, size = _canvases.get((image, grid, view), lambda: _fitted(data, grid, view))
    row, column = divmod(number, grid[0])
    left, top = column * width, row * height
    return canvas.crop((left, top, left + width, top + height)), size


def prepare(encoder: Encoder, view: Image.Image, key: str) -> np.ndarray[Any, Any]:
    """uint8[height, width, 3], what `encoder` takes, of what `open_view` gave for a row's key.

    A tile has the encoder's size already, so no fit enlarges or crops it again. Raises ImageError
    as `Encoder.preprocess`.
    """
    return np.array(view) if is_tile(key) else encoder.preprocess(view)


def _fitted(data: bytes, grid: Grid, view: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """The image resized into the grid and centred on black; and its original size."""
    image, size = decode(data)
    width, height = grid[0] * view[1], grid[1] * view[0]
    scale_x, scale_y = width / size[0], height / size[1]
    if scale_x < scale_y:
        fitted = (width, min(math.ceil(size[1] * scale_x), height))
    else:
        fitted = (min(math.ceil(size[0] * scale_y), width), height)
    canvas = Image.new("RGB", (width, height))
    resized = image.resize(fitted, Image.Resampling.BICUBIC)
    canvas.paste(resized, ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    return canvas, size


def tiles_of_all(
    tiling: Tiling, keys: Sequence[str], sizes: Sequence[tuple[int, int]]
) -> tuple[list[str], list[int]]:
    """The tile keys of several images one after the other, and how many each image has."""
    each = [tiling.keys_of(key, size) for key, size in zip(keys, sizes, strict=True)]
    return [tile for tiles in each for tile in tiles], [len(tiles) for tiles in each]
