from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.errors import ImageError
from featcache.images import decode, digest, load_image, read_bytes

RGB = np.random.default_rng(0).integers(0, 256, (21, 33, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_modes_become_pillows_own_rgb(mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    decoded, size = decode(encoded(image))
    assert size == (33, 21)
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_becomes_pillows_own_rgb() -> None:
    data = encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG")
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "CMYK"
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(data)[0]), expected)


def test_palette_with_transparent_bytes_keeps_its_colours_without_a_warning() -> None:
    image = Image.fromarray(RGB).quantize(16)
    data = encoded(image, transparency=bytes(range(16)))
    np.testing.assert_array_equal(np.asarray(decode(data)[0]), np.asarray(image.convert("RGB")))


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    decoded = np.asarray(decode(encoded(Image.fromarray(grey)))[0])
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0].getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image, size = decode(encoded(Image.fromarray(RGB), "JPEG", exif=exif))
    assert size == image.size == (33, 21)


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"", "no image of a known format"),
        (b"plain text", "no image of a known format"),
        (encoded(Image.fromarray(RGB), "JPEG")[:-300], "truncated"),
        (encoded(Image.fromarray(RGB))[:200], "truncated"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "mode F has no defined white"),
    ],
)
def test_what_cannot_be_decoded_says_why(data: bytes, detail: str) -> None:
    with pytest.raises(ImageError, match=detail) as caught:
        decode(data)
    assert caught.value.reason == "undecodable"


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="693 pixels") as caught:
        decode(encoded(Image.fromarray(RGB)))
    assert caught.value.reason == "too_large"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "DDS"]
)
def test_damaged_files_never_escape_as_another_error(format: str) -> None:
    """Truncations and byte flips at fixed places: an image or an ImageError, nothing else."""
    whole = encoded(Image.fromarray(RGB), format)
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 8):
            damaged[place] = rng.integers(256)
        try:
            decode(bytes(damaged[: rng.integers(1, len(whole))]))
        except ImageError as error:
            assert error.reason in ("undecodable", "too_large")


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist") as caught:
        load_image(tmp_path / "none.png")
    assert caught.value.reason == "missing"
    with pytest.raises(ImageError) as caught:
        read_bytes(tmp_path)
    assert caught.value.reason == "unreadable"


def test_digest_is_of_the_bytes_alone() -> None:
    assert digest(b"") == bytes.fromhex("cae66941d9efbd404e4d88758ea67670")
    assert digest(b"a") != digest(b"b")
