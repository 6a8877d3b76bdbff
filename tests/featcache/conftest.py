"""Small finished stores of every codec, in both forms."""

from __future__ import annotations

from pathlib import Path

import pytest

from featcache.codecs import CODECS
from featcache.convert import convert
from featcache.extract import ExtractOptions, extract
from tests.support import BROKEN, STORED, write_images


@pytest.fixture(scope="session", params=list(CODECS))
def zarr_store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, encoder_dir: Path
) -> Path:
    """11 images in shards of 4, one of them broken, two layers."""
    folder = tmp_path_factory.mktemp(request.param)
    write_images(folder / "images", STORED)
    (folder / "images" / BROKEN).write_bytes(b"not an image")
    result = extract(
        ExtractOptions(
            model=str(encoder_dir),
            data=(folder / "images",),
            out=folder / "store.zarr",
            layers=("-2", "last"),
            codec=request.param,
            shard_images=4,
            batch_size=3,
            max_failures=0.1,
        )
    )
    assert result.ok
    assert result.failures == {"undecodable": 1}
    return folder / "store.zarr"


@pytest.fixture(scope="session", params=["zarr", "h5"])
def store_path(request: pytest.FixtureRequest, zarr_store: Path) -> Path:
    """The same store in each form."""
    if request.param == "zarr":
        return zarr_store
    path = zarr_store.with_suffix(".h5")
    if not path.exists():
        convert(zarr_store, path)
    return path
