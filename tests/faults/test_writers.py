"""Two real processes at one store: one writes, the other is told so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from featcache.extract import ExtractOptions, extract
from featcache.verify import verify
from tests.support import feature_files, write_images

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "from cli.featcache import main; main()"


def start(*argv: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def options(encoder_dir: Path, tmp_path: Path) -> ExtractOptions:
    write_images(tmp_path / "images", 80)
    options = ExtractOptions(
        model=str(encoder_dir), data=(tmp_path / "images",), out=tmp_path / "reference.zarr",
        shard_images=4, batch_size=4,
    )  # fmt: skip
    extract(options)
    return options


def check_all(processes: list[subprocess.Popen[str]]) -> int:
    """Each either ends well or is refused in one line. Returns how many were refused."""
    refused = 0
    for process in processes:
        _, err = process.communicate(timeout=120)
        last = err.splitlines()[-1]
        if process.returncode == 0:
            continue
        assert process.returncode == 1, err
        assert last.startswith("error: another process is writing "), err
        assert "Traceback" not in err
        refused += 1
    return refused


def test_two_extractions_and_a_repair(options: ExtractOptions, tmp_path: Path) -> None:
    whole = feature_files(options.out)
    out = tmp_path / "store.zarr"
    command = ["extract", "--model", options.model, "--data", options.data[0], "--out", out]
    command += ["--shard-images", 4, "--batch-size", 4]
    assert check_all([start(*command), start(*command)]) <= 1
    assert feature_files(out) == whole
    assert verify(out).ok

    for shard in range(0, 20, 3):
        (out / f"features/-2/c/{shard}/0/0").write_bytes(b"short")
    assert check_all([start(*command), start("verify", out, "--repair")]) <= 1
    assert feature_files(out) == whole
    assert verify(out).ok
