"""`align bench`: what it prints and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Align

SMALL = ["--quick", "--images", "33", "--shape", "4x8", "--providers", "memmap"]


def test_bench_store(align: Align, tmp_path: Path) -> None:
    out = tmp_path / "rows" / "store.jsonl"
    done = align("bench", *SMALL, "--cache", "warm", "--dir", tmp_path, "--out", out, "--json")
    assert done.code == 0
    assert done.document.keys() == {"benchmark", "results", "left_out", "failed"}
    assert done.document["failed"] == {}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == done.document["results"]
    assert {row["provider"] for row in rows} == {"memcpy, 1 thread", "np.memmap, np.take"}
    assert "warm cache, random batches" in done.err and "of ceiling" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--cache", "hot"], "error: --cache: no state 'hot'; known: warm, cold, small-ram\n"),
        (["--shape", "729"], "error: --shape 729: must be like 729x1152, patches x width\n"),
        (["--shape", "0x3"], "error: --shape 0x3: must be like 729x1152, patches x width\n"),
        (["--images", "1000000000"], "fewer --images\n"),
        (["--providers", "parquet"], "no provider 'parquet'; known: memcpy, "),
    ],
)
def test_wrong_usage_is_one_line(align: Align, flags: list[str], line: str) -> None:
    done = align("bench", "store", *flags)
    assert done.code == (1 if flags[0] == "--images" else 2)
    assert line in done.err and "Traceback" not in done.err


def test_bench_step(align: Align, tmp_path: Path) -> None:
    out = tmp_path / "step.jsonl"
    small = ["--quick", "--model", "tiny", "--tokens", "8", "--loops", "cached,live"]
    done = align(
        "bench", "step", *small, "--one-process", "--dir", tmp_path, "--out", out, "--json",
        "connector.depth=1",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.document.keys() == {"benchmark", "results", "failed", "break_even", "planned"}
    assert [json.loads(line) for line in out.read_text().splitlines()] == done.document["results"]
    assert {row["provider"] for row in done.document["results"]} == {"matmul", "cached", "live"}
    assert done.document["results"][0]["config"]["overrides"] == ["connector.depth=1"]
    assert "tiny, 8 visual + 30 text tokens" in done.err and "Break-even" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["step.jsonl"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["step", "--tokens", "64,x"], "error: --tokens 64,x: must be numbers above 0"),
        (["step", "--loops", "cached,liv"], "error: --loops: no 'liv'; did you mean 'live'?"),
        (["step", "connector.dept=1"], "connector.dept: no such field, did you mean `depth`?"),
        (["step", "--llm", "Qwen3-8B"], "error: --llm Qwen3-8B: give --random-weights"),
        (["store", "optim.lr=1"], "optim.lr=1: KEY=VALUE is for `align bench step`"),
        (["all", "--out", "x"], "--out: give it to store, extract and step, one by one"),
    ],
)
def test_wrong_usage_of_step_is_one_line(align: Align, flags: list[str], line: str) -> None:
    done = align("bench", *flags)
    assert done.code in (1, 2)
    assert line in done.err and "Traceback" not in done.err
