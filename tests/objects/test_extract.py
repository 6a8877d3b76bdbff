"""Extraction into a bucket: the same bytes as on a disk, whatever happens on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from featcache.extract import ExtractOptions, extract
from featcache.object_path import ObjectPath
from tests.support import write_images

DATA = ("features/", "scales/", "channels/", "pooled/", "index/")


def options_for(encoder_dir: Path, folder: Path, out: Path | ObjectPath, **more) -> ExtractOptions:
    return ExtractOptions(
        model=str(encoder_dir), data=(folder,), out=out, shard_images=4, batch_size=2, **more
    )


def data_files(store: Path | ObjectPath) -> dict[str, bytes]:
    """Every file that holds values, by its path in the store."""
    names = (
        [name for name, _ in store.listing()]
        if isinstance(store, ObjectPath)
        else [path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()]
    )
    return {name: (store / name).read_bytes() for name in sorted(names) if name.startswith(DATA)}


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_a_bucket_holds_what_a_disk_holds(
    encoder_dir: Path, tmp_path: Path, bucket: ObjectPath, codec: str
) -> None:
    write_images(tmp_path / "images", 10)
    (tmp_path / "images" / "0003.png").write_bytes(b"no image")
    disk = options_for(encoder_dir, tmp_path / "images", tmp_path / "disk.zarr", codec=codec)
    disk = replace(disk, max_failures=1.0)
    there = replace(disk, out=bucket / "a folder/store.zarr")
    for limit in (5, None):  # then more of them, appended
        assert extract(replace(disk, limit=limit)).ok
        assert extract(replace(there, limit=limit)).ok
        expected = data_files(disk.out)
        assert len(expected) > 20
        assert data_files(there.out) == expected
    assert extract(there).new == 0
