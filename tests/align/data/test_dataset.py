"""Joining records with a store, leaving out what cannot be used, holding out a split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import featcache
from align.data.dataset import DataConfig, LeftOut, build_splits
from align.data.holdout import hold_out, num_held_out
from align.data.templates import TemplateConfig
from align.errors import DataError
from featcache.convert import convert
from featcache.extract import ExtractOptions, extract
from featcache.join import StoreJoin
from featcache.manifests import Record, Turn
from featcache.store import Store

CAPTION = TemplateConfig()
Jsonl = Callable[[Path, list[dict[str, Any]]], Path]


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
    splits = build_splits(DataConfig(eval_ratio=0.25), CAPTION, StoreJoin([store]))
    assert (len(splits.train), len(splits.val), splits.found) == (30, 10, 40)
    assert splits.left_out.total == 0
    for sample in splits.train:
        assert sample.rows[:, 0].tolist() == store.rows(list(sample.record.images)).tolist()


def test_max_samples_and_a_file_of_its_own_for_validation(
    store: Store, tmp_path: Path, jsonl: object
) -> None:
    assert callable(jsonl)
    held = jsonl(tmp_path / "val.jsonl", [{"id": "v", "images": ["003.png"], "caption": "a v"}])
    config = DataConfig(val_files=[str(held)], images=store.source["images"], max_samples=7)
    splits = build_splits(config, CAPTION, StoreJoin([store]))
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
        build_splits(config, CAPTION, StoreJoin([store]))


def test_what_is_held_out_is_not_trained_on_by_default(world: Path, store: Store) -> None:
    """A store extracted from both files, and only the held-out one named."""
    with pytest.raises(DataError, match=r"data.val_files: hold all that .* name other files in"):
        build_splits(
            DataConfig(val_files=[str(world / "captions.jsonl")]), CAPTION, StoreJoin([store])
        )


@pytest.fixture
def torn(world: Path, tmp_path: Path, jsonl: Jsonl) -> Store:
    """A store of good.png, in whose ledger is torn.png; later.png lies beside them."""
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
    extract(ExtractOptions(str(world / "siglip"), (extracted,), out, images, max_failures=1))
    return featcache.open(out)


def test_left_out_records_are_counted_with_reasons(
    torn: Store, tmp_path: Path, jsonl: Jsonl
) -> None:
    data = jsonl(
        tmp_path / "b.jsonl",
        [
            {"id": "ok", "images": ["good.png"], "caption": "a good one"},
            {"id": "torn", "images": ["torn.png"], "caption": "a torn one"},
            {"id": "half", "images": ["good.png", "later.png"], "caption": "two"},
            {"id": "mute", "images": ["good.png"], "caption": " "},
            {"id": "odd", "images": ["good.png"], "caption": "an <image> inside"},
            {"id": "malformed", "images": 7, "caption": "a number"},
        ],
    )
    splits = build_splits(DataConfig(files=[str(data)], max_missing=1), CAPTION, StoreJoin([torn]))
    assert [s.record.id for s in splits.train] == ["ok"]
    assert splits.found == 6
    assert splits.left_out.total == 5
    told = str(splits.left_out)
    assert "1 image not in the store (half)" in told
    assert "1 <image> in the answer (odd)" in told
    assert "1 image undecodable (torn)" in told

    records = {record.id: record for record in splits.left_out_records}
    assert list(records) == ["b.jsonl:4", "b.jsonl:6", "odd", "torn", "half"]
    (failure,) = torn.failures()
    assert failure.detail
    assert records["torn"].reason == "image undecodable"
    assert records["torn"].detail == f"torn.png: undecodable: {failure.detail}"
    assert records["half"].detail == "later.png: not in the store"
    assert records["half"].images == ("good.png", "later.png")
    assert (records["odd"].reason, records["odd"].detail) == (
        "<image> in the answer",
        "b.jsonl:5",
    )
    assert records["b.jsonl:6"].images == ()

    with pytest.raises(DataError, match=r"none of 1 records can be trained on .*not in the store"):
        only = jsonl(tmp_path / "c.jsonl", [{"id": "x", "images": ["later.png"], "caption": "c"}])
        build_splits(DataConfig(files=[str(only)]), CAPTION, StoreJoin([torn]))


def lines_of(good: int, gone: int, odd: int = 0, prefix: str = "") -> list[dict[str, object]]:
    """Records whose image is in the store, whose is not, and that cannot be used anyhow."""
    return [
        *(
            {"id": f"{prefix}g{i}", "images": [f"{i:03d}.png"], "caption": "a square"}
            for i in range(good)
        ),
        *(
            {"id": f"{prefix}x{i}", "images": [f"gone{i}.png"], "caption": "a ghost"}
            for i in range(gone)
        ),
        *(
            {"id": f"{prefix}o{i}", "images": ["none.png"], "caption": ("", "a <image>")[i % 2]}
            for i in range(odd)
        ),
    ]


def test_too_many_records_without_features_are_refused(
    store: Store, tmp_path: Path, jsonl: Jsonl
) -> None:
    data = jsonl(tmp_path / "data.jsonl", lines_of(good=30, gone=4))
    with pytest.raises(DataError) as caught:
        build_splits(DataConfig(files=[str(data)]), CAPTION, StoreJoin([store]))
    assert str(caught.value) == (
        f"{store.path}: 4 of 34 records have no features in it, 11.8% where data.max_missing=0.05 "
        "allows 5.0%: 4 image not in the store (x0, x1, x2, ...); to add features, run `featcache "
        f"extract --out {store.path}` with this data (`featcache failures {store.path}` lists the "
        "images to mend first); to do without them, set data.max_missing=0.12 (for `align eval`, "
        "in the run's config.yaml)"
    )
    # The cure, as it was told.
    config = DataConfig(files=[str(data)], max_missing=0.12, eval_ratio=0)
    assert len(build_splits(config, CAPTION, StoreJoin([store])).train) == 30


@pytest.mark.parametrize(
    ("max_missing", "good", "gone"), [(0.05, 38, 2), (0.1, 27, 3), (0.29, 71, 29), (0, 1, 0)]
)
def test_the_share_itself_is_allowed(
    store: Store, tmp_path: Path, jsonl: Jsonl, max_missing: float, good: int, gone: int
) -> None:
    """Also where decimal shares are no binary ones: 0.29 * 100 is below 29."""
    lines = lines_of(good=good, gone=gone)
    for line in lines[:good]:
        line["images"] = ["000.png"]
    config = DataConfig([str(jsonl(tmp_path / "data.jsonl", lines))], max_missing=max_missing)
    assert build_splits(config, CAPTION, StoreJoin([store])).left_out.total == gone
    lines += lines_of(good=0, gone=1, prefix="one more ")
    jsonl(tmp_path / "data.jsonl", lines)
    with pytest.raises(DataError, match=f"{gone + 1} of {good + gone + 1} records have no feat"):
        build_splits(config, CAPTION, StoreJoin([store]))


def test_other_reasons_count_neither_as_missing_nor_as_records(
    store: Store, tmp_path: Path, jsonl: Jsonl
) -> None:
    data = str(jsonl(tmp_path / "data.jsonl", lines_of(good=20, gone=0, odd=20)))
    splits = build_splits(DataConfig([data], max_missing=0), CAPTION, StoreJoin([store]))
    assert splits.left_out.counts == {"the caption is empty": 10, "<image> in the answer": 10}
    # 2 of 22 are more than 5 %, though 2 of 62 would be less.
    jsonl(tmp_path / "data.jsonl", lines_of(good=20, gone=2, odd=40))
    with pytest.raises(DataError, match=r"2 of 22 records have no features .* 9\.1% where"):
        build_splits(DataConfig([data]), CAPTION, StoreJoin([store]))


def test_validation_files_count_as_well(store: Store, tmp_path: Path, jsonl: Jsonl) -> None:
    files = [str(jsonl(tmp_path / "data.jsonl", lines_of(good=30, gone=0)))]
    held = [str(jsonl(tmp_path / "val.jsonl", lines_of(good=2, gone=8, prefix="v")))]
    with pytest.raises(DataError, match=r"8 of 40 records .*\(vx0, vx1, vx2, ...\)"):
        build_splits(DataConfig(files, val_files=held), CAPTION, StoreJoin([store]))
    splits = build_splits(
        DataConfig(files, val_files=held, max_missing=0.2), CAPTION, StoreJoin([store])
    )
    assert (len(splits.train), len(splits.val), len(splits.left_out_records)) == (30, 2, 8)


def test_nothing_to_train_on_names_the_cure(store: Store, tmp_path: Path, jsonl: Jsonl) -> None:
    """Here a larger data.max_missing does not help, so it is not advised."""
    data = str(jsonl(tmp_path / "data.jsonl", lines_of(good=0, gone=2)))
    with pytest.raises(DataError) as caught:
        build_splits(DataConfig([data], max_missing=1), CAPTION, StoreJoin([store]))
    assert f"run `featcache extract --out {store.path}` with this data" in str(caught.value)
    assert "max_missing" not in str(caught.value)


def test_an_hdf5_store_is_not_said_to_be_extended(
    store: Store, tmp_path: Path, jsonl: Jsonl
) -> None:
    convert(store.path, tmp_path / "store.h5")
    data = str(jsonl(tmp_path / "data.jsonl", lines_of(good=0, gone=2)))
    with pytest.raises(DataError) as caught:
        build_splits(DataConfig([data]), CAPTION, StoreJoin([Store(tmp_path / "store.h5")]))
    assert "on the folder that it was converted from, and convert that again" in str(caught.value)
    assert "--out" not in str(caught.value)


def test_records_held_out_do_not_count_as_left_out_of_training(
    store: Store, tmp_path: Path, jsonl: Jsonl
) -> None:
    data = str(jsonl(tmp_path / "data.jsonl", lines_of(good=0, gone=2)))
    held = str(jsonl(tmp_path / "val.jsonl", lines_of(good=0, gone=3, prefix="v")))
    with pytest.raises(DataError, match=r"none of 2 records can be .*: 2 image not in the store"):
        build_splits(DataConfig([data], val_files=[held]), CAPTION, StoreJoin([store]))


def test_images_without_text_cannot_be_trained_on(store: Store, world: Path) -> None:
    with pytest.raises(DataError, match="40 no caption"):
        build_splits(DataConfig(files=[str(world / "images")]), CAPTION, StoreJoin([store]))


def test_unknown_and_empty_splits(store: Store) -> None:
    splits = build_splits(DataConfig(eval_ratio=0), CAPTION, StoreJoin([store]))
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
    splits = build_splits(DataConfig(), CAPTION, StoreJoin([store]))
    assert splits.train[0].rows.dtype == np.int64
