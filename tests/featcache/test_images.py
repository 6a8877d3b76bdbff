from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.errors import ImageError
from featcache.images import FORMATS, MAX_FILE_BYTES, decode, digest, load_image, read_bytes
from tests.support_images import EPS, IPTC, encoded, many_samples_tiff, warned_about

RGB = np.random.default_rng(0).integers(0, 256, (21, 33, 3), dtype=np.uint8)
GREY16 = np.array([[0, 257, 32768, 65535]], np.uint16)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_modes_become_pillows_own_rgb(mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    decoded, size = decode(encoded(image, "PNG"))
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
    data = encoded(image, "PNG", transparency=bytes(range(16)))
    np.testing.assert_array_equal(np.asarray(decode(data)[0]), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("data", [
    encoded(Image.fromarray(GREY16), "PNG"),
    encoded(Image.fromarray(GREY16), "TIFF"),
    encoded(Image.frombytes("I;16B", (4, 1), GREY16.astype(">u2").tobytes()), "TIFF"),
    encoded(Image.fromarray(GREY16.astype(np.int32)), "PPM"),
    encoded(Image.fromarray(GREY16), "JPEG2000"),
    b"P2 4 1 65535 0 257 32768 65535",
])  # fmt: skip
def test_16_bit_grey_is_scaled_not_clipped(data: bytes) -> None:
    assert np.asarray(decode(data)[0])[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "GIF"])
def test_what_is_decoded_is_an_image_like_any_other(format: str) -> None:
    """Resized, cropped, drawn on, when the file it came from is closed."""
    data = encoded(Image.fromarray(RGB), format)
    with Image.open(io.BytesIO(data)) as image:
        plain = image.convert("RGB")
    decoded = decode(data)[0]
    for use in (
        lambda image: image.resize((24, 24), Image.Resampling.BICUBIC),
        lambda image: image.crop((3, 2, 20, 15)),
        lambda image: image.convert("L"),
        lambda image: image.copy(),
    ):
        assert use(decoded).tobytes() == use(plain).tobytes()
    decoded.paste((1, 2, 3), (3, 2, 20, 15))
    plain.paste((1, 2, 3), (3, 2, 20, 15))
    assert decoded.tobytes() == plain.tobytes()


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
        (encoded(Image.fromarray(RGB), "PNG")[:200], "truncated"),
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
        decode(encoded(Image.fromarray(RGB), "PNG"))
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_never_escape_as_another_error(format: str) -> None:
    """Truncations and byte flips at fixed places: an image or an ImageError, nothing else."""
    assert decode_damaged(format, 60).keys() <= {"an image", "undecodable", "too_large"}


def decode_damaged(format: str, count: int) -> Counter[str]:
    """What `count` damaged files came to: an image, or the reason of an ImageError."""
    whole = encoded(Image.fromarray(RGB), format)
    rng, outcomes = np.random.default_rng(1), Counter[str]()
    for _ in range(count):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 8):
            damaged[place] = rng.integers(256)
        try:
            decode(bytes(damaged[: rng.integers(1, len(whole))]))
            outcomes["an image"] += 1
        except ImageError as error:
            outcomes[error.reason] += 1
    return outcomes


@pytest.mark.parametrize("data", [EPS, IPTC], ids=["EPS", "EPS in IPTC"])
def test_no_image_starts_a_program(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(*command: object, **_: object) -> None:
        started.append(command)
        raise OSError("not here")

    for name in ("Popen", "check_call", "run"):
        monkeypatch.setattr(subprocess, name, start)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    with pytest.raises(OSError, match="not here"), Image.open(io.BytesIO(data)) as image:
        image.load()
    assert len(started) == 1
    with pytest.raises(ImageError, match="no image of a known format"):
        decode(data)
    assert len(started) == 1


@pytest.mark.parametrize("name", sorted(warned_about().keys() - {"warns-bomb.png"}))
def test_what_pillow_warns_about_is_an_image_and_no_warning(name: str) -> None:
    data = warned_about()[name]
    with pytest.warns(match="."), Image.open(io.BytesIO(data)) as image:
        expected = image.convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode(data)[0]), np.asarray(expected))


def test_between_pillows_two_limits_of_pixels_is_an_image_and_no_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 21 * 33 - 1)
    assert decode(encoded(Image.fromarray(RGB), "PNG"))[1] == (33, 21)


def test_warnings_stay_away_in_many_threads_and_the_filters_are_put_back() -> None:
    several = [data for name, data in warned_about().items() if "bomb" not in name] * 50
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(decode, several))) == len(several)
    assert warnings.filters == before
    with pytest.raises(UserWarning, match="mine"):
        warnings.warn("mine", stacklevel=1)


def test_damaged_tiffs_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    lzw = encoded(Image.fromarray(RGB), "TIFF", compression="tiff_lzw")
    for data in (many_samples_tiff(), lzw[:20] + b"\xff" * 20 + lzw[40:]):
        with pytest.raises(ImageError, match="undecodable"):
            decode(data)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("failing", ["load", "convert"])
def test_an_image_beyond_the_memory_is_too_large(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile." + failing, fail)
    with pytest.raises(ImageError, match="33 x 21 pixels do not fit in memory") as caught:
        decode(encoded(Image.fromarray(RGB).convert("RGBA"), "PNG"))
    assert caught.value.reason == "too_large"


IN_LITTLE_MEMORY = """
import resource, sys
from featcache.errors import ImageError
from featcache.images import decode
from tests.support_images import bilevel_png, hostile

bombs = {name: zoo.data for name, zoo in hostile().items() if name.startswith("bomb")}
bombs["within Pillow's limit.png"] = bilevel_png(13_000, 13_000)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 300_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name, data in bombs.items():
    try:
        decode(data)
    except ImageError as error:
        print(error.reason)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory by /proc")
def test_bombs_need_little_memory_and_real_ones_end_in_the_ledger() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["too_large"] * 7


def test_what_is_no_file_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(ImageError, match="not a regular file") as caught:
            read_bytes(path)
        assert caught.value.reason == "unreadable"


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "disk.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ImageError, match="1,431,655,761 bytes") as caught:
        read_bytes(tmp_path / "disk.png")
    assert caught.value.reason == "too_large"


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
