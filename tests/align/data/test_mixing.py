"""Weights of files and pairs of records, on records alone and through `build_splits`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.data.dataset import DataConfig, DataSplits, build_splits
from align.data.mixing import compose, pair_up, repeats, unroll
from align.data.templates import TemplateConfig
from align.errors import DataError
from featcache.join import StoreJoin
from featcache.manifests import Record, Turn
from featcache.store import Store

Jsonl = Callable[[Path, list[dict[str, Any]]], Path]
CAPTION = TemplateConfig()


def records(count: int, images: int = 1, prefix: str = "r") -> list[Record]:
    return [
        Record(
            f"{prefix}{i}",
            tuple(f"{prefix}{i}-{k}.png" for k in range(images)),
            (Turn("human", "<image>\n" * images), Turn("gpt", f"caption {i}")),
            None,
            f"f:{i}",
        )
        for i in range(count)
    ]


# ---------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("weight", "expected"),
    [(0, {0: 100}), (0.3, {0: 70, 1: 30}), (1, {1: 100}), (2.25, {2: 75, 3: 25}), (3, {3: 100})],
)
def test_a_weight_is_how_often_a_record_comes(weight: float, expected: dict[int, int]) -> None:
    some = records(110)
    file_of = np.array([0] * 10 + [1] * 100, np.int32)
    times = repeats(some, file_of, [1, weight], seed=0)
    assert times[:10].tolist() == [1] * 10
    assert Counter(times[10:].tolist()) == expected


def test_a_larger_weight_takes_the_same_and_others_in_any_order() -> None:
    some = records(100)
    file_of = np.zeros(100, np.int32)

    def chosen(weight: float, seed: int = 0, order: slice = slice(None)) -> set[str]:
        times = repeats(some[order], file_of, [weight], seed)
        return {r.id for r, n in zip(some[order], times, strict=True) if n}

    assert chosen(0.3) < chosen(0.6)
    assert chosen(0.3) == chosen(0.3, order=slice(None, None, -1))
    assert chosen(0.3) != chosen(0.3, seed=1)


def test_what_was_held_out_does_not_bias_what_is_drawn() -> None:
    """The lowest ranks of one draw must not be the lowest of another."""
    from align.data.holdout import hold_out

    some = records(4_000)
    held = hold_out(some, 0.5, seed=0)
    drawn = repeats(some, np.zeros(4_000, np.int32), [0.5], seed=0).astype(bool)
    assert abs(int((held & drawn).sum()) - 1_000) < 120  # 4 standard deviations


def test_unroll() -> None:
    assert unroll(np.array([2, 0, 1, 3])).tolist() == [0, 2, 3, 0, 3, 3]
    assert unroll(np.array([], np.int64)).tolist() == []


# ------------------------------------------------------------------------------------------ pairs


@pytest.mark.parametrize(
    ("count", "ratio", "pairs"),
    [(100, 0.25, 20), (11, 0.1, 1), (10, 0.1, 0), (9, 1, 4), (100, 0, 0), (1, 1, 0), (0, 0.5, 0)],
)
def test_the_ratio_is_of_the_samples_that_remain(count: int, ratio: float, pairs: int) -> None:
    found = pair_up(records(count), ratio, seed=0)
    assert len(found) == pairs
    members = [i for pair in found for i in pair]
    assert len(set(members)) == 2 * pairs
    if ratio == 0.25:
        assert pairs / (count - pairs) == ratio


def test_pairs_are_of_the_seed_and_the_records() -> None:
    some = records(200)

    def paired(entries: list[Record], seed: int = 0) -> set[tuple[str, str]]:
        return {(entries[i].id, entries[j].id) for i, j in pair_up(entries, 0.2, seed)}

    assert paired(some) == paired(some[::-1])
    assert paired(some) != paired(some, seed=1)
    # Which of the two comes first is not its place in the file.
    assert 0 < sum(int(a[1:]) < int(b[1:]) for a, b in paired(some)) < len(paired(some))


def test_only_records_of_one_image_question_and_answer_are_paired() -> None:
    turns = (Turn("human", "a"), Turn("gpt", "b"))
    unfit = [
        *records(3, images=2, prefix="two"),
        Record("text", (), turns, None, ""),
        Record("dialogue", ("d.png",), turns * 2, None, ""),
        Record("told", ("s.png",), (Turn("system", "s"), *turns), None, ""),
    ]
    some = unfit + records(6)
    found = pair_up(some, 1 / 3, seed=0)
    assert len(found) == 3
    assert {i for pair in found for i in pair} == set(range(6, 12))
    with pytest.raises(DataError) as caught:
        pair_up(some, 0.6, seed=0)
    assert str(caught.value) == (
        "data.multi_image_ratio=0.6: takes 4 pairs, and 6 of 12 training records have one image, "
        "one question and one answer; make it smaller"
    )


@pytest.mark.parametrize("images", [1, 2, 3, 10])
def test_a_pair_shows_two_images(images: int) -> None:
    some = [
        Record(f"r{i}", (f"{i % images}.png",), records(1)[0].turns, None, "") for i in range(60)
    ]
    found = pair_up(some, 1, seed=0)
    assert len(found) == (0 if images == 1 else 30)
    assert all(some[i].images != some[j].images for i, j in found)


def test_copies_of_a_record_find_others() -> None:
    some = records(50) * 3
    found = pair_up(some, 1, seed=0)
    met = Counter(frozenset((some[i].id, some[j].id)) for i, j in found)
    assert len(found) == 75 and all(len(pair) == 2 for pair in met)
    assert max(met.values()) <= 2


def test_compose() -> None:
    first, second = records(2)
    pair = compose(first, second, "Which?")
    assert pair == Record(
        id="r0+r1",
        images=("r0-0.png", "r1-0.png"),
        turns=(
            Turn("human", "<image>\n<image>\nWhich?"),
            Turn("gpt", "Image 1: caption 0 Image 2: caption 1"),
        ),
        source="composed",
        origin="f:0+f:1",
    )


# ------------------------------------------------------------------------------- through the store


def lines(numbers: range, prefix: str = "s", gone: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{prefix}{i}",
            "images": [f"{i:03d}.png" if i not in gone else f"gone{i}.png"],
            "caption": f"a caption {i}",
        }
        for i in numbers
    ]


def ids(splits: DataSplits) -> list[str]:
    return [sample.record.id for sample in splits.train]


def test_pairs_take_the_place_of_their_two(store: Store) -> None:
    plain = build_splits(DataConfig(eval_ratio=0.25), CAPTION, StoreJoin([store]))
    mixed = build_splits(
        DataConfig(eval_ratio=0.25, multi_image_ratio=0.25), CAPTION, StoreJoin([store])
    )
    assert [s.record for s in mixed.val] == [s.record for s in plain.val]
    assert mixed.division == plain.division
    assert len(plain.train) == 30
    assert (len(mixed.train), mixed.mixture.pairs) == (24, 6)
    used = [part for name in ids(mixed) for part in name.split("+")]
    assert sorted(used) == sorted(ids(plain))
    assert str(mixed.mixture) == "6 samples composed of two records each"
    assert str(plain.mixture) == ""
    rows = {sample.record.id: sample.rows for sample in plain.train}
    pair = next(sample for sample in mixed.train if "+" in sample.record.id)
    first, second = pair.record.id.split("+")
    assert pair.rows.tolist() == [*rows[first].tolist(), *rows[second].tolist()]
    assert pair.record.turns[0].text == f"<image>\n<image>\n{CAPTION.prompt_many}"


def test_records_without_features_leave_the_other_pairs_as_they_are(
    store: Store, tmp_path: Path, jsonl: Jsonl
) -> None:
    data = str(jsonl(tmp_path / "a.jsonl", lines(range(40), gone=(3, 4, 5))))
    config = DataConfig([data], multi_image_ratio=0.5, max_missing=1)
    splits = build_splits(config, CAPTION, StoreJoin([store]))
    records = _train_records(store, config)
    drawn = [(records[i].id, records[j].id) for i, j in pair_up(records, 0.5, config.seed)]
    missing = {"s3", "s4", "s5"}
    whole = {"+".join(pair) for pair in drawn if not missing & set(pair)}
    halves = {name for pair in drawn for name in pair if missing & set(pair)} - missing
    assert halves and whole == {name for name in ids(splits) if "+" in name}
    assert halves <= set(ids(splits)) and not missing & set(ids(splits))
    assert splits.mixture.pairs == len(whole)


def _train_records(store: Store, config: DataConfig) -> list[Record]:
    """The training records, features or not, by means of their own."""
    from align.data.holdout import hold_out
    from featcache.manifests import read_manifest

    found = read_manifest(config.files, store.source["images"]).records
    held = hold_out(found, config.eval_ratio, config.seed)
    return [record for record, out in zip(found, held, strict=True) if not out]


def test_weights_count_per_file_and_leave_validation_alone(
    store: Store, tmp_path: Path, jsonl: Jsonl
) -> None:
    files = [
        str(jsonl(tmp_path / "a.jsonl", lines(range(20), "a"))),
        str(jsonl(tmp_path / "b.jsonl", lines(range(20, 40), "b"))),
    ]
    plain = build_splits(DataConfig(files, eval_ratio=0.2), CAPTION, StoreJoin([store]))
    mixed = build_splits(
        DataConfig(files, eval_ratio=0.2, weights=[0.5, 2]), CAPTION, StoreJoin([store])
    )
    assert [s.record for s in mixed.val] == [s.record for s in plain.val]
    assert mixed.division == plain.division
    of_file = Counter(name[0] for name in ids(plain))
    counts = Counter(ids(mixed))
    assert {counts[name] for name in ids(plain) if name[0] == "b"} == {2}
    halved = [name for name in counts if name[0] == "a"]
    assert len(halved) == round(of_file["a"] / 2 + 1e-9) and {counts[n] for n in halved} == {1}
    a, b = mixed.mixture.files
    assert (a.file, a.weight, a.records, a.samples) == (files[0], 0.5, of_file["a"], len(halved))
    assert (b.records, b.samples) == (of_file["b"], 2 * of_file["b"])
    assert str(mixed.mixture) == (
        f"{files[0]} x 0.5: {len(halved)} samples of {of_file['a']} records; "
        f"{files[1]} x 2: {2 * of_file['b']} samples of {of_file['b']} records"
    )
    none = build_splits(
        DataConfig(files, eval_ratio=0.2, weights=[0, 1]), CAPTION, StoreJoin([store])
    )
    assert {name[0] for name in ids(none)} == {"b"}
    assert [s.record for s in none.val] == [s.record for s in plain.val]


def test_weights_and_pairs_together_never_leak(store: Store) -> None:
    config = DataConfig(eval_ratio=0.25, weights=[2.5], multi_image_ratio=1)
    splits = build_splits(config, CAPTION, StoreJoin([store]))
    held = {sample.record.id for sample in splits.val}
    used = Counter(part for name in ids(splits) for part in name.split("+"))
    assert len(held) == 10 and not held & set(used)
    assert Counter(used.values()) == {2: 15, 3: 15}
    assert splits.mixture.pairs == 37  # of 75; the odd one stays by itself


def test_weights_that_do_not_fit_the_files(store: Store) -> None:
    with pytest.raises(DataError) as caught:
        build_splits(DataConfig(weights=[1, 2]), CAPTION, StoreJoin([store]))
    (file,) = store.source["data"]
    assert str(caught.value) == (
        f"data.weights: 2 numbers for 1 data files ({file}); give one for each"
    )
    with pytest.raises(DataError, match=r"data.weights=\[0.01\]: leave none of the records"):
        build_splits(DataConfig(weights=[0.01]), CAPTION, StoreJoin([store]))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (DataConfig(weights=[1, -0.5]), "weights: must be at least 0 and finite, got [1, -0.5]"),
        (DataConfig(weights=[float("nan")]), "weights: must be at least 0 and finite, got [nan]"),
        (DataConfig(weights=[0, 0]), "weights: at least one must be above 0, got [0, 0]"),
        (DataConfig(multi_image_ratio=1.5), "multi_image_ratio: must be in [0, 1], got 1.5"),
        (DataConfig(max_images=0), "max_images: must be at least 1 or null, got 0"),
        (
            DataConfig(multi_image_ratio=0.1, max_images=1),
            "multi_image_ratio: composes samples of two images, where max_images=1 allows one",
        ),
        (DataConfig(text_only="keep"), 'text_only: must be "skip" or "train", got \'keep\''),
        (DataConfig(stratify="words"), "stratify: must be one of none, length, got 'words'"),
    ],
)
def test_values_that_cannot_be(config: DataConfig, problem: str) -> None:
    assert list(config.problems()) == [problem]
    assert not list(DataConfig().problems())


# ------------------------------------------------------------------- records with no image, or many


def test_text_only_records_are_left_out_and_counted_or_trained_on(
    store: Store, tmp_path: Path, jsonl: Jsonl
) -> None:
    turns = [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi."}]
    texts = [{"id": f"t{i}", "image": "none", "conversations": turns} for i in range(5)]
    data = str(jsonl(tmp_path / "a.jsonl", lines(range(10)) + texts))
    splits = build_splits(DataConfig([data], eval_ratio=0), CAPTION, StoreJoin([store]))
    assert len(splits.train) == 10
    assert str(splits.left_out) == "5 no image (data.text_only=skip) (t0, t1, t2, ...)"
    config = DataConfig([data], eval_ratio=0, text_only="train", weights=[2])
    splits = build_splits(config, CAPTION, StoreJoin([store]))
    assert len(splits.train) == 30 and splits.left_out.total == 0
    assert [len(s.rows) for s in splits.train if s.record.id == "t0"] == [0, 0]
    plain = build_splits(config, TemplateConfig(name="plain"), StoreJoin([store]))
    assert str(plain.left_out) == '5 template "plain" needs an image (t0, t1, t2, ...)'


def test_records_of_many_images(store: Store, tmp_path: Path, jsonl: Jsonl) -> None:
    some = lines(range(10))
    some[0]["images"] = ["000.png", "001.png", "002.png"]
    some[1]["images"] = ["000.png", "001.png"]
    data = str(jsonl(tmp_path / "a.jsonl", some))
    splits = build_splits(DataConfig([data], eval_ratio=0), CAPTION, StoreJoin([store]))
    assert str(splits.left_out) == "1 more images than data.max_images=2 (s0)"
    assert len(splits.train) == 9
    config = DataConfig([data], eval_ratio=0, max_images=None)
    assert len(build_splits(config, CAPTION, StoreJoin([store])).train) == 10


def test_a_stratified_division_is_another_one(store: Store, tmp_path: Path, jsonl: Jsonl) -> None:
    some = lines(range(40))
    for line in some[:20]:
        line["caption"] = "short"
    config = DataConfig([str(jsonl(tmp_path / "a.jsonl", some))], eval_ratio=0.1)
    plain = build_splits(config, CAPTION, StoreJoin([store]))
    by_length = build_splits(replace(config, stratify="length"), CAPTION, StoreJoin([store]))
    assert sum(s.record.turns[1].text == "short" for s in by_length.val) == 2
    assert len(by_length.val) == len(plain.val) == 4
    assert by_length.division != plain.division
