"""The benchmarks run, small and untimed; their figures are judged by people, not here."""

from __future__ import annotations

from pathlib import Path

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
