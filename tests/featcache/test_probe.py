from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from featcache.encoders import Encoded, Encoder, load_encoder
from featcache.probe import Speed, probe_speed
from featcache.sources import ImageRef


class Clock:
    """Stands still but for what the work says it took."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sizes: list[int] = []

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def files(images_dir: Path) -> list[Path]:
    return sorted(images_dir.iterdir())


@pytest.fixture
def encoder(encoder_dir: Path) -> Encoder:
    return load_encoder(str(encoder_dir))


@pytest.fixture
def clock(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """An encoder of 1 s for the first forward, then 0.1 s an image; 0.05 s to decode one."""
    clock = Clock()
    encode, preprocess = Encoder.encode, Encoder.preprocess

    def timed_encode(self: Encoder, pixels: Tensor) -> Encoded:
        clock.now += 0.1 * len(pixels) if clock.sizes else 1.0
        clock.sizes.append(len(pixels))
        return encode(self, pixels)

    def timed_preprocess(self: Encoder, image: Any) -> Any:
        clock.now += 0.05
        return preprocess(self, image)

    monkeypatch.setattr(Encoder, "encode", timed_encode)
    monkeypatch.setattr(Encoder, "preprocess", timed_preprocess)
    return clock


def refs(files: list[Path]) -> list[ImageRef]:
    return [ImageRef(str(file.parent), file.name) for file in files]


def test_figures_of_a_real_run(encoder: Encoder, files: list[Path]) -> None:
    speed = probe_speed(encoder, refs(files), batch_size=4, workers=2)
    assert speed is not None
    for value in (speed.decode_s, speed.encode_s, speed.images_per_s):
        assert 0 < value < math.inf
    assert (speed.batch_size, speed.workers) == (4, 2)


def test_the_slower_of_the_two_decides() -> None:
    assert Speed(0.5, 0.1, 16, workers=2).images_per_s == pytest.approx(4)
    assert Speed(0.5, 0.1, 16, workers=10).images_per_s == pytest.approx(10)


@pytest.mark.parametrize(
    ("budget_s", "sizes", "spent_s"),
    [
        # Decoding 4: 0.2. One: 1.0. Then as many as 1 s each would allow, then as 0.1 s each would.
        (5.0, [1, 3, 4], 1.9),
        # Decoding: a quarter of the budget, 0.25 s, is more than 4 take; nothing is left after it.
        (1.0, [1, 1], 1.3),
        # 2 s: the second forward shows how fast it is.
        (2.0, [1, 1, 4], 1.7),
        # The smallest that gives a figure: one image decoded, two forwards.
        (0.0001, [1, 1], 1.15),
    ],
)
def test_the_budget(
    encoder: Encoder, files: list[Path], clock: Clock,
    budget_s: float, sizes: list[int], spent_s: float,
) -> None:  # fmt: skip
    start = clock.now
    speed = probe_speed(encoder, refs(files), 4, workers=1, budget_s=budget_s, clock=clock)
    assert speed is not None
    assert clock.sizes == sizes
    assert clock.now - start == pytest.approx(spent_s)
    assert speed.encode_s == pytest.approx(0.1)
    assert speed.decode_s == pytest.approx(0.05)
    assert speed.batch_size == sizes[-1]


def test_a_large_batch_of_few_images_repeats_them(
    encoder: Encoder, files: list[Path], clock: Clock
) -> None:
    speed = probe_speed(encoder, refs(files[:2]), 64, workers=1, budget_s=60, clock=clock)
    assert speed is not None and speed.batch_size == 64


def test_bad_files_are_passed_over(encoder: Encoder, files: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    missing = tmp_path / "missing.jpg"
    assert probe_speed(encoder, refs([bad, missing, tmp_path, files[0]]), 4, workers=1) is not None
    assert probe_speed(encoder, refs([bad, missing, tmp_path]), 4, workers=1) is None
    assert probe_speed(encoder, [], 4, workers=1) is None


def test_a_million_bad_files_end_with_the_budget(encoder: Encoder, tmp_path: Path) -> None:
    ticks = iter(range(1000))
    missing = refs([tmp_path / "missing.jpg"]) * 1_000_000
    assert probe_speed(encoder, missing, 4, 1, budget_s=50, clock=lambda: next(ticks)) is None
    assert next(ticks) < 60
