"""The `featcache` program as a user types it: exit codes, stdout, one line an error."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli import console
from cli.console import run
from cli.featcache import group
from featcache.registry import ENCODERS
from tests.support import write_captions, write_images
from tests.support_inputs import samples, write_tar


@pytest.fixture
def extract_command(encoder_dir: Path, images_dir: Path, tmp_path: Path) -> list[str]:
    return [
        "extract", "--model", str(encoder_dir), "--data", str(images_dir),
        "--out", str(tmp_path / "store.zarr"), "--shard-images", "4",
    ]  # fmt: skip


def test_extract_info_failures(
    extract_command: list[str],
    images_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (images_dir / "0001.png").write_bytes(b"no image")
    store = str(tmp_path / "store.zarr")
    assert run(group, [*extract_command, "--json"]) == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["images"], document["features"], document["ok"]) == (10, 9, False)
    assert document["failures"] == {"undecodable": 1}
    assert f"{store}: 9 of 10 images have features (10 new" in err
    assert "error: more images failed than allowed; mend the images" in err
    assert run(group, [*extract_command, "--max-failures", "0.2"]) == 0
    capsys.readouterr()

    assert run(group, ["info", store, "--json"]) == 0
    out, err = capsys.readouterr()
    info = json.loads(out)
    assert (info["shape"], info["images"], info["codec"]) == ([10, 9, 24], 9, "fp16")
    assert info["shards"] == {"committed": 3, "planned": 3}
    assert "features" in err
    assert "10 x 9 x 24 fp16, layer -2" in err

    assert run(group, ["failures", store, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["failures"] == [
        {
            "key": "0001.png",
            "reason": "undecodable",
            "detail": "no image of a known format",
        }
    ]


def test_dry_run(
    extract_command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [*write_images(tmp_path / "some", 3), "none.png"]
    data = write_captions(tmp_path / "some" / "captions.jsonl", names)
    extract_command[4] = str(data)
    assert run(group, [*extract_command, "--dry-run", "--max-failures", "1"]) == 0
    err = capsys.readouterr().err
    # Three images of 4,096 B, a shard index, the pooled outputs, and 1 KB an image for the books.
    expected = r"^4 images; 3 images to encode: 15\.\d KB of .*B free, about .* \(a probe took"
    assert re.search(expected, err, re.MULTILINE)
    assert "1 cannot be read: missing" in err
    assert not (tmp_path / "store.zarr").exists()


def test_skipped_records_are_named(
    extract_command: list[str],
    images_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = images_dir / "captions.jsonl"
    data.write_text('{"image": "0000.png", "caption": "a"}\n{"image": "0001.png", "caption": ""}\n')
    extract_command[4] = str(data)
    assert run(group, extract_command) == 0
    assert "skipped 1: the caption is empty (first: captions.jsonl:2)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--codec", "fp61"], 2, "unknown codec 'fp61'; choose one of fp16, bf16"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--device", "gpu"], 2, "unknown device 'gpu'"),
        (["--layer", "9"], 1, "has no layer 9"),
        (["--data", "none.json"], 1, "none.json does not exist; check --data"),
        (["--model", "siglip2-so400n"], 1, "did you mean 'siglip2-so400m'?"),
        (["--executor", "slurm"], 2, "'slurm' is not one of 'local', 'ray'"),
    ],
)
def test_errors_are_one_line(
    extract_command: list[str],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    assert run(group, [*extract_command, *arguments]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_info_of_what_is_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(group, ["info", str(tmp_path / "none.zarr")]) == 1
    assert "is not a feature store (no such directory)" in capsys.readouterr().err


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(group, ["models", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert models["siglip2-so400m"]["bytes_per_image"] == 1_679_616
    assert all(entry["tflop"] > 0 and entry["width"] > 0 for entry in models.values())


def test_the_table_of_models_shows_every_name_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of 100 columns: only names of checkpoints may go on in a second line."""
    from rich.console import Console

    drawn = Console(width=100, record=True, file=io.StringIO())
    monkeypatch.setattr(console, "stderr", lambda: drawn)
    assert run(group, ["models"]) == 0
    lines = drawn.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    first = {line.split()[0] for line in lines if line.strip()}
    assert set(ENCODERS) <= first
    assert any("9216 x 5760" in line and "106.2 MB" in line for line in lines)


def test_fit_and_what_is_wrong_with_it(
    extract_command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(group, [*extract_command, "--fit", "stretch"]) == 2
    assert "error: --fit 'stretch' is none of checkpoint, squash, crop, pad" in (
        capsys.readouterr().err
    )
    assert run(group, [*extract_command, "--fit", "pad:10,20,30"]) == 0
    capsys.readouterr()
    assert run(group, ["info", str(tmp_path / "store.zarr"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fingerprint"]["preprocessing"]["pad"] == [10, 20, 30]


def test_the_installed_program() -> None:
    program = Path(sys.executable).parent / "featcache"
    done = subprocess.run([program, "modles"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no command 'modles'; did you mean 'models'?")


def test_tars_and_tiles(
    extract_command: list[str],
    images_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for shard in range(2):
        names = [f"{i:04d}.png" for i in range(5 * shard, 5 * shard + 5)]
        write_tar(tmp_path / f"{shard:05d}.tar", samples(images_dir, names))
    extract_command[4] = str(tmp_path / "{00000..00001}.tar")
    assert run(group, [*extract_command, "--tiles", "1x2,2x1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["images"], document["features"], document["new"]) == (10, 10, 30)
    assert run(group, ["info", str(tmp_path / "store.zarr")]) == 0
    told = capsys.readouterr().err
    assert "30 with features, tiles included" in told
    assert re.search(r"tiles\.grids +\['1x2', '2x1'\]", told)
    assert run(group, [*extract_command, "--tiles", "2"]) == 2
    assert "error: --tiles '2': '2' is no grid" in capsys.readouterr().err
