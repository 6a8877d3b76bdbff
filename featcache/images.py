"""Image bytes -> RGB pixels, the one way that every path of the project uses.

The rule, recorded in each store's fingerprint: first frame, `.convert("RGB")`, EXIF orientation
ignored (as LLaVA and Cambrian read their images). 16-bit greyscale is scaled to 8 bits, because
Pillow's own conversion clips it to white.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from featcache.errors import ImageError

PIXEL_RULE = {"convert": "RGB", "exif": "ignored", "frame": "first", "grey16": "scaled to 8 bits"}


def digest(data: bytes) -> bytes:
    """The identity of an image: BLAKE2b of its file's bytes, 16 bytes long."""
    return hashlib.blake2b(data, digest_size=16).digest()


def read_bytes(path: Path) -> bytes:
    """The file's bytes. Raises ImageError ("missing" or "unreadable")."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError("missing", f"{path} does not exist") from None
    except OSError as error:
        raise ImageError("unreadable", f"{path}: {error.strerror}") from None


def decode(data: bytes) -> tuple[Image.Image, tuple[int, int]]:
    """Decode to an RGB image; also its original (width, height) in pixels.

    Raises ImageError: "undecodable" (not an image, truncated, a mode without defined range) or
    "too_large" (Pillow's decompression-bomb limit).
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
            return _to_rgb(image), size
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from None
    except UnidentifiedImageError:
        raise ImageError("undecodable", "not an image format that Pillow knows") from None
    except (ImageError, MemoryError):
        raise
    # On damaged files Pillow's forty plugins raise whatever their parsers run into (struct.error,
    # RuntimeError, NotImplementedError, ZeroDivisionError, ...); all of it means the same here.
    except Exception as error:
        raise ImageError("undecodable", str(error) or type(error).__name__) from None


def load_image(path: Path) -> Image.Image:
    """`decode(read_bytes(path))`'s image. Raises ImageError."""
    return decode(read_bytes(path))[0]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError("undecodable", f"mode {image.mode} has no defined white; convert it first")
    if image.mode == "P" and "transparency" in image.info:
        # The same RGB values as the direct conversion, without Pillow's warning.
        image = image.convert("RGBA")
    return image.convert("RGB")
