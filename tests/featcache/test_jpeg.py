"""The extra `[fast]`: bit for bit Pillow's pixels, or left to Pillow."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.bench_decode import kinds, photo, saved
from featcache import jpeg
from featcache.encoders import load_encoder
from featcache.errors import ImageError
from featcache.fingerprint import pixel_probe
from featcache.images import decode

LEFT_TO_PILLOW = {"CMYK", "no end marker", "truncated"}
EITHER = {"a byte flipped"}

Outcome = tuple[str, Any]


@pytest.fixture(autouse=True)
def fast_is_installed() -> None:
    assert jpeg.installed()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each JPEG, whether it was decoded without Pillow."""
    load, found = jpeg.load_jpeg, []

    def watched(opened: Image.Image, data: bytes) -> Image.Image | None:
        image = load(opened, data)
        found.append(image is not None)
        return image

    monkeypatch.setattr(jpeg, "load_jpeg", watched)
    return found


@pytest.fixture
def by_pillow(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Outcome]:
    """`outcome` as it is without the extra."""

    def decoded(data: bytes) -> Outcome:
        with monkeypatch.context() as patch:
            patch.setattr(jpeg, "installed", lambda: False)
            return outcome(data)

    return decoded


def outcome(data: bytes) -> Outcome:
    """(Pixels as bytes, sizes) or (reason, text): equal where two ways of decoding are."""
    try:
        image, size = decode(data)
    except ImageError as error:
        return error.reason, error.detail
    assert image.mode == "RGB"
    return image.tobytes().hex(), (image.size, size)


@pytest.mark.parametrize("seed", range(8))
def test_every_kind_of_jpeg_comes_to_the_same(
    seed: int, taken: list[bool], by_pillow: Callable[[bytes], Outcome]
) -> None:
    for kind, data in kinds(np.random.default_rng(seed)):
        taken.clear()
        assert outcome(data) == by_pillow(data), kind
        if kind not in EITHER:
            assert any(taken) == (kind not in LEFT_TO_PILLOW), kind


def test_the_fingerprints_probe_is_the_same(
    monkeypatch: pytest.MonkeyPatch, taken: list[bool]
) -> None:
    """420.jpg and 444.jpg are decoded by the extra."""
    settings = load_encoder("tiny").preprocessing
    pixel_probe.cache_clear()
    fast = pixel_probe(settings)
    assert taken.count(True) == 2
    monkeypatch.setattr(jpeg, "installed", lambda: False)
    pixel_probe.cache_clear()
    assert pixel_probe(settings) == fast


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed (in the header more often), lost, doubled, markers put in between."""
    found, place = bytearray(data), int(rng.integers(len(data)))
    match int(rng.integers(5)):
        case 0:
            found[place] = rng.integers(256)
        case 1:
            found[int(rng.integers(min(len(data), 600)))] = rng.integers(256)
        case 2:
            del found[place : place + int(rng.integers(1, 50))]
        case 3:
            found[place:place] = found[: int(rng.integers(1, 50))]
        case _:
            found[place:place] = bytes([0xFF, rng.integers(0xC0, 0x100)])
    return bytes(found)


def test_damaged_files_come_to_the_same_pixels_or_the_same_reason(
    by_pillow: Callable[[bytes], Outcome],
) -> None:
    rng = np.random.default_rng(3)
    images = ledger = 0
    for _ in range(8):
        for kind, data in kinds(rng):
            broken = damaged(data, rng)
            found = outcome(broken)
            assert found == by_pillow(broken), kind
            ledger += found[0] in ("undecodable", "too_large")
            images += found[0] not in ("undecodable", "too_large")
    assert min(images, ledger) > 20  # both were met


def test_pillows_limit_of_pixels_holds(monkeypatch: pytest.MonkeyPatch, taken: list[bool]) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="limit of 200 pixels") as caught:
        decode(saved(Image.new("RGB", (30, 20))))
    assert caught.value.reason == "too_large"
    assert not taken


def test_other_formats_are_pillows(taken: list[bool]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 5), "red").save(buffer, "PNG")
    assert decode(buffer.getvalue())[0].getpixel((3, 3)) == (255, 0, 0)
    assert not taken


def test_an_image_in_others_memory_is_an_image_like_any_other() -> None:
    """Resized, cropped, converted, drawn on, and alive when everything it was made of is gone."""
    rng = np.random.default_rng(0)
    data = saved(Image.fromarray(photo(90, 70, rng)))
    plain = Image.open(io.BytesIO(data)).convert("RGB")
    fast = decode(data)[0]
    box = (11, 7, 60, 50)
    for run in (
        lambda image: image.resize((24, 24), Image.Resampling.BICUBIC),
        lambda image: image.crop(box),
        lambda image: image.convert("L"),
        lambda image: image.transpose(Image.Transpose.ROTATE_90),
        lambda image: image.copy(),
    ):
        assert run(fast).tobytes() == run(plain).tobytes()
    fast.paste((1, 2, 3), box)
    plain.paste((1, 2, 3), box)
    assert fast.tobytes() == plain.tobytes()
    encoder = load_encoder("tiny")
    np.testing.assert_array_equal(encoder.preprocess(fast), encoder.preprocess(plain))


def test_many_threads_decode_the_same(taken: list[bool]) -> None:
    rng = np.random.default_rng(0)
    files = [saved(Image.fromarray(photo(64, 48, rng))) for _ in range(20)] * 10
    expected = [decode(data)[0].tobytes() for data in files[:20]] * 10
    taken.clear()
    with ThreadPoolExecutor(8) as pool:
        assert [image.tobytes() for image, _ in pool.map(decode, files)] == expected
    assert taken == [True] * 200


def test_without_memory_it_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("simplejpeg.decode_jpeg", fail)
    with pytest.raises(ImageError, match="30 x 20 pixels do not fit in memory") as caught:
        decode(saved(Image.new("RGB", (30, 20))))
    assert caught.value.reason == "too_large"
