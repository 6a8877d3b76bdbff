"""A zoo of odd, damaged and hostile image files, the same at each call."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from featcache.images import FORMATS, MAX_FILE_BYTES

MODES = (
    "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I I;16 I;16L I;16B F".split()  # noqa: SIM905
)
UNREADABLE_BACK = frozenset(("PDF", "PALM"))
"""Formats that Pillow writes and does not read."""
FEATURES = "features"
ANY = frozenset((FEATURES, "undecodable", "too_large"))
"""What damage may come to."""

_RNG = np.random.default_rng(0)
_SMOOTH = Image.fromarray(_RNG.integers(0, 256, (3, 4, 3), dtype=np.uint8))
PHOTO = _SMOOTH.resize((61, 47), Image.Resampling.BICUBIC)


@dataclass(frozen=True, slots=True)
class Specimen:
    """One file. outcomes: what it may come to: "features", or reasons of the ledger."""

    data: bytes
    outcomes: frozenset[str]


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # some formats go with Pillow 15
        image.save(buffer, format, **options)
    return buffer.getvalue()


def in_mode(mode: str) -> Image.Image:
    """The photo in any of Pillow's modes, also those that no conversion leads to."""
    grey = np.asarray(PHOTO.convert("L"))
    if mode.startswith("I;16"):
        raw = (grey.astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2")
        return Image.frombytes(mode, PHOTO.size, raw.tobytes())
    if mode == "LAB":
        return Image.frombytes("LAB", PHOTO.size, PHOTO.tobytes())
    if mode in ("La", "RGBa"):
        return PHOTO.convert(mode.upper()).convert(mode)
    if mode == "PA":
        return PHOTO.convert("P").convert("PA")
    if mode in ("I", "F"):
        return PHOTO.convert("L").convert(mode)
    return PHOTO.convert(mode)


def written() -> dict[str, Specimen]:
    """The photo in each format that Pillow writes, times each mode that the format takes."""
    Image.init()
    zoo = {}
    suffixes: dict[str, str] = {}
    for suffix, format in Image.registered_extensions().items():
        suffixes.setdefault(format, suffix)
    suffixes |= {"JPEG": ".jpg", "PNG": ".png", "TIFF": ".tiff", "PPM": ".ppm", "MPO": ".jpeg"}
    for format in sorted(Image.SAVE):
        for mode in MODES:
            # A format without a way to write this mode says so by any of these.
            with suppress(OSError, ValueError, KeyError, AttributeError):
                name = f"{format}-{mode.replace(';', '_')}{suffixes.get(format, '.' + format)}"
                data = encoded(in_mode(mode), format)
                zoo[name] = Specimen(data, frozenset((_whole(data, format),)))
    return zoo


def _whole(data: bytes, format: str) -> str:
    """What an undamaged file must come to, by what Pillow alone makes of it."""
    if format in UNREADABLE_BACK or format not in (*FORMATS, "MPO"):
        return "undecodable"
    with Image.open(io.BytesIO(data)) as image:
        if image.mode == "F" or (image.mode == "I" and format != "PPM"):
            return "undecodable"
        try:
            image.convert("RGB")
        except ValueError:  # LAB, with older Pillows
            return "undecodable"
    return FEATURES


def variants() -> dict[str, Specimen]:
    """Whole images in unusual dress."""
    frames = [PHOTO, PHOTO.rotate(90), PHOTO.rotate(180)]
    animated = {"save_all": True, "append_images": frames[1:]}
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = in_mode("I;16")
    palette = PHOTO.quantize(16)
    jpeg = encoded(PHOTO, "JPEG")
    zoo = {
        "animated.gif": encoded(frames[0], "GIF", **animated),
        "animated.webp": encoded(frames[0], "WEBP", **animated),
        "animated.png": encoded(frames[0], "PNG", **animated),
        "animated.avif": encoded(frames[0], "AVIF", **animated),
        "pages.tiff": encoded(frames[0], "TIFF", **animated),
        "stereo-mpo.jpg": encoded(frames[0], "MPO", **animated),
        "exif-rotated.jpg": encoded(PHOTO, "JPEG", exif=exif),
        "progressive.jpg": encoded(PHOTO, "JPEG", progressive=True),
        "adobe-cmyk.jpg": encoded(PHOTO.convert("CMYK"), "JPEG", quality=90),
        "grey.jpg": encoded(PHOTO.convert("L"), "JPEG"),
        "trailing-garbage.jpg": jpeg + bytes(range(256)) * 20,
        "interlaced.png": interlaced_png(PHOTO),
        "grey16.png": encoded(grey16, "PNG"),
        "grey16.tif": encoded(grey16, "TIFF"),
        "grey16.jp2": encoded(grey16, "JPEG2000"),
        "lossless.webp": encoded(PHOTO, "WEBP", lossless=True),
        "1x1.png": encoded(PHOTO.crop((0, 0, 1, 1)), "PNG"),
        "1x1.jpg": encoded(PHOTO.crop((0, 0, 1, 1)), "JPEG"),
        "1x4000.png": encoded(PHOTO.resize((1, 4000)), "PNG"),
        "4000x1.png": encoded(PHOTO.resize((4000, 1)), "PNG"),
        "4000x1.webp": encoded(PHOTO.resize((4000, 1)), "WEBP"),
        "1x4000.avif": encoded(PHOTO.resize((1, 4000)), "AVIF"),
        "black.png": encoded(Image.new("RGB", (20, 20)), "PNG"),
        "transparent.png": encoded(Image.new("RGBA", (20, 20)), "PNG"),
        "misnamed-png.jpg": encoded(palette, "PNG"),
        "misnamed-webp.png": encoded(PHOTO, "WEBP", quality=50),
        "no-suffix": encoded(PHOTO.rotate(45), "PNG"),
        "palette-one-transparent.png": encoded(palette, "PNG", transparency=3),
        "grey-transparent.png": encoded(PHOTO.convert("L"), "PNG", transparency=7),
        "rgb-transparent.png": encoded(PHOTO, "PNG", transparency=(1, 2, 3)),
        "bad-icc.jpg": encoded(PHOTO, "JPEG", icc_profile=b"no profile at all"),
        "truncated-icc.png": encoded(PHOTO, "PNG", icc_profile=b"\0" * 7),
        "large-comment.jpg": encoded(PHOTO, "JPEG", comment=b"x" * 65000),
    }
    for compression in ("packbits", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4"):
        page = PHOTO.convert("1") if compression == "group4" else PHOTO
        zoo[f"{compression}.tif"] = encoded(page, "TIFF", compression=compression)
    zoo |= warned_about()
    return {name: Specimen(data, frozenset((FEATURES,))) for name, data in zoo.items()}


def warned_about() -> dict[str, bytes]:
    """Whole images at which Pillow warns, or logs, while it opens or converts them."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x30\0" + b"\x0f\x01\x02\0\xff\xff\0\0\xff\xff\0\0" * 3
    mpo = b"MPF\0II*\0\x08\0\0\0\x01\0\x00\xb0\x07\0\x04\0\0\0" + b"0100" + bytes(4)
    jpeg = encoded(PHOTO, "JPEG")
    png = encoded(PHOTO, "PNG")
    control = png_chunk(b"acTL", struct.pack(">II", 0, 0))
    return {
        "warns-palette-transparency.png": encoded(
            PHOTO.quantize(16), "PNG", transparency=bytes(range(16))
        ),
        "warns-corrupt-exif.jpg": jpeg[:2] + segment(0xE1, exif) + jpeg[20:],
        "warns-malformed-mpo.jpg": jpeg[:2] + segment(0xE2, mpo) + jpeg[2:],
        "warns-invalid-apng.png": png[:33] + control + png[33:],
        "warns-bomb.png": bilevel_png(9_500, 9_500),
    }


def hostile() -> dict[str, Specimen]:
    """Files that are no images, or claim to be enormous ones, or would start a program."""
    png = encoded(PHOTO, "PNG")
    jpeg = encoded(PHOTO, "JPEG")
    sof = jpeg.index(b"\xff\xc0") + 5
    gif = encoded(PHOTO, "GIF")
    bmp = encoded(PHOTO, "BMP")
    undecodable = {
        "empty.jpg": b"",
        "text.jpg": b"This is not an image.\n",
        "page.png": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "json.webp": b'{"error": "rate limited"}',
        "zeros.png": bytes(4096),
        "signature-only.png": png[:8],
        "signature-only.jpg": jpeg[:3],
        "starts-like-ppm.jpg": b"P3 is the third of the papers",
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "video.gif": b"\0\0\0\x18ftypmp42" + bytes(200),
        "postscript.png": EPS,
        "postscript.eps": EPS,
        "postscript-in-iptc.jpg": IPTC,
        "zero-wide.png": png_of(0, 5, b""),
        "no-pixels.png": png_of(5, 5, b""),
        "text-bomb.png": png[:33]
        + png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000)))
        + png[33:],
        "many-samples.tif": many_samples_tiff(),
    }
    too_large = {
        "bomb-header.png": png_of(100_000, 100_000, zlib.compress(b"\0" * 100)),
        "bomb-header.jpg": jpeg[:sof] + b"\xff\xff\xff\xff" + jpeg[sof + 4 :],
        "bomb-header.gif": gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        "bomb-header.bmp": bmp[:18] + struct.pack("<ii", 50_000, 50_000) + bmp[26:],
        "bomb-header.ppm": b"P6 60000 60000 255\n" + bytes(100),
        "bomb-real.png": bilevel_png(14_000, 13_000),
    }
    return {
        **{name: Specimen(data, frozenset(("undecodable",))) for name, data in undecodable.items()},
        **{name: Specimen(data, frozenset(("too_large",))) for name, data in too_large.items()},
    }


def damaged() -> dict[str, Specimen]:
    """Truncations at several fractions, and bytes overwritten at random places."""
    rng = np.random.default_rng(2)
    zoo = {}
    for format in (*FORMATS, "TIFF-lzw"):
        options = {"compression": "tiff_lzw"} if format == "TIFF-lzw" else {}
        whole = encoded(PHOTO, format.split("-")[0], **options)
        for percent in (1, 10, 30, 50, 75, 90, 99):
            data = whole[: max(1, len(whole) * percent // 100)]
            zoo[f"{format}-truncated-{percent}.png"] = data
        for i in range(12):
            data = bytearray(whole)
            # Half of them in the header, where the parsers are.
            end = len(whole) if i % 2 else min(len(whole), 100)
            for place in rng.integers(0, end, 1 + i):
                data[place] = rng.integers(256)
            zoo[f"{format}-corrupt-{i}.jpg"] = bytes(data)
    return {name: Specimen(data, ANY) for name, data in zoo.items()}


def odd_names() -> dict[str, Specimen]:
    """One image, the same bytes under many names."""
    names = (
        "with space.png", " leading.png", "trailing .png", "new\nline.png", "tab\there.png",
        "-leading-dash.png", "--help.png", "ünïcödé.png", "u\u0308 combining.png", "日本語.png",
        "🦊.png", "quo\"te'd.png", "back\\slash.png", "[bold]markup[/bold].png", "%s %d {}.png",
        "a;b&c|d$e`f`.png", "UPPER.PNG", "dots...png", "\x1b[31mred.png", "\u202eright.png",
        "x" * 251 + ".png", "folder.jpg/inside.png", "deep/er/and deeper/1.png", "copy.jpg",
    )  # fmt: skip
    data = encoded(PHOTO.rotate(10), "PNG")
    return {name: Specimen(data, frozenset((FEATURES,))) for name in names}


def specimens() -> dict[str, Specimen]:
    """Every file of the zoo by name."""
    return {**written(), **variants(), **hostile(), **damaged(), **odd_names()}


def write_zoo(folder: Path) -> dict[str, frozenset[str]]:
    """Write the zoo, and what only a file system can hold; what each name may come to."""
    zoo = specimens()
    for name, specimen in zoo.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(specimen.data)
    outcomes = {name: specimen.outcomes for name, specimen in zoo.items()}

    (folder / "link.png").symlink_to("grey16.png")
    outcomes["link.png"] = frozenset((FEATURES,))
    (folder / "loop.png").symlink_to("loop.png")
    outcomes["loop.png"] = frozenset(("unreadable",))
    (folder / "dangling.png").symlink_to("nowhere.png")
    outcomes["dangling.png"] = frozenset(("missing",))
    os.mkfifo(folder / "pipe.png")
    outcomes["pipe.png"] = frozenset(("unreadable",))
    (folder / "device.png").symlink_to("/dev/zero")
    outcomes["device.png"] = frozenset(("unreadable",))
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    outcomes["sparse.png"] = frozenset(("too_large",))
    locked = folder / "locked.png"
    locked.write_bytes(zoo["1x1.png"].data)
    locked.chmod(0)
    # The superuser reads it all the same.
    outcomes["locked.png"] = frozenset((FEATURES if os.access(locked, os.R_OK) else "unreadable",))
    return outcomes


# ------------------------------------------------------------------------------- bytes by hand

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
1 0 0 setrgbcolor 0 0 20 20 rectfill showpage
%%EOF
"""


def _iptc(record: int, dataset: int, value: bytes) -> bytes:
    return struct.pack(">BBBH", 0x1C, record, dataset, len(value)) + value


IPTC = b"".join(
    (
        _iptc(3, 20, b"\0\x14"), _iptc(3, 30, b"\0\x14"), _iptc(3, 60, b"\x01\0"),
        _iptc(3, 120, b"\0\x05"), _iptc(8, 10, EPS),
    )
)  # fmt: skip
"""An IPTC file that holds the EPS file."""


def segment(marker: int, payload: bytes) -> bytes:
    """A JPEG segment."""
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    checksum = zlib.crc32(kind + payload)
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", checksum)


def png_of(
    width: int, height: int, pixels: bytes, depth: int = 8, colour: int = 2, interlace: int = 0
) -> bytes:
    """A PNG of these header fields and this IDAT, whether they belong together or not."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def bilevel_png(width: int, height: int) -> bytes:
    """Black and white stripes, one bit a pixel: many pixels in a small file."""
    row = b"\0" + b"\xf0" * -(-width // 8)
    return png_of(width, height, zlib.compress(row * height, 1), depth=1, colour=0)


def interlaced_png(image: Image.Image) -> bytes:
    """Adam7; Pillow reads it and does not write it."""
    pixels = np.asarray(image)
    passes = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2),
              (1, 2, 0, 1))  # fmt: skip
    rows = b"".join(
        b"\0" + row.tobytes()
        for top, down, left, right in passes
        for row in pixels[top::down, left::right]
    )
    return png_of(*image.size, zlib.compress(rows), interlace=1)


def many_samples_tiff() -> bytes:
    """A TIFF with more samples a pixel than Pillow decodes; Pillow logs an error."""
    tags = [(256, 4, 8), (257, 4, 8), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 200),
            (277, 3, 40), (278, 4, 8), (279, 4, 64)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + bytes(64)
