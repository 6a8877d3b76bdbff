"""The benchmarks run, small and untimed; their figures are judged by people, not here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from align.bench import extract
from align.demo.run import QUICK
from align.flop import LanguageModel
from benchmarks import (
    bench_codec_loss,
    bench_codecs,
    bench_decode,
    bench_fp8,
    bench_layers,
    bench_open,
    bench_page_cache,
    bench_reader,
    bench_sampling,
    bench_schedule,
    bench_write,
    plan_scale,
)
from benchmarks.bench_open import write_index
from featcache.codecs import CODECS
from featcache.encode import STAGES
from featcache.errors import StoreError


def test_bench_write(tmp_path: Path) -> None:
    rows = bench_write.measure(tmp_path, images=16, rounds=1, num_patches=4, width=32)
    assert [(row["provider"], row["metric"]) for row in rows] == [
        (codec, stage) for codec in CODECS for stage in ("encode", "place", "write")
    ]
    assert all(row["p50"] > 0 for row in rows)


def test_bench_fp8() -> None:
    size = LanguageModel("small", 64, 2, 4, 2, 16, 128, 512)
    rows = bench_fp8.measure(bench_fp8.random_case(size, 2, 12, 3, "cpu"), 1, compiled=False)
    rows += bench_fp8.measure(bench_fp8.tiny_case("cpu"), 1, compiled=False)
    away = {(row["config"]["model"], row["provider"], row["metric"]): row["p50"] for row in rows}
    assert len(away) == len(rows) == 2 * 4 * 2
    for model in ("small", "tiny"):
        assert 0 < away[model, "bf16", "gradient"] < away[model, "fp8", "gradient"] < 0.3
    assert len(bench_fp8.table(rows).splitlines()) == 2 + 2 * 4


def test_bench_layers() -> None:
    size = LanguageModel("small", 64, 2, 4, 2, 16, 128, 512)
    rows = bench_layers.measure(size, 4, 2, 1, compiles=False, device="cpu")
    kept = {(row["provider"], row["config"]["checkpointed"]): row["config"] for row in rows}
    for layout in ("padded", "grouped", "packed"):
        assert kept[layout, True]["kept_mb"] < kept[layout, False]["kept_mb"]
    assert kept["packed", False]["padding"] == 0 < kept["grouped", False]["padding"]
    assert len(bench_layers.table(rows).splitlines()) == 2 + 6


def test_bench_codecs() -> None:
    data = {"small": (bench_codecs.synthetic(2, 0, 5, 96), bench_codecs.synthetic(2, 1, 5, 96))}
    found = {row["provider"] for row in bench_codecs.quality(data)}
    assert found == set(CODECS)


@pytest.mark.slow
def test_bench_codec_loss(tmp_path: Path) -> None:
    """A few steps: every codec is trained on, and the baseline's weights meet every store."""
    rows = bench_codec_loss.measure(tmp_path, QUICK, ["fp16", "int4"], [0])
    swapped = "loss, given fp16's weights"
    by_name = {(row["provider"], row["metric"]): row["p50"] for row in rows}
    assert by_name["fp16", "loss"] == by_name["fp16", swapped] != by_name["int4", swapped]
    assert "| loss | int4 |" in bench_codec_loss.table(rows)


def test_bench_open(tmp_path: Path) -> None:
    root = write_index(tmp_path / "store.zarr", 2000)
    bench_open.forget(root)
    found = bench_open.probe(root, 2000, 500)
    assert found.keys() == {"open", "find", "peak", "own"}
    assert found["open"] > 0 and found["find"] > 0
    assert bench_open.one_pass(root) > 0


def test_bench_sampling() -> None:
    """What is worked out of a batch is what is counted, where no batch lies across two windows."""
    rows = bench_sampling.mixing(4 * 128 * 128)
    found = {(row["provider"], row["metric"], row["x"]): row for row in rows}
    for window in (0, *bench_sampling.WINDOWS):
        for metric in ("shards in a batch", "pairs of one shard"):
            counted, expected = (found[name, metric, window] for name in ("order", "expected"))
            assert counted["p50"] == pytest.approx(expected["p50"], rel=0.02), (metric, window)
    assert all(row["p50"] > 0 for row in bench_sampling.costs([1000]))
    assert "| global | W = 8 |" in bench_sampling.table(rows)


@pytest.mark.slow
def test_bench_sampling_demo(tmp_path: Path) -> None:
    rows = bench_sampling.demo(tmp_path, QUICK, [0], [0, 1])
    assert {(row["provider"], row["x"]) for row in rows} == {
        (f"demo, {order} order", window) for order in ("random", "sorted") for window in (0, 1)
    }


def test_bench_page_cache(tmp_path: Path) -> None:
    rows = bench_page_cache.measure(tmp_path, rows=2, rounds=1, count=3)
    assert [row["provider"] for row in rows[::2]] == list(bench_page_cache.PATTERNS)
    assert all(row["p50"] > 0 for row in rows)


def test_bench_reader(tmp_path: Path) -> None:
    rows = bench_reader.measure(tmp_path, images=40, rounds=1, rows=1000, num_patches=9, width=64)
    by_name = {(row["provider"], row["metric"], row["x"]): row for row in rows}
    for codec in CODECS:
        assert by_name[codec, "read", None]["p50"] > 0 < by_name[codec, "decode", "float32"]["p50"]
    assert by_name["joined", "read from both", None]["p50"] > 0
    memory = by_name["featcache", "reader RssAnon", 1000]
    assert memory["p50"] < memory["config"]["allowed_mb"]


def test_bench_decode() -> None:
    pytest.importorskip("simplejpeg")
    pytest.importorskip("pyarrow")
    counted = bench_decode.compare(2)
    assert {row["metric"] for row in counted if row["x"].startswith("4:2:0")} == {"equal"}
    rows = bench_decode.measure(((40, 30),), rounds=1, seconds=0.0)
    assert len(rows) == 2 * 2 * (5 + 4)  # wall and CPU, one and two threads; arrays stay as large
    assert all(row["p50"] > 0 for row in rows)


def test_the_tables_of_docs_scale_are_what_the_formulas_give() -> None:
    page = plan_scale.PAGE.read_text()
    shown = page.split(plan_scale.BEGIN)[1].split(plan_scale.END)[0]
    assert shown == f"\n\n{plan_scale.markdown()}\n\n", "python benchmarks/plan_scale.py --write"


def test_writing_the_tables_leaves_the_rest_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{plan_scale.BEGIN}\nold\n{plan_scale.END}\nafter\n")
    plan_scale.write(page)
    tables = plan_scale.markdown()
    assert page.read_text() == (
        f"before\n{plan_scale.BEGIN}\n\n{tables}\n\n{plan_scale.END}\nafter\n"
    )


def test_bench_schedule(tmp_path: Path) -> None:
    rows = bench_schedule.scheduled(tmp_path / "scheduled", 20, 4, executors={})
    assert {row["provider"] for row in rows} == {"make", "record", "journal", "index"}
    written = bench_schedule.written(tmp_path / "written", actors=0, shards=1, rounds=1)
    assert {(row["provider"], row["metric"]) for row in written} == {
        ("plain write", "written"),
        ("1 worker", "written"),
        ("1 worker", "time in wait"),
        ("1 worker", "time in write"),
    }
    assert all(row["p50"] > 0 for row in rows + written)


def test_bench_extract(tmp_path: Path) -> None:
    plan = extract.ExtractPlan("tiny", images=8, batch_size=4, rounds=1)
    rows = {(row["provider"], row["metric"]): row for row in extract.measure(tmp_path, plan)}
    ratio = rows["extract", "of the bare encoder"]["p50"]
    assert ratio == rows["extract", "rate"]["p50"] / rows["forward", "rate"]["p50"] > 0
    assert {stage for _, stage in rows} >= set(STAGES)

    with pytest.raises(StoreError, match="the encoder sigclip alone failed"):
        extract.measure(tmp_path / "none", replace(plan, model="sigclip"))
