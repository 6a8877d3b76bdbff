"""Any-resolution tiling: LLaVA-NeXT's rule, rows and keys, appending, repair."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model
from transformers.image_processing_utils import select_best_resolution
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

import featcache
from featcache import tiles
from featcache.convert import convert
from featcache.encode import load_pixels
from featcache.encoders import load_encoder
from featcache.errors import ConfigError, FingerprintMismatch, ManifestError
from featcache.extract import ExtractOptions, extract
from featcache.images import digest
from featcache.live import compare_live
from featcache.manifests import read_manifest
from featcache.repair import repair
from featcache.sources import ImageRef
from featcache.tasks import PlannedImage
from featcache.tiles import Tiling, open_view, parse_grids, prepare, split_key, tile_digest
from tests.support import feature_files, write_captions
from tests.support_inputs import samples, write_tar

LLAVA_16 = parse_grids("1x2,2x1,2x2,3x1,1x3")
"""LLaVA-1.6's grid pinpoints, as columns x rows."""
ONE_VISION = parse_grids("1x1..6x6")
"""LLaVA-OneVision's."""


def sizes() -> Iterator[tuple[int, int]]:
    """Round, odd, tiny and extreme ones; and random ones."""
    yield from [(1, 1), (1, 5000), (5000, 1), (336, 336), (672, 336), (336, 672), (640, 480)]
    yield from [(1920, 1080), (1080, 1920), (10_000, 3), (337, 335), (2016, 2016), (100, 1000)]
    chance = np.random.default_rng(0)
    for size in np.exp(chance.uniform(0, math.log(6000), (3000, 2))).astype(int).tolist():
        yield tuple(size)


@pytest.mark.parametrize("grids", [LLAVA_16, ONE_VISION, parse_grids("1x1")])
def test_the_grid_is_the_one_that_transformers_chooses(grids: tuple[tuple[int, int], ...]) -> None:
    height, width = view = (336, 392)
    resolutions = [(rows * height, columns * width) for columns, rows in grids]
    tiling = Tiling(grids, view)
    for size in sizes():
        best_height, best_width = select_best_resolution(size[::-1], resolutions)
        assert tiling.grid_of(size) == (best_width // width, best_height // height), size


def plain_grid(size: tuple[int, int], grids: tuple[tuple[int, int], ...], side: int) -> tuple:
    """From the rule in words: most pixels kept, least wasted, first listed."""

    def rank(grid: tuple[int, int]) -> tuple[int, int]:
        width, height = grid[0] * side, grid[1] * side
        scale = min(width / size[0], height / size[1])
        kept = min(math.floor(size[0] * scale) * math.floor(size[1] * scale), size[0] * size[1])
        return kept, kept - width * height

    return max(grids, key=rank)  # of equals, the first


@pytest.mark.parametrize("grids", [LLAVA_16, ONE_VISION])
def test_the_grid_is_the_one_of_the_rule_in_words(grids: tuple[tuple[int, int], ...]) -> None:
    tiling = Tiling(grids, (384, 384))
    for size in sizes():
        assert tiling.grid_of(size) == plain_grid(size, grids, 384), size
    # Two grids suit a square alike: the order of --tiles decides.
    assert Tiling(((1, 2), (2, 1)), (384, 384)).grid_of((100, 100)) == (1, 2)
    assert Tiling(((2, 1), (1, 2)), (384, 384)).grid_of((100, 100)) == (2, 1)


def encoded(size: tuple[int, int], seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "size", [(640, 480), (480, 640), (20, 20), (61, 200), (500, 37), (1, 90), (333, 332)]
)
def test_the_pixels_are_those_of_transformers(size: tuple[int, int]) -> None:
    side = 24
    data = encoded(size)
    tiling = Tiling(LLAVA_16, (side, side))
    grid = tiling.grid_of(size)
    processor = LlavaNextImageProcessorPil(
        size={"height": side, "width": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[[rows * side, columns * side] for columns, rows in LLAVA_16],
        do_rescale=False,
        do_normalize=False,
    )
    expected = processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0]
    keys = tiling.keys_of("a.png", size)
    assert len(expected) == 1 + len(keys) == 1 + grid[0] * grid[1]
    for key, theirs in zip(keys, expected[1:], strict=True):
        view, original = open_view(data, key, (side, side))
        assert original == size
        np.testing.assert_array_equal(np.array(view), theirs.transpose(1, 2, 0))
    whole = np.array(open_view(data, "a.png", (side, side))[0].resize((side, side)))
    np.testing.assert_array_equal(whole, expected[0].transpose(1, 2, 0))


def test_an_image_is_decoded_once_for_all_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = tiles.decode
    monkeypatch.setattr(tiles, "decode", lambda data: decoded.append(len(data)) or decode(data))
    data = encoded((50, 70), seed=1)
    for key in Tiling(parse_grids("3x3"), (24, 24)).keys_of("a.png", (50, 70)):
        open_view(data, key, (24, 24))
    assert len(decoded) == 1


@pytest.mark.parametrize(
    ("text", "grids"),
    [
        ("2x1", [(2, 1)]),
        ("1x2, 2x1,1x2", [(1, 2), (2, 1)]),
        ("1x1..2x2", [(1, 1), (1, 2), (2, 1), (2, 2)]),
        ("1x1..1x2,4x4", [(1, 1), (1, 2), (4, 4)]),
    ],
)
def test_grids(text: str, grids: list[tuple[int, int]]) -> None:
    assert parse_grids(text) == tuple(grids)


@pytest.mark.parametrize(
    "text", ["", "2", "0x1", "2x", "axb", "1x1..", "1x1..2x2..3x3", "(1x1)", "2x2,"]
)
def test_what_is_no_grid(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no grid; write columns x rows"):
        parse_grids(text)


def test_grids_that_are_empty_or_too_large() -> None:
    with pytest.raises(ConfigError, match=r"'2x2\.\.1x1' is empty"):
        parse_grids("2x2..1x1")
    with pytest.raises(ConfigError, match="'9x8' has more than 64 tiles an image"):
        parse_grids("9x8")


def test_keys_of_tiles() -> None:
    assert Tiling(((2, 3),), (8, 8)).keys_of("a#1.jpg", (5, 5)) == [
        f"a#1.jpg#2x3:{i}" for i in range(6)
    ]
    assert split_key("a#1.jpg#2x3:5") == ("a#1.jpg", (2, 3), 5)
    for key in ("a.jpg", "a#2x3.jpg", "a.jpg#2x3", "a.jpg#02x3:1", "a.jpg#2x3:1/b.jpg", "#a"):
        assert split_key(key) == (key, None, 0)
    assert tile_digest(b"x" * 16, "a.jpg#2x3:5") == tile_digest(b"x" * 16, "b.jpg#2x3:5")
    assert tile_digest(b"x" * 16, "a.jpg#2x3:5") != tile_digest(b"x" * 16, "a.jpg#3x2:5")


def test_an_image_named_like_a_tile_is_skipped(tmp_path: Path) -> None:
    listed = write_captions(tmp_path / "a.jsonl", ["a.png", "a.png#1x2:0"])
    (skipped,) = read_manifest([listed]).skipped
    assert "ends like the key of a tile; rename it" in skipped.reason
    with pytest.raises(ManifestError):
        read_manifest([write_captions(tmp_path / "b.jsonl", ["a.png#1x2:0"])])


# --------------------------------------------------------------------------- extraction


@pytest.fixture
def options(encoder_dir: Path, images_dir: Path, tmp_path: Path) -> ExtractOptions:
    """Ten images of 10 to 49 pixels a side; the encoder takes 24 x 24."""
    return ExtractOptions(
        model=str(encoder_dir),
        data=(images_dir,),
        out=tmp_path / "store.zarr",
        shard_images=4,
        batch_size=3,
        tiles=parse_grids("1x2,2x1,2x2"),
    )


def test_tiles_are_rows_with_the_features_of_their_pixels(
    options: ExtractOptions, images_dir: Path
) -> None:
    result = extract(options)
    store = featcache.open(options.out)
    keys = read_manifest([images_dir]).image_keys()
    assert (result.images, result.features, result.ok) == (10, 10, True)
    assert result.new == store.num_rows > 30
    encoder = load_encoder(options.model, layers=("-2",))
    found = store.tiles(keys)
    assert {each.grid for each in found if each} == {(1, 2), (2, 1), (2, 2)}
    with store.reader() as reader:
        for key, base, each in zip(keys, store.rows(keys).tolist(), found, strict=True):
            assert each is not None
            assert each.rows.tolist() == [*range(base + 1, base + 1 + len(each.rows))]
            data = (images_dir / key).read_bytes()
            size = Image.open(io.BytesIO(data)).size
            assert (store.sizes[[base, *each.rows]] == size).all()
            names = [key, *Tiling(options.tiles, (24, 24)).keys_of(key, size)]
            views = [prepare(encoder, open_view(data, name, (24, 24))[0], name) for name in names]
            live = encoder.encode(encoder.collate(views)).features["-2"]
            torch.testing.assert_close(
                reader.read(np.array([base, *each.rows])).float(), live, atol=2e-3, rtol=2e-3
            )


def test_a_tile_is_neither_enlarged_nor_cropped_by_the_encoders_fit(tmp_path: Path) -> None:
    """DINOv2's fit: the shorter edge to 28 pixels, of which the middle 24 x 24 are taken."""
    folder = tmp_path / "encoder"
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8
    )
    Dinov2Model(config).save_pretrained(folder)
    processor = BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 24, "width": 24}
    )
    processor.save_pretrained(folder)
    encoder = load_encoder(str(folder))
    assert encoder.preprocessing.describe()["shortest_edge"] == 28
    data = encoded((60, 50))
    path = tmp_path / "a.png"
    path.write_bytes(data)
    identity = digest(data)
    for number in range(4):
        key = f"a.png#2x2:{number}"
        cut, _ = open_view(data, key, (24, 24))
        image = PlannedImage(tile_digest(identity, key), (ImageRef(str(tmp_path), key),))
        loaded = load_pixels(encoder, image)
        assert loaded.pixels is not None
        np.testing.assert_array_equal(loaded.pixels, np.array(cut))
        assert (encoder.preprocess(cut) != np.array(cut)).any()
    whole = load_pixels(encoder, PlannedImage(identity, (ImageRef(str(tmp_path), "a.png"),)))
    assert whole.pixels is not None
    np.testing.assert_array_equal(
        whole.pixels, encoder.preprocess(open_view(data, "a.png", (24, 24))[0])
    )


def test_whole_images_are_the_same_with_and_without_tiles(
    options: ExtractOptions, images_dir: Path, tmp_path: Path
) -> None:
    extract(options)
    plain = replace(options, tiles=(), out=tmp_path / "plain.zarr")
    extract(plain)
    keys = read_manifest([images_dir]).image_keys()
    read = []
    for path in (options.out, plain.out):
        store = featcache.open(path)
        with store.reader() as reader:
            read.append(reader.read(store.rows(keys)).float())
    torch.testing.assert_close(*read, atol=1e-3, rtol=1e-3)  # other batches
    with pytest.raises(ConfigError, match="holds whole images only; extract with --tiles"):
        featcache.open(plain.out).tiles(keys)


def test_two_processes_tile_a_tar_to_the_same_bytes(
    options: ExtractOptions, images_dir: Path, tmp_path: Path
) -> None:
    names = read_manifest([images_dir]).image_keys()
    tar = write_tar(tmp_path / "a.tar", samples(images_dir, names))
    extract(options)
    both = replace(options, data=(tar,), out=tmp_path / "both.zarr", workers=2)
    assert extract(both).ok
    assert feature_files(both.out) == feature_files(options.out)


def test_other_tiles_are_refused(options: ExtractOptions) -> None:
    extract(options)
    for other in ((), parse_grids("2x2"), options.tiles[::-1]):
        with pytest.raises(FingerprintMismatch, match=r"tiles(\.grids)?: "):
            extract(replace(options, tiles=other))
    assert extract(options).new == 0


def test_append_and_other_names_share_rows(
    options: ExtractOptions, images_dir: Path, tmp_path: Path
) -> None:
    first = extract(replace(options, limit=4))
    whole = extract(options)
    store = featcache.open(options.out)
    names = read_manifest([images_dir]).image_keys()
    tar = write_tar(tmp_path / "a.tar", samples(images_dir, names))
    again = extract(replace(options, data=(tar,)))
    assert first.new and whole.new and not again.new
    inside = featcache.open(options.out).tiles([f"a.tar/{name}" for name in names])
    for ours, theirs in zip(store.tiles(names), inside, strict=True):
        assert ours and theirs
        np.testing.assert_array_equal(ours.rows, theirs.rows)


def test_repair_live_and_gc_know_tiles_by_their_keys(
    options: ExtractOptions, images_dir: Path
) -> None:
    extract(options)
    before = feature_files(options.out)
    shard = options.out / "features/-2/c/1/0/0"
    shard.write_bytes(shard.read_bytes()[:4096] + bytes(100))
    assert not repair(options.out).problems
    assert feature_files(options.out) == before
    live = compare_live(options.out, 1000)
    assert (live.compared, live.wrong) == (featcache.open(options.out).num_rows, ())


def test_a_converted_store_knows_its_tiles(options: ExtractOptions, tmp_path: Path) -> None:
    extract(options)
    convert(options.out, tmp_path / "store.h5")
    keys = [f"{i:04d}.png" for i in range(10)]
    before = featcache.open(options.out).tiles(keys)
    for ours, theirs in zip(featcache.open(tmp_path / "store.h5").tiles(keys), before, strict=True):
        assert ours and theirs
        assert ours.grid == theirs.grid
        np.testing.assert_array_equal(ours.rows, theirs.rows)


def test_an_image_of_another_aspect_gets_other_tiles(
    options: ExtractOptions, images_dir: Path
) -> None:
    extract(options)
    (images_dir / "0003.png").write_bytes(encoded((200, 20)))
    extract(options)
    (tiled,) = featcache.open(options.out).tiles(["0003.png"])
    assert tiled is not None
    assert (tiled.grid, (tiled.rows >= 0).all()) == ((2, 1), True)


def test_images_that_cannot_be_tiled(options: ExtractOptions, images_dir: Path) -> None:
    (images_dir / "0003.png").write_bytes(b"no image")
    torn = (images_dir / "0004.png").read_bytes()
    (images_dir / "0004.png").write_bytes(torn[:-30])
    result = extract(replace(options, max_failures=1))
    assert (result.images, result.features) == (10, 8)
    assert result.failures == {"undecodable": 2}
    store = featcache.open(options.out)
    broken = {failure.key for failure in store.failures()}
    assert "0003.png" in broken
    assert {key.partition("#")[0] for key in broken} == {"0003.png", "0004.png"}
    assert store.tiles(["0003.png", "0004.png", "none.png"]) == [None, None, None]
    assert store.tiles([]) == []


def test_the_digest_of_a_whole_image_is_that_of_its_file(
    options: ExtractOptions, images_dir: Path
) -> None:
    extract(options)
    store = featcache.open(options.out)
    (row,) = store.rows(["0000.png"])
    assert store.index.digests[row].tobytes() == digest((images_dir / "0000.png").read_bytes())
