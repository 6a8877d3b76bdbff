"""Kill `featcache extract` with SIGKILL at random moments, rerun, and compare every byte.

    python tests/faults/kill_extract.py --kills 20

The reference is an undisturbed run over the same images. Each victim is the real command in its
own process, killed at a moment drawn uniformly from the time that it should take from its first
write to its end, by what is left to do; then one last run finishes the store. Exits 1 on any
difference.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support import feature_files, write_images

PROGRAM = "from cli.featcache import main; main()"


def command(images: Path, out: Path, model: str, codec: str) -> list[str]:
    return [
        sys.executable, "-c", PROGRAM, "extract", "--model", model, "--random-weights",
        "--data", str(images), "--out", str(out), "--shard-images", "8", "--batch-size", "4",
        "--codec", codec,
    ]  # fmt: skip


def run(
    kills: int, images: int, seed: int, model: str, folder: Path, codec: str = "fp16"
) -> dict[str, int]:
    """Returns counts: kills that hit a running extraction, shards found committed after a kill,
    partial files found, files compared. Raises AssertionError where a byte differs."""
    chance = random.Random(seed)
    write_images(folder / "images", images)
    reference = subprocess.Popen(
        command(folder / "images", folder / "reference.zarr", model, codec),
        stderr=subprocess.DEVNULL,
    )
    _wait_for_lock(reference, folder / "reference.zarr")
    first_write = time.monotonic()
    assert reference.wait() == 0, "the undisturbed run failed"
    writing_s = time.monotonic() - first_write
    shards = len(list((folder / "reference.zarr").glob("journal/commit-*.json")))

    counts = {"killed": 0, "finished_before_the_kill": 0, "partial_files": 0, "committed": 0}
    out = folder / "killed.zarr"
    while counts["killed"] < kills:
        (out / "journal/lock").unlink(missing_ok=True)
        left = 1 - len(list(out.glob("journal/commit-*.json"))) / shards
        process = subprocess.Popen(
            command(folder / "images", out, model, codec), stderr=subprocess.DEVNULL
        )
        _wait_for_lock(process, out)
        try:
            process.wait(chance.uniform(0, left * writing_s))
            counts["finished_before_the_kill"] += 1
            assert counts["finished_before_the_kill"] < 10 * kills, "no kill hits in time"
            # Start over, so that the remaining kills hit something.
            subprocess.run(["rm", "-r", str(out)], check=True)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            counts["killed"] += 1
            counts["partial_files"] += len(list(out.rglob(".partial-*")))
            counts["committed"] += len(list(out.glob("journal/commit-*.json")))
    last = subprocess.run(
        command(folder / "images", out, model, codec),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert last.returncode == 0, last.stderr
    expected, found = feature_files(folder / "reference.zarr"), feature_files(out)
    assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
    different = [name for name in expected if expected[name] != found[name]]
    assert not different, f"bytes differ in {different}"
    assert not list(out.rglob(".partial-*")), "partial files were left behind"
    return counts | {"files_compared": len(found)}


def _wait_for_lock(process: subprocess.Popen[bytes], store: Path) -> None:
    """Until it has made the file that it locks, or has ended."""
    while process.poll() is None and not (store / "journal/lock").exists():
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="tiny", help="encoder name or folder")
    parser.add_argument("--codec", default="fp16")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = run(
            arguments.kills,
            arguments.images,
            arguments.seed,
            arguments.model,
            Path(folder),
            arguments.codec,
        )
    print(", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()))
    print("every byte equals the undisturbed run's")


if __name__ == "__main__":
    main()
