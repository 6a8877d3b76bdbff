from __future__ import annotations

from pathlib import Path

from tests.faults.kill_extract import run


def test_killed_extractions_end_with_the_bytes_of_an_undisturbed_run(
    encoder_dir: Path, tmp_path: Path
) -> None:
    counts = run(kills=4, images=300, seed=1, model=str(encoder_dir), folder=tmp_path, codec="int8")
    assert counts["killed"] >= 1
    assert counts["files_compared"] == 3 * 38 + 1
