"""Makes the images beside this file, from arithmetic: `python make.py`.

They are shipped as files, not made when needed: what is probed is how these bytes are decoded, and
another encoder would write other bytes. Made once, with Pillow 13.0.0; making them anew changes
the fingerprint of every store.

Each has what decoders and resizers may differ in: chroma at half resolution, edges, frequencies up
to the sampling limit, sides that are no multiple of a block, alpha, a palette, 16 bits, CMYK,
several frames, an EXIF orientation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, Any]

FOLDER = Path(__file__).parent


def waves(height: int, width: int, pitch: int, top: int = 255) -> Array:
    """uint32[height, width] in [0, top]: rings that narrow outwards, as a zone plate's."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    phase = ((x * x + 2 * y * y) // pitch) % 512
    return (np.abs(256 - phase) * top // 256).astype(np.uint32)


def blocks(height: int, width: int, side: int) -> Array:
    """uint32[height, width] in [0, 255]: hard edges."""
    y, x = np.mgrid[:height, :width]
    return ((x // side * 5 + y // side * 3) % 4 * 85).astype(np.uint32)


def colours(height: int, width: int) -> Array:
    """uint8[height, width, 3]."""
    planes = [waves(height, width, 24), blocks(height, width, 13), waves(height, width, 9)]
    return np.stack(planes, -1).astype(np.uint8)


def grey16() -> Array:
    """uint16[41, 57]."""
    return waves(41, 57, 7, top=65535).astype(np.uint16)


def rgba() -> Array:
    """uint8[37, 53, 4]."""
    alpha = waves(37, 53, 11).astype(np.uint8)
    return np.concatenate([colours(37, 53), alpha[..., None]], -1)


def palette() -> Array:
    """uint8[29, 43], indices of 16 colours."""
    return (blocks(29, 43, 5) // 85 * 4 + waves(29, 43, 16, top=3)).astype(np.uint8)


def palette_colours() -> list[int]:
    """Red, green and blue of the 16 colours."""
    return [value for i in range(16) for value in (i * 17, 255 - i * 13, i * i % 256)]


def main() -> None:
    orientation = Image.Exif()
    orientation[0x0112] = 6
    photo = Image.fromarray(colours(35, 403))
    photo.save(FOLDER / "420.jpg", quality=60, subsampling="4:2:0", exif=orientation)
    progressive = Image.fromarray(colours(45, 61))
    progressive.save(FOLDER / "444.jpg", quality=75, subsampling="4:4:4", progressive=True)
    cmyk = Image.fromarray(rgba()[:, :, [1, 0, 2, 3]].copy(), "CMYK")
    cmyk.save(FOLDER / "cmyk.jpg", quality=75)
    Image.fromarray(rgba()).save(FOLDER / "rgba.png", optimize=True)
    Image.fromarray(grey16()).save(FOLDER / "grey16.png", optimize=True)
    indexed = Image.fromarray(palette()).convert("P")
    indexed.putpalette(palette_colours())
    indexed.save(FOLDER / "palette.png", optimize=True, transparency=3)
    frames = [Image.fromarray(plane) for plane in np.moveaxis(colours(23, 31), -1, 0)]
    frames[0].save(FOLDER / "frames.gif", save_all=True, append_images=frames[1:])


if __name__ == "__main__":
    main()
