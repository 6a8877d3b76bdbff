"""Joining records with a store, leaving out what cannot be used, holding out a split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import featcache
from align.data.dataset import DataConfig, LeftOut, build_splits, hold_out, num_held_out
from align.data.templates import TemplateConfig
from align.errors import DataError
from featcache.extract import ExtractOptions, extract
from featcache.manifests import Record, Turn
from featcache.store import Store

CAPTION = TemplateConfig()


def records(count: int) -> list[Record]:
    return [
        Record(f"r{i}", (f"{i}.png",), (Turn("human", ""), Turn("gpt", "x")), None, f"f:{i}")
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("samples", "ratio", "held_out"),
    [
        (558_128, 0.02, 11_163),  # the flagship: 546,965 remain
        (5_000, 0.02, 100),
        (10, 0.02, 1),  # never none where some were asked for
        (1, 0.5, 0),  # never the only one
        (3, 0.99, 2),
        (0, 0.02, 0),
        (100, 0, 0),
    ],
)
def test_counts_of_the_split(samples: int, ratio: float, held_out: int) -> None:
    assert num_held_out(samples, ratio) == held_out


def test_split_is_decided_by_seed_and_record_alone() -> None:
    some = records(1000)
    mask = hold_out(some, 0.1, seed=0)
    assert mask.sum() == 100
    out = {r.id for r, held in zip(some, mask, strict=True) if held}
    backwards = hold_out(some[::-1], 0.1, seed=0)
    assert {r.id for r, held in zip(some[::-1], backwards, strict=True) if held} == out
    assert {r.id for r, held in zip(some, hold_out(some, 0.1, seed=1), strict=True) if held} != out
    fewer = some[:500] + some[501:]
    without = {r.id for r, held in zip(fewer, hold_out(fewer, 0.1, 0), strict=True) if held}
    assert len(out ^ without) <= 2


def test_captions_of_one_image_stay_on_one_side() -> None:
    some = [Record(f"r{i}", (f"{i // 5}.png",), (Turn("gpt", "x"),), None, "") for i in range(1000)]
    mask = hold_out(some, 0.1, seed=0).reshape(200, 5)
    assert (mask.any(1) & ~mask.all(1)).sum() <= 1


def test_build_splits_from_what_the_store_was_made_of(store: Store) -> None:
    splits = build_splits(DataConfig(eval_ratio=0.25), CAPTION, store)
    assert (len(splits.train), len(splits.val), splits.found) == (30, 10, 40)
    assert splits.left_out.total == 0
    for sample in splits.train:
        assert sample.rows.tolist() == store.rows(list(sample.record.images)).tolist()


def test_max_samples_and_a_file_of_its_own_for_validation(
    store: Store, tmp_path: Path, jsonl: object
) -> None:
    assert callable(jsonl)
    held = jsonl(tmp_path / "val.jsonl", [{"id": "v", "images": ["003.png"], "caption": "a v"}])
    config = DataConfig(val_files=[str(held)], images=store.source["images"], max_samples=7)
    splits = build_splits(config, CAPTION, store)
    assert [s.record.id for s in splits.train] == [f"s{i}" for i in range(7)]
    assert [s.record.id for s in splits.val] == ["v"]
    assert splits.shared_images == 1  # 003.png is among the first seven


def test_one_file_to_train_and_to_validate_on_is_refused(
    world: Path, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "link.jsonl").symlink_to(world / "captions.jsonl")
    config = DataConfig(
        files=[str(tmp_path / "link.jsonl")], val_files=[str(world / "captions.jsonl")]
    )
    with pytest.raises(DataError, match=r"data.val_files: .*link.jsonl is in data.files as well"):
        build_splits(config, CAPTION, store)


def test_what_is_held_out_is_not_trained_on_by_default(world: Path, store: Store) -> None:
    """A store extracted from both files, and only the held-out one named."""
    with pytest.raises(DataError, match=r"data.val_files: hold all that .* name other files in"):
        build_splits(DataConfig(val_files=[str(world / "captions.jsonl")]), CAPTION, store)


def test_left_out_records_are_counted_with_reasons(world: Path, tmp_path: Path, jsonl) -> None:  # type: ignore[no-untyped-def]
    images = tmp_path / "images"
    images.mkdir()
    for name in ("good.png", "later.png"):
        Image.new("RGB", (32, 32), "red").save(images / name)
    (images / "torn.png").write_bytes((images / "good.png").read_bytes()[:40])
    extracted = jsonl(
        tmp_path / "a.jsonl",
        [{"id": "1", "images": [n], "caption": "c"} for n in ("good.png", "torn.png")],
    )
    out = tmp_path / "store.zarr"
    extract(
        ExtractOptions(str(world / "siglip"), (extracted,), out, images, max_failures=1, workers=1)
    )
    data = jsonl(
        tmp_path / "b.jsonl",
        [
            {"id": "ok", "images": ["good.png"], "caption": "a good one"},
            {"id": "torn", "images": ["torn.png"], "caption": "a torn one"},
            {"id": "half", "images": ["good.png", "later.png"], "caption": "two"},
            {"id": "mute", "images": ["good.png"], "caption": " "},
            {"id": "odd", "images": ["good.png"], "caption": "an <image> inside"},
        ],
    )
    splits = build_splits(DataConfig(files=[str(data)]), CAPTION, featcache.open(out))
    assert [s.record.id for s in splits.train] == ["ok"]
    assert splits.found == 5
    assert splits.left_out.total == 4
    told = str(splits.left_out)
    assert "1 image not in the store (half)" in told
    assert "1 <image> in the answer (odd)" in told
    assert any(
        reason.startswith("image ") and "torn" in ids
        for reason, ids in splits.left_out.first.items()
    ), told

    with pytest.raises(DataError, match=r"none of 1 records can be trained on .*not in the store"):
        only = jsonl(tmp_path / "c.jsonl", [{"id": "x", "images": ["later.png"], "caption": "c"}])
        build_splits(DataConfig(files=[str(only)]), CAPTION, featcache.open(out))


def test_images_without_text_cannot_be_trained_on(store: Store, world: Path) -> None:
    with pytest.raises(DataError, match="40 no caption"):
        build_splits(DataConfig(files=[str(world / "images")]), CAPTION, store)


def test_unknown_and_empty_splits(store: Store) -> None:
    splits = build_splits(DataConfig(eval_ratio=0), CAPTION, store)
    with pytest.raises(DataError, match=r"split test: there are train and val"):
        splits.split("test")
    with pytest.raises(DataError, match=r"split val: is empty; set data.eval_ratio above 0"):
        splits.split("val")


def test_left_out_reads_as_one_line() -> None:
    left_out = LeftOut()
    for i in range(5):
        left_out.add("no caption", f"r{i}")
    left_out.add("image undecodable", "x")
    assert str(left_out) == "5 no caption (r0, r1, r2, ...); 1 image undecodable (x)"


def test_rows_are_int64(store: Store) -> None:
    splits = build_splits(DataConfig(), CAPTION, store)
    assert splits.train[0].rows.dtype == np.int64
