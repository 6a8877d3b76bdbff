"""Stores of an encoder whose patch grid varies (SigLIP 2 NaFlex), and stores made with --fit:
whatever is done to a store, the grids stay with their images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import featcache
from featcache import layout
from featcache.convert import convert
from featcache.encoders import Encoder, load_encoder
from featcache.errors import FingerprintMismatch
from featcache.extract import ExtractOptions, extract
from featcache.files import publish_json, read_json
from featcache.gc import collect
from featcache.images import load_image
from featcache.journal import Commit
from featcache.live import compare_live
from featcache.repair import repair
from featcache.verify import verify
from tests.support import bits, feature_files

PATCHES, WIDTH = 12, 16
SIZES = [(8, 8), (60, 10), (10, 60), (30, 40), (41, 29), (1, 90), (33, 33)]
"""(width, height); six different grids."""


@pytest.fixture(scope="module")
def naflex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of up to 12 patches of 8 pixels x 16."""
    folder = tmp_path_factory.mktemp("naflex")
    config = Siglip2VisionConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_patches=9, patch_size=8,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        Siglip2VisionModel(config).save_pretrained(folder)
    Siglip2ImageProcessorPil(patch_size=8, max_num_patches=PATCHES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One photograph of each size, and one file that is none."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def options(naflex: Path, images: Path, out: Path, codec: str = "fp16") -> ExtractOptions:
    return ExtractOptions(
        model=str(naflex), data=(images,), out=out, layers=("-2", "last"), codec=codec,
        shard_images=3, batch_size=2, max_failures=1.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(naflex: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "store.zarr"
    assert extract(options(naflex, images, out)).features == len(SIZES)
    return out


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "store.zarr")


def keys() -> list[str]:
    return [f"{i}.png" for i in range(len(SIZES))]


def expected_grids(encoder: Encoder, images: Path) -> np.ndarray:
    arrays = [encoder.preprocess(load_image(images / key)) for key in keys()]
    return np.array([[array.shape[0] // 8, array.shape[1] // 8] for array in arrays], np.int32)


def grids_of(path: Path) -> np.ndarray:
    opened = featcache.open(path)
    assert opened.grids is not None
    return opened.grids[opened.rows(keys())]


def test_the_store_keeps_each_images_grid_and_zeros_after_it(
    naflex: Path, images: Path, made: Path
) -> None:
    encoder = load_encoder(str(naflex), layers=("-2", "last"))
    opened = featcache.open(made)
    rows, grids = opened.rows(keys()), expected_grids(encoder, images)
    assert np.array_equal(grids_of(made), grids) and grids_of(made).dtype == np.int32
    assert len({tuple(grid) for grid in grids.tolist()}) >= 5
    lengths = opened.lengths[rows]
    assert lengths.tolist() == grids.prod(1).tolist()
    assert opened.num_patches == PATCHES and lengths.max() <= PATCHES > lengths.min()
    failed = next(row for row in range(opened.num_rows) if opened.index.status[row])
    assert opened.lengths[failed] == 0
    pixels = encoder.collate([encoder.preprocess(load_image(images / key)) for key in keys()])
    encoded = encoder.encode(pixels)
    for layer in ("-2", "last"):
        with opened.reader(layer) as reader:
            read = reader.read(rows)
        assert read.shape == (len(SIZES), PATCHES, WIDTH)
        for image, length in zip(read, lengths.tolist(), strict=True):
            assert image[:length].any(-1).all() and not image[length:].any()
        # fp16, and another batch than the store's.
        torch.testing.assert_close(read.float(), encoded.features[layer], rtol=1e-3, atol=1e-4)


def test_it_is_whole_and_equals_a_live_encoding(made: Path) -> None:
    assert not verify(made).problems
    report = compare_live(made, 100)
    assert (report.compared, report.wrong) == (len(SIZES), ())


def test_an_interrupted_or_repeated_extraction_is_the_same(
    naflex: Path, images: Path, made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store.zarr"
    extract(options(naflex, images, out))
    (out / layout.commit_path(1)).unlink()
    extract(options(naflex, images, out))
    assert feature_files(out) == feature_files(made)
    assert np.array_equal(grids_of(out), grids_of(made))
    assert extract(options(naflex, images, out)).new == 0


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_converted_and_back_it_has_its_grids(made: Path, tmp_path: Path, codec: str) -> None:
    there, back = tmp_path / "store.h5", tmp_path / "back.zarr"
    convert(made, there, codec=codec)
    convert(there, back)
    for path in (there, back):
        assert np.array_equal(grids_of(path), grids_of(made))
        assert not verify(path).problems
    if codec == "fp16":
        assert feature_files(back) == feature_files(made)


def test_channel_values_are_measured_on_patches_not_on_padding(
    naflex: Path, images: Path, made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "int8.zarr"
    extract(options(naflex, images, out, "int8"))
    encoder = load_encoder(str(naflex), layers=("-2",))
    pixels = encoder.collate([encoder.preprocess(load_image(images / key)) for key in keys()])
    encoded = encoder.encode(pixels)
    own = torch.cat(
        [
            image[:length]
            for image, length in zip(
                encoded.features["-2"], encoded.grids.prod(1).tolist(), strict=True
            )
        ]
    )
    (channels, _) = featcache.open(out).layer_codec("-2").channels
    torch.testing.assert_close(channels, own.mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(channels, encoded.features["-2"].mean((0, 1)), rtol=1e-2)
    convert(made, tmp_path / "converted.zarr", codec="int8")
    (converted, _) = featcache.open(tmp_path / "converted.zarr").layer_codec("-2").channels
    torch.testing.assert_close(converted, channels, rtol=1e-3, atol=1e-4)


def test_a_damaged_row_and_a_lost_commit_record_are_repaired(made: Path, store: Path) -> None:
    file = store / layout.shard_path("-2", 0)
    raw = bytearray(file.read_bytes())
    raw[5] ^= 1
    file.write_bytes(raw)
    (store / layout.commit_path(1)).unlink()
    shutil.rmtree(next((store / "index").glob("0*")) / "grids")
    assert verify(store).problems
    report = repair(store)
    assert not report.problems and not report.lost
    assert feature_files(store) == feature_files(made)
    assert np.array_equal(grids_of(store), grids_of(made))
    commit = Commit.load(store, 1)
    assert commit is not None
    assert [row.grid for row in commit.rows if row.grid] == [
        row.grid for row in Commit.load(made, 1).rows if row.grid
    ]


def test_a_grid_that_was_changed_is_noticed(store: Path) -> None:
    path = store / layout.commit_path(0)
    document = read_json(path)
    document["grid"][0][0] += 1
    publish_json(path, document)
    assert any("journal/commit" in problem.where for problem in verify(store).problems)


def test_dropped_rows_lose_their_grid_and_others_keep_theirs(
    naflex: Path, images: Path, store: Path, tmp_path: Path
) -> None:
    old = featcache.open(store).rows(["0.png"])[0]
    assert featcache.open(store).lengths[old]
    moved = shutil.copytree(images, tmp_path / "images")
    Image.new("RGB", (20, 50), "red").save(moved / "0.png")
    extract(options(naflex, moved, store))
    before = grids_of(store)
    assert collect(store).rows == 1
    assert not verify(store).problems
    assert np.array_equal(grids_of(store), before)
    assert not featcache.open(store).lengths[old]


def test_a_fixed_grid_leaves_no_trace(encoder_dir: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "fixed.zarr"
    extract(options(encoder_dir, images, out))
    opened = featcache.open(out)
    assert opened.grids is None
    assert opened.lengths.tolist() == [9] * opened.num_rows
    assert b'"grid"' not in (out / layout.commit_path(0)).read_bytes()
    assert not list(out.glob("index/*/grids"))


# ------------------------------------------------------------------------------------------ --fit


@pytest.mark.parametrize("fit", ["crop", "pad", "pad:1,2,3"])
def test_a_store_made_with_a_fit_is_encoded_with_it_again(
    encoder_dir: Path, images: Path, tmp_path: Path, fit: str
) -> None:
    """By `verify --live` and by `repair`; and other pixels do not get into it."""
    out = tmp_path / "store.zarr"
    with_fit = ExtractOptions(
        model=str(encoder_dir), data=(images,), out=out, shard_images=3, max_failures=1.0, fit=fit
    )
    extract(with_fit)
    report = compare_live(out, 100)
    assert (report.compared, report.wrong) == (len(SIZES), ())
    files = feature_files(out)
    path = out / layout.shard_path("-2", 1)
    path.write_bytes(bytes(path.stat().st_size))
    assert not repair(out).problems
    assert feature_files(out) == files
    plain = ExtractOptions(model=str(encoder_dir), data=(images,), out=tmp_path / "plain.zarr",
                           shard_images=3, max_failures=1.0)  # fmt: skip
    extract(plain)
    assert feature_files(plain.out) != files
    with pytest.raises(FingerprintMismatch, match=r"preprocessing\.aspect: '(crop|pad)' in "):
        extract(ExtractOptions(model=str(encoder_dir), data=(images,), out=out))


def test_what_padding_gives(encoder_dir: Path, images: Path, tmp_path: Path) -> None:
    """Through the whole pipeline: the same as an image padded by hand and stored as a square."""
    key = "1.png"
    image = load_image(images / key)
    side = max(image.size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    by_hand = tmp_path / "by-hand"
    by_hand.mkdir()
    square.save(by_hand / key)
    features = []
    for folder, out in ((images, "a.zarr"), (by_hand, "b.zarr")):
        extract(
            ExtractOptions(
                model=str(encoder_dir),
                data=(folder,),
                out=tmp_path / out,
                batch_size=1,
                fit="pad",
                max_failures=1.0,
            )
        )
        opened = featcache.open(tmp_path / out)
        with opened.reader() as reader:
            features.append(reader.read(opened.rows([key])))
    assert np.array_equal(bits(features[0]), bits(features[1]))
