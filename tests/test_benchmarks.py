"""The benchmarks run, small and untimed; their figures are judged by people, not here."""

from __future__ import annotations

from pathlib import Path

from benchmarks import bench_open
from benchmarks.bench_open import write_index
from benchmarks.bench_store import measure
from benchmarks.synthetic import write_store


def test_bench_store(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store.zarr", 70, num_patches=16, width=32, shard_images=32)
    rows = measure(path, images=70, rounds=2, batches_per_round=2)
    assert [row["provider"] for row in rows][:2] == [
        "memcpy, 1 thread",
        "featcache stream, 1 thread",
    ]
    for row in rows:
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["ceiling"] == rows[0]["p50"]
        assert row["n"] == 2


def test_bench_open(tmp_path: Path) -> None:
    root = write_index(tmp_path / "store.zarr", 2000)
    bench_open.forget(root)
    found = bench_open.probe(root, 2000, 500)
    assert found.keys() == {"open", "find", "peak", "own"}
    assert found["open"] > 0 and found["find"] > 0
    assert bench_open.one_pass(root) > 0
