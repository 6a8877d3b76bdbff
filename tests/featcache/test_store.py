"""The store as its readers see it: ours, zarr-python, tensorstore and h5py agree, value for value.

What holds for any store is tested on a Zarr folder and on an HDF5 file.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorstore
import torch
import zarr

import featcache
import featcache.bfloat16  # registers the data type with zarr-python
from featcache.convert import convert
from featcache.encoders import load_encoder
from featcache.errors import (
    ConfigError,
    CorruptStoreError,
    IncompleteStoreError,
    StoreError,
)
from featcache.extract import ExtractOptions, extract
from featcache.files import publish_json, with_checksum
from featcache.images import load_image
from featcache.layout import CHUNK_ALIGNMENT_BYTES, StoreInfo
from featcache.store import Store
from tests.support import BROKEN, STORED, bits


@pytest.mark.parametrize("layer", ["-2", "last"])
def test_h5py_reads_what_zarr_python_reads(zarr_store: Path, layer: str) -> None:
    """Failed images included: NaN, by the patch scales where the codes are integers."""
    path = zarr_store.with_suffix(".h5")
    if not path.exists():
        convert(zarr_store, path)
    group = zarr.open_group(zarr_store, mode="r")
    with h5py.File(path) as file:
        names = [f"features/{layer}", "pooled"]
        if featcache.open(path).codec.scaled:
            names += [f"scales/{layer}", f"channels/{layer}"]
        for name in names:
            np.testing.assert_array_equal(bits(file[name][:]), bits(group[name][:]))
        bf16 = file[f"features/{layer}"].attrs.get("dtype") == b"bfloat16"
        assert bf16 == (featcache.open(path).codec.name == "bf16")


@pytest.mark.parametrize("layer", ["-2", "last"])
def test_zarr_python_and_tensorstore_read_what_we_read(zarr_store: Path, layer: str) -> None:
    store = featcache.open(zarr_store)
    group = zarr.open_group(zarr_store, mode="r")
    by_zarr = group[f"features/{layer}"][:]
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{zarr_store}/features/{layer}"},
    }
    by_tensorstore = tensorstore.open(spec).result().read().result()
    assert by_zarr.shape == by_tensorstore.shape == (STORED, *store.layer_codec(layer).code_shape)
    assert by_zarr.dtype == by_tensorstore.dtype
    np.testing.assert_array_equal(bits(by_zarr), bits(by_tensorstore))
    rows = np.array([row for row in range(STORED) if row != 4])
    with store.reader(layer) as reader:
        ours = reader.read_stored(rows)
    np.testing.assert_array_equal(bits(ours.codes), bits(by_zarr[rows]))
    if store.codec.scaled:
        assert ours.scales is not None and ours.layer.channels is not None
        np.testing.assert_array_equal(ours.scales, group[f"scales/{layer}"][:][rows])
        np.testing.assert_array_equal(ours.layer.channels, group[f"channels/{layer}"][:])


def test_a_failed_image_reads_as_nan_never_as_zeros(zarr_store: Path) -> None:
    group = zarr.open_group(zarr_store, mode="r")
    scaled = featcache.open(zarr_store).codec.scaled  # then the patch scales are what is NaN
    kind = "scales" if scaled else "features"
    for array in (group[f"{kind}/-2"], group[f"{kind}/last"], group["pooled"]):
        values = array[:].astype(np.float32)
        assert np.isnan(values[4]).all()
        assert np.isfinite(np.delete(values, 4, axis=0)).all()


def test_the_hierarchy_can_be_walked_without_a_warning(zarr_store: Path) -> None:
    """Warnings are errors here, and zarr-python warns of files that are no part of Zarr."""
    names = {name for name, _ in zarr.open_group(zarr_store, mode="r").members(max_depth=None)}
    assert {"features/-2", "features/last", "pooled", "journal"} <= names


def test_features_are_the_encoders(store_path: Path, encoder_dir: Path) -> None:
    """Batches of one against the stored batches of three: rounding of fp32, then of the codec.

    Largest relative L2 error of an image that was measured: fp16 2.2e-4, bf16 1.7e-3, int8 4.7e-3.
    """
    tolerance = {"fp16": 3e-4, "bf16": 3e-3, "int8": 1e-2, "fp8": 4e-2, "int4": 2e-1}
    store = featcache.open(store_path)
    encoder = load_encoder(str(encoder_dir), layers=store.layers)
    rows = store.rows(["0000.png", "0007.png"])
    for layer in store.layers:
        with store.reader(layer) as reader:
            stored = reader.read(rows, torch.float32)
        for values, key in zip(stored, ["0000.png", "0007.png"], strict=True):
            pixels = encoder.preprocess(load_image(store_path.parent / "images" / key))
            live = encoder.encode(encoder.collate([pixels])).features[layer][0]
            error = float((values - live).norm() / live.norm())
            assert error < tolerance[store.codec.name]


def test_layout_on_disk(zarr_store: Path) -> None:
    store = featcache.open(zarr_store)
    geometry = store.spec.geometry("-2")
    files = [(zarr_store / f"features/-2/c/{n}/0/0").read_bytes() for n in range(3)]
    indices = [file[-4 - 4 * 16 : -4] for file in files]  # of 4 images; then a crc32c
    chunks = np.frombuffer(b"".join(indices), "<u8").reshape(-1, 2)
    present = chunks[:, 1] != 2**64 - 1
    assert present.tolist() == [row not in (4, STORED) for row in range(STORED + 1)]
    slots = np.flatnonzero(present) % 4
    assert (chunks[present, 0] == slots * geometry.pitch_bytes).all()
    assert geometry.pitch_bytes % CHUNK_ALIGNMENT_BYTES == 0
    assert (chunks[present, 1] == store.layer_codec("-2").code_bytes).all()
    assert sorted(path.name for path in (zarr_store / "journal").iterdir()) == [
        *(f"commit-{shard:08d}.json" for shard in range(3)),
        "copy",
        "lock",
        "plan-00000001.npz",
        "writers",
        "zarr.json",
    ]


def test_rows_reasons_and_sizes(store_path: Path) -> None:
    store = featcache.open(store_path)
    assert store.rows(["0003.png", BROKEN, "none.png", "0000.png"]).tolist() == [3, -1, -1, 0]
    assert store.rows([]).tolist() == []
    assert store.reason(BROKEN) == "undecodable: no image of a known format"
    assert store.reason("none.png") == "not in the store"
    assert (store.num_rows, store.num_images) == (STORED, STORED - 1)
    image = load_image(store_path.parent / "images" / "0003.png")
    assert store.sizes[3].tolist() == list(image.size)


def test_an_unknown_layer(store_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no layer '-3', only -2, last"):
        featcache.open(store_path).reader("-3")


# ----------------------------------------------------------------------------- damaged and foreign


def test_a_store_can_be_moved(store_path: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"  # no suffix: a form is known by its content
    (shutil.copytree if store_path.is_dir() else shutil.copy)(store_path, moved)
    with featcache.open(moved).reader() as reader:
        assert reader.read(np.array([0, 10])).shape == (2, 9, 24)


@pytest.fixture
def copy(zarr_store: Path, tmp_path: Path) -> Path:
    return shutil.copytree(zarr_store, tmp_path / "copy.zarr")


@pytest.mark.parametrize("cut", [0, 100, 5000])
def test_a_truncated_shard_is_named(copy: Path, cut: int) -> None:
    shard = copy / "features/-2/c/0/0/0"
    os.truncate(shard, cut)
    with (
        featcache.open(copy).reader() as reader,
        pytest.raises(CorruptStoreError, match=r"features/-2/c/0/0/0 is truncated"),
    ):
        reader.read(np.array([0, 1, 2, 3]))


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / "features/-2/c/1/0/0").unlink()
    with (
        featcache.open(copy).reader() as reader,
        pytest.raises(CorruptStoreError, match=r"features/-2/c/1/0/0: No such file"),
    ):
        reader.read(np.array([5]))


def test_what_is_no_store(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(StoreError, match=r"no such directory\); make one with"):
        Store(tmp_path / "none.zarr")
    with pytest.raises(StoreError, match="it has no zarr"):
        Store(tmp_path)
    for content in (b"", b"thesis"):
        (tmp_path / "file.h5").write_bytes(content)
        with pytest.raises(StoreError, match=r"neither a Zarr folder nor an HDF5 file"):
            Store(tmp_path / "file.h5")
    (copy / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="does not describe a feature store"):
        Store(copy)


def test_a_newer_format_and_an_unfinished_store(copy: Path) -> None:
    document = json.loads((copy / "zarr.json").read_text())
    attributes = document["attributes"]["featcache"]

    def write(**changes: object) -> None:
        changed = with_checksum({**attributes, **changes})
        publish_json(copy / "zarr.json", {**document, "attributes": {"featcache": changed}})

    write(format_version=4)
    with pytest.raises(StoreError, match="has store format 4, this featcache reads 3; upgrade"):
        Store(copy)
    write(index=None)
    (copy / "journal" / "commit-00000001.json").unlink()
    with pytest.raises(IncompleteStoreError, match="2 of 3 shards are there; run the same"):
        Store(copy)


def test_a_damaged_index_is_named_and_the_cure_works(copy: Path, encoder_dir: Path) -> None:
    rows = Store(copy).rows(["0003.png", BROKEN, "0010.png"]).tolist()
    (copy / "index/00000001/key_rows/c/0").unlink()
    with pytest.raises(
        CorruptStoreError, match=r"key_rows is missing.*verify .* --repair` writes it again"
    ):
        Store(copy)
    info = StoreInfo.load(copy)
    options = ExtractOptions(
        model=str(encoder_dir),
        data=tuple(map(Path, info.source["data"])),
        out=copy,
        layers=tuple(info.layers),
        codec=info.codec,
    )
    assert extract(options).new == 0
    assert Store(copy).rows(["0003.png", BROKEN, "0010.png"]).tolist() == rows
