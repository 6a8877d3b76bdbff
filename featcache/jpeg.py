"""JPEGs by libjpeg-turbo without Pillow's copies, where the pixels are Pillow's bit for bit.

The extra `[fast]`. Pillow reads the header, so that what it refuses there stays refused, its limit
on pixels too. simplejpeg then decodes into Pillow's own layout of four bytes a pixel, and the
memory becomes an image through the Arrow C interface. docs/scale.md has the figures.
"""

from __future__ import annotations

import functools
import importlib.util

from PIL import Image

NEEDED = ("simplejpeg", "pyarrow")


@functools.cache
def installed() -> bool:
    """Whether `[fast]` is, beside a Pillow that takes other libraries' memory (11.2)."""
    return hasattr(Image, "fromarrow") and all(map(importlib.util.find_spec, NEEDED))


def load_jpeg(opened: Image.Image, data: bytes) -> Image.Image | None:
    """The RGB image of a JPEG (or of an MPO's first frame) that Pillow opened and has not loaded.

    None where Pillow must decode: CMYK and YCCK, which it converts by rules of its own, and
    whatever libjpeg-turbo warns about, since Pillow decides whether that is an image.
    Raises MemoryError.
    """
    import pyarrow
    import simplejpeg

    # What Pillow would tell its decoder: all of the file, colours as the file says.
    plain = [("jpeg", (0, 0, *opened.size), 0, (opened.mode, ""))]
    if opened.mode not in ("RGB", "L") or getattr(opened, "tile", None) != plain:
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGBX", strict=True)
    except ValueError:
        return None
    if pixels.shape[1::-1] != opened.size:
        return None
    quadruples = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(pixels.reshape(-1)), 4)
    return Image.fromarrow(quadruples, "RGB", opened.size)
