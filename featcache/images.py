"""Image bytes -> RGB pixels, the one way that every path of the project uses.

The rule, recorded in each store's fingerprint: first frame, `.convert("RGB")`, EXIF orientation
ignored (as LLaVA and Cambrian read their images). 16-bit greyscale is scaled to 8 bits, because
Pillow's own conversion clips it to white.

An image is its pixels or an ImageError, nothing else: what Pillow merely warns about (odd EXIF,
trailing bytes, 89 to 179 megapixels) is an image, and neither shows on the user's terminal nor
becomes an error where warnings are errors. A truncated file is no image.

RAM while one image is decoded: 8 bytes a pixel, progressive JPEG 10, JPEG2000 14, WEBP 16; at
Pillow's limit of 179 megapixels 1.4, 1.8, 2.5 and 2.9 GB.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import logging
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from featcache.errors import ImageError

T = TypeVar("T")

PIXEL_RULE = {"convert": "RGB", "exif": "ignored", "frame": "first", "grey16": "scaled to 8 bits"}

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""What is opened; JPEG includes MPO, PNG includes APNG. An image comes from a stranger, so nothing
else is tried: EPS starts Ghostscript, IPTC opens what it holds in any format (EPS too), WMF, FPX,
MIC, BUFR, GRIB and HDF5 are left to other libraries, and TGA, SPIDER, PCX or IM know themselves by
so little that other files pass for them."""
MAX_FILE_BYTES = 8 * 178_956_970
"""Larger files are not read: 16-bit RGBA at Pillow's limit of pixels."""
DETAIL_CHARACTERS = 200

_GREY16_TO_8 = [(value * 255 + 32767) // 65535 for value in range(65536)]

# One plugin reports through logging, which prints on stderr where no one has configured it.
logging.getLogger("PIL").addHandler(logging.NullHandler())
# libtiff prints a line on stderr for each damaged file, for which Pillow has no switch. Where this
# Pillow's libtiff cannot be reached, the lines stay.
with suppress(AttributeError, OSError):
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


def digest(data: bytes) -> bytes:
    """The identity of an image: BLAKE2b of its file's bytes, 16 bytes long."""
    return hashlib.blake2b(data, digest_size=16).digest()


def read_bytes(path: Path) -> bytes:
    """The file's bytes.

    Raises ImageError: "missing", "unreadable" (also what is no regular file), or "too_large" (more
    than `MAX_FILE_BYTES`).
    """
    try:
        # Opening a named pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if stat.S_ISDIR(found.st_mode):
                raise ImageError("unreadable", f"{path} is a directory")
            if not stat.S_ISREG(found.st_mode):
                raise ImageError("unreadable", f"{path} is not a regular file")
            if found.st_size > MAX_FILE_BYTES:
                raise ImageError("too_large", f"{path} has {found.st_size:,} bytes")
            with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise ImageError("missing", f"{path} does not exist") from None
    except OSError as error:
        raise ImageError("unreadable", f"{path}: {error.strerror}") from None
    except MemoryError:
        raise ImageError("too_large", f"{path} does not fit in memory") from None


def decode(data: bytes) -> tuple[Image.Image, tuple[int, int]]:
    """Decode to an RGB image; also its original (width, height) in pixels.

    Raises ImageError: "undecodable" (none of `FORMATS`, damaged, a mode without defined range) or
    "too_large" (Pillow's decompression-bomb limit, or more than the memory holds).
    """

    def both(image: Image.Image) -> tuple[Image.Image, tuple[int, int]]:
        size = image.size
        return _to_rgb(image), size

    return _opened(data, both)


def header_size(data: bytes) -> tuple[int, int]:
    """The size that `decode` gives, from the header alone. Raises ImageError where that tells that
    it cannot be decoded."""
    return _opened(data, lambda image: image.size)


def _opened(data: bytes, take: Callable[[Image.Image], T]) -> T:
    """What `take` makes of the image. Raises ImageError as `decode`."""
    size = None
    try:
        with _without_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            size = image.size
            return take(image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", _one_line(error)) from None
    except MemoryError:
        what = f"{size[0]} x {size[1]} pixels do" if size else "it does"
        raise ImageError("too_large", f"{what} not fit in memory") from None
    except UnidentifiedImageError:
        raise ImageError("undecodable", "no image of a known format") from None
    # On damaged files Pillow's plugins raise whatever their parsers run into (struct.error,
    # RuntimeError, NotImplementedError, ZeroDivisionError, ...); all of it means the same here.
    except Exception as error:
        raise ImageError("undecodable", _one_line(error)) from None


def load_image(path: Path) -> Image.Image:
    """`decode(read_bytes(path))`'s image. Raises ImageError."""
    return decode(read_bytes(path))[0]


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    # Not wanted, and a damaged one would stop the conversion.
    image.info.pop("transparency", None)
    if image.mode == "RGB" and image.format in ("JPEG", "MPO", "PNG"):
        return image  # `convert` would copy it; other plugins keep their decoder's memory as well
    # Pillow reads PPM of more than 8 bits as mode I, scaled to 16.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return image.convert("I").point(_GREY16_TO_8, "L").convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError("undecodable", f"mode {image.mode} has no defined white; convert it first")
    return image.convert("RGB")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:DETAIL_CHARACTERS] or type(error).__name__


_PILLOWS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_warnings_lock = threading.Lock()
_decoding = 0


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Within: Pillow's warnings are ignored.

    `warnings.catch_warnings` is not for threads: the filters are the process's, and it puts back
    those that it found. Here the first thread in adds one filter and the last out removes it.
    """
    global _decoding
    filters: list[object] = warnings.filters  # type: ignore[assignment]
    with _warnings_lock:
        _decoding += 1
        if _PILLOWS not in filters:
            filters.insert(0, _PILLOWS)
    try:
        yield
    finally:
        with _warnings_lock:
            _decoding -= 1
            if not _decoding and _PILLOWS in warnings.filters:
                warnings.filters.remove(_PILLOWS)  # type: ignore[attr-defined]
