"""Real measurements, short: of the encoder on real images, of the disk by a real store."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.probe import disk_speed, encoder_speed
from featcache.errors import ConfigError
from featcache.extract import ExtractOptions, extract
from featcache.store import Store


def test_encoder_and_decoding_are_timed_on_images(encoder_dir: Path, images_dir: Path) -> None:
    found = encoder_speed(str(encoder_dir), images_dir, device="cpu")
    assert found.encode_s > 0 < found.decode_s
    assert found.workers == 1


def test_a_folder_without_a_readable_image_is_an_error(encoder_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ConfigError, match=f"--probe {tmp_path}: none of its first 1 images"):
        encoder_speed(str(encoder_dir), tmp_path, device="cpu")


def test_the_disk_is_timed_on_every_row_of_a_store(
    encoder_dir: Path, images_dir: Path, tmp_path: Path
) -> None:
    options = ExtractOptions(
        model=str(encoder_dir), data=(images_dir,), out=tmp_path / "store.zarr", codec="int8"
    )
    extract(options)
    ticks = iter(range(100))
    found = disk_speed(options.out, clock=lambda: float(next(ticks)))
    store = Store(options.out)
    assert found.nbytes == 10 * store.layer_codec("-2").image_bytes
    assert found.gbps == found.nbytes / 1e9 / 2  # seconds: begun, after the one batch, ended
    assert "page cache" in found.how


def test_a_store_without_features_is_an_error(encoder_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"not a picture")
    out = tmp_path / "store.zarr"
    extract(
        ExtractOptions(
            model=str(encoder_dir), data=(tmp_path / "images",), out=out, max_failures=1.0
        )
    )
    with pytest.raises(ConfigError, match="holds no features to read"):
        disk_speed(out)
