"""Stores of the same images, read together."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import featcache
from featcache import read_mode
from featcache.errors import ConfigError, CorruptStoreError, FingerprintMismatch
from featcache.extract import ExtractOptions, extract
from featcache.join import StoreJoin
from featcache.store import Store
from tests.support import write_images

COUNT = 10


@pytest.fixture
def stores(encoder_dir: Path, tmp_path: Path) -> tuple[Store, Store]:
    """fp16 and int8, other layers; rows of the second in another order, one image only in one."""
    names = write_images(tmp_path / "images", COUNT)
    first = ExtractOptions(
        model=str(encoder_dir), data=(tmp_path / "images",), out=tmp_path / "a.zarr",
        shard_images=4, batch_size=2,
    )  # fmt: skip
    extract(first)
    second = replace(first, out=tmp_path / "b.zarr", layers=("last",), codec="int8", limit=4)
    late = tmp_path / "late"
    late.mkdir()
    (tmp_path / "images" / names[0]).rename(late / names[0])
    extract(second)  # images 1 to 4
    (late / names[0]).rename(tmp_path / "images" / names[0])
    extract(replace(second, limit=COUNT - 1))
    return featcache.open(first.out), featcache.open(second.out)


def test_rows_of_a_key_are_of_one_image(stores: tuple[Store, Store]) -> None:
    join = StoreJoin(stores)
    keys = [f"{i:04d}.png" for i in range(COUNT)]
    rows = join.rows([*keys, "none.png"])
    assert rows.shape == (COUNT + 1, 2)
    assert rows[-1].tolist() == [-1, -1]
    assert rows[:-1, 0].tolist() == list(range(COUNT))
    assert (rows[:, 0] != rows[:, 1]).any() and rows[COUNT - 1].tolist() == [COUNT - 1, -1]
    shared = rows[(rows >= 0).all(1)]
    rng = np.random.default_rng(0)
    batches = [shared[rng.integers(0, len(shared), n)] for n in (3, 1, 7, 0, 40)]
    with join.reader() as reader, stores[0].reader() as first, stores[1].reader() as second:
        for batch, found in zip(batches, reader.stream(iter(batches)), strict=True):
            expected = first.read_stored(batch[:, 0]), second.read_stored(batch[:, 1])
            for mine, alone in zip(found, expected, strict=True):
                assert torch.equal(mine.decode(), alone.decode())
        both = reader.read(batches[0], torch.float32)
        assert torch.equal(both[0], first.read(batches[0][:, 0], torch.float32))
        assert torch.equal(both[1], second.read(batches[0][:, 1], torch.float32))


def test_a_budget_is_shared_out_by_size(stores: tuple[Store, Store]) -> None:
    with StoreJoin(stores).reader(budget_bytes=1000) as reader:
        first, second = (each.options.budget_bytes for each in reader.readers)
    assert first + second in (999, 1000)
    assert first / second == pytest.approx(9 * 24 * 2 / (9 * 24 + 9 * 4), rel=0.01)


def test_other_images_are_refused(stores: tuple[Store, Store], tmp_path: Path) -> None:
    write_images(tmp_path / "other", 2, seed=7)
    fingerprint = stores[0].info.fingerprint["encoder"]["name"]
    extract(ExtractOptions(model=fingerprint, data=(tmp_path / "other",), out=tmp_path / "c.zarr"))
    with pytest.raises(FingerprintMismatch, match="2 of 2 shared image keys are other pictures"):
        StoreJoin([*stores, featcache.open(tmp_path / "c.zarr")])
    with pytest.raises(FingerprintMismatch, match=r"c\.zarr"):
        StoreJoin([stores[0], stores[0], featcache.open(tmp_path / "c.zarr")])
    with pytest.raises(ConfigError, match="layers: 1 are named for 2 stores"):
        StoreJoin(stores).reader(["-2"])
    with pytest.raises(ConfigError, match="a join needs a store"):
        StoreJoin([])
    with pytest.raises(ConfigError, match="holds no layer 'last'"):
        StoreJoin(stores).reader(["last", "last"])


def test_damage_in_one_store_ends_the_stream(stores: tuple[Store, Store]) -> None:
    shutil.rmtree(stores[1].path / "features/last/c/1")
    join = StoreJoin(stores)
    rows = join.rows([f"{i:04d}.png" for i in range(COUNT - 1)])
    with join.reader() as reader, pytest.raises(CorruptStoreError, match="features/last/c/1/0/0"):
        list(reader.stream([rows]))


def test_whether_they_fit_into_memory_is_asked_of_all(
    stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [store.stored_bytes(store.layers[0]) for store in stores]
    monkeypatch.setattr(read_mode, "available_bytes", lambda: int(sum(sizes) / 0.8) - 1)
    monkeypatch.setattr(read_mode, "_direct_problem", lambda path: None)
    for store in stores:
        with store.reader() as reader:
            assert not reader.mode.direct
    with StoreJoin(stores).reader() as joined:
        assert [reader.mode.direct for reader in joined.readers] == [True, True]
