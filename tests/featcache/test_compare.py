"""Two stores compared: fields, keys, images, failures, and what the program says of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import featcache
from cli import console
from cli.featcache import group
from featcache import index
from featcache.compare import (
    Comparison,
    Images,
    OtherFailure,
    OtherImage,
    Some,
    compare,
    require_same_images,
)
from featcache.errors import FingerprintMismatch
from featcache.extract import ExtractOptions, extract
from featcache.images import digest
from tests.support import write_captions, write_images

NAMES = [f"{i:04d}.png" for i in range(10)]


@pytest.fixture
def options(encoder_dir: Path, images_dir: Path, tmp_path: Path) -> ExtractOptions:
    data = write_captions(tmp_path / "data.jsonl", NAMES)
    return ExtractOptions(
        model=str(encoder_dir), data=(data,), image_root=images_dir, out=tmp_path / "a.zarr",
        shard_images=4, max_failures=1.0,
    )  # fmt: skip


def other_world(options: ExtractOptions, names: list[str]) -> ExtractOptions:
    """The same images under some of the names, elsewhere, into another store."""
    folder = options.out.parent
    assert options.image_root is not None
    root = shutil.copytree(options.image_root, folder / "images-b")
    data = write_captions(folder / "b.jsonl", names)
    return replace(options, data=(data,), image_root=root, out=folder / "b.zarr")


@pytest.mark.parametrize("collide", [False, True])
def test_what_differs(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch, collide: bool
) -> None:
    if collide:
        monkeypatch.setattr(index, "hash_keys", lambda keys: np.zeros(len(keys), np.uint64))
    b = other_world(options, [*NAMES[2:], "none.png", "more.png"])
    assert options.image_root is not None and b.image_root is not None
    images = [(root / "0003.png").read_bytes() for root in (options.image_root, b.image_root)]
    shutil.copy(b.image_root / "0002.png", b.image_root / "more.png")
    for name, source in (("0007.png", "0006.png"), ("0004.png", "0005.png")):
        shutil.copy(b.image_root / source, b.image_root / name)
    (options.image_root / "0005.png").unlink()
    (b.image_root / "0009.png").write_bytes(b"no image")
    for each in (options, b):
        extract(each)
    left, right = featcache.open(options.out), featcache.open(b.out)
    files = {
        name: [(root / name).read_bytes() for root in (options.image_root, b.image_root)]
        for name in ("0004.png", "0007.png", "0009.png")
    }
    assert images[0] == images[1]
    expected = Images(
        only_left=Some(2, ["0000.png", "0001.png"]),
        only_right=Some(2, ["none.png", "more.png"]),
        shared=8,
        same=4,
        other=3,
        other_first=[
            OtherImage(name, *(digest(data).hex() for data in both)) for name, both in files.items()
        ],
    )
    found = compare(left, right)
    assert (found.fields, found.images) == ([], expected)
    assert (found.failures, found.failures_first) == (
        2,
        [OtherFailure("0005.png", "missing", None), OtherFailure("0009.png", None, "undecodable")],
    )
    assert (found.same, found.images.joinable, found.interchangeable) == (False, False, True)
    with pytest.raises(FingerprintMismatch, match=r"3 of 8 shared image keys are other") as caught:
        require_same_images(left, right)
    name, both = next(iter(files.items()))
    assert f"{name}: {digest(both[0]).hex()} in {left.path}, {digest(both[1]).hex()} in" in str(
        caught.value
    )


def test_a_copy_is_the_same(options: ExtractOptions) -> None:
    b = other_world(options, NAMES)
    for each in (options, replace(b, batch_size=3, shard_images=2)):
        extract(each)
    left, right = featcache.open(options.out), featcache.open(b.out)
    nothing = Some(0, [])
    assert compare(left, right) == Comparison([], Images(nothing, nothing, 10, 10, 0, []), 0, [])
    assert compare(left, right).same
    require_same_images(left, right)


def test_stores_made_otherwise_can_be_joined(
    options: ExtractOptions, encoder_dir: Path, tmp_path: Path
) -> None:
    renamed = shutil.copytree(encoder_dir, tmp_path / "renamed")
    b = replace(options, model=str(renamed), layers=("last", "-2"), codec="int8",
                out=tmp_path / "b.zarr")  # fmt: skip
    for each in (options, b):
        extract(each)
    left, right = featcache.open(options.out), featcache.open(b.out)
    found = compare(left, right)
    differing = {field.name: field.harmless for field in found.fields}
    assert {name for name, harmless in differing.items() if not harmless} == {
        "codec", "features.layers", "features.post_layernorm", "shapes.layers",
    }  # fmt: skip
    assert differing["encoder.name"]
    assert (found.interchangeable, found.images.joinable, found.same) == (False, True, False)
    require_same_images(left, right)


def test_stores_without_a_common_image(options: ExtractOptions, tmp_path: Path) -> None:
    extract(options)
    write_images(tmp_path / "other" / "b", 2, seed=3)
    other = replace(options, data=(tmp_path / "other",), image_root=None, out=tmp_path / "b.zarr")
    extract(other)
    with pytest.raises(FingerprintMismatch, match="they share 0 image keys, and no image; extract"):
        require_same_images(featcache.open(options.out), featcache.open(other.out))


def test_the_program(
    options: ExtractOptions, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    b = other_world(options, NAMES[:-1])
    assert b.image_root is not None
    shutil.copy(b.image_root / "0001.png", b.image_root / "0000.png")
    for each in (options, replace(b, codec="bf16")):
        extract(each)
    capsys.readouterr()
    assert console.run(group, ["diff", str(options.out), str(b.out), "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    images = compare(featcache.open(options.out), featcache.open(b.out)).images
    assert (document["same"], document["joinable"], document["interchangeable"]) == (False,) * 3
    assert document["images"] == asdict(images)
    assert {"name": "codec", "left": "fp16", "right": "bf16", "harmless": False} in (
        document["fields"]
    )
    for line in (
        "keys only in A        1 (0009.png)",
        "keys in both          9: 8 the same image, 1 another, 0 unknown",
        "can be joined by image key    no",
    ):
        assert line in err
    assert console.run(group, ["diff", str(options.out), str(options.out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same"]
