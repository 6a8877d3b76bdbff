"""A disk that fills up, and one that cannot be written: real mounts where that is permitted.

The mounts are made in a mount namespace of their own, which goes with its process:
`python -m tests.faults.test_disk_full full|readonly FOLDER MODEL` is what runs there.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import featcache
from featcache import encoders, extract, repair, worker
from featcache.errors import StoreError
from featcache.extract import ExtractOptions, ExtractProgress
from featcache.live import compare_live
from featcache.verify import verify
from tests.support import feature_files, write_images

ROOT = Path(__file__).resolve().parents[2]


def small(folder: Path, model: str) -> ExtractOptions:
    return ExtractOptions(
        model=model, data=(folder / "images",), out=folder / "store.zarr", codec="int8",
        shard_images=2, batch_size=2,
    )  # fmt: skip


def read_all(store_dir: Path, keys: list[str]) -> list[int]:
    store = featcache.open(store_dir)
    rows = store.rows(keys)
    with store.reader() as reader:
        assert reader.read(rows[rows >= 0]).isfinite().all()
    return rows.tolist()


# --------------------------------------------------------------------------------- in a namespace


def full(folder: Path, model: str) -> None:
    """Something else fills a file system of 2 MB while an extraction runs on it."""
    options = small(folder, model)
    extract.extract(replace(options, out=folder / "reference.zarr"))
    whole = feature_files(folder / "reference.zarr")
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
    committed = []
    for left_kb in (0, 8, 16, 36, 60, 100):
        out, filler = disk / "store.zarr", disk / "filler"

        def fill(progress: ExtractProgress, left_kb: int = left_kb, filler: Path = filler) -> None:
            if not filler.exists() and list(disk.glob("store.zarr/journal/plan-*.npz")):
                free = shutil.disk_usage(disk).free
                filler.write_bytes(bytes(free - 1024 * left_kb))

        try:
            extract.extract(replace(options, out=out), fill)
        except StoreError as error:
            assert "the disk is full; every committed shard is safe: free some space" in str(error)
            assert "\n" not in str(error)
        else:
            raise AssertionError(f"{left_kb} KB were enough")
        assert not list(out.rglob(".partial-*"))
        committed.append(len(list(out.glob("journal/commit-*.json"))))
        report = verify(out)
        assert all("copy" in problem.where for problem in report.problems), report.problems
        filler.unlink()
        assert extract.extract(replace(options, out=out)).ok
        assert feature_files(out) == whole
        assert verify(out).ok

        # The same under a repair.
        (out / "journal/commit-00000001.json").unlink()
        (out / "features/-2/c/0/0/0").unlink()
        filler.write_bytes(bytes(shutil.disk_usage(disk).free))
        try:
            repair.repair(out)
        except StoreError as error:
            assert "the disk is full" in str(error)
        else:
            raise AssertionError("a full disk was enough")
        filler.unlink()
        assert repair.repair(out).ok
        assert feature_files(out) == whole
        shutil.rmtree(out)
    print("committed before it was full:", committed)
    assert len(set(committed)) > 2


def readonly(folder: Path, model: str) -> None:
    """A store on a medium that cannot be written: it is read and verified, and not repaired."""
    options = small(folder, model)
    extract.extract(options)
    keys = [f"{i:04d}.png" for i in range(8)]
    out = str(options.out)
    subprocess.run(["mount", "--bind", out, out], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", out], check=True)
    assert read_all(options.out, keys) == list(range(8))
    assert verify(options.out).ok
    assert compare_live(options.out, 2).compared == 2
    for write in (lambda: extract.extract(options), lambda: repair.repair(options.out)):
        try:
            write()
        except StoreError as error:
            assert "cannot write (Read-only file system)" in str(error)
        else:
            raise AssertionError("written to a read-only file system")


@pytest.mark.parametrize("what", ["full", "readonly"])
def test_a_real_file_system(encoder_dir: Path, tmp_path: Path, what: str) -> None:
    allowed = shutil.which("unshare") and subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True
    )
    if not allowed or allowed.returncode:
        pytest.skip("mounting is not permitted here")
    write_images(tmp_path / "images", 8)
    command = ["unshare", "-m", sys.executable, "-m", "tests.faults.test_disk_full", what]
    done = subprocess.run(
        [*command, str(tmp_path), str(encoder_dir)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------- injected


class Full:
    """Makes the disk full from the n-th sync of a file or folder on; every publication has some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.at: int | None = None

        def counted(descriptor: int) -> None:
            if self.at is not None and self.count >= self.at:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.count += 1  # and no real sync, which takes most of the time here

        monkeypatch.setattr(os, "fsync", counted)

    def after(self, count: int | None) -> None:
        self.count, self.at = 0, count


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_full_at_every_write(
    encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    load = functools.cache(encoders.load_encoder)
    for module in (worker, repair):
        monkeypatch.setattr(module, "load_encoder", lambda name, **more: load(name, device="cpu"))
    write_images(tmp_path / "images", 3)
    options = small(tmp_path, str(encoder_dir))
    disk = Full(monkeypatch)
    extract.extract(options)
    total, whole = disk.count, feature_files(options.out)
    assert total > 60
    for writes in range(0, total, step):
        out = tmp_path / f"{writes}.zarr"
        disk.after(writes)
        with pytest.raises(StoreError, match="the disk is full; every committed shard is safe"):
            extract.extract(replace(options, out=out))
        assert not list(out.rglob(".partial-*"))
        committed = {path.name for path in out.glob("journal/commit-*.json")}
        disk.after(None)
        assert extract.extract(replace(options, out=out)).new <= 3 - 2 * (
            "commit-00000000.json" in committed
        )
        assert feature_files(out) == whole
        assert verify(out).ok
        shutil.rmtree(out)

    (options.out / "journal/commit-00000001.json").unlink()
    (options.out / "journal/copy/zarr.json").unlink()
    (options.out / "features/-2/c/0/0/0").unlink()
    shutil.copytree(options.out, tmp_path / "damaged.zarr")
    disk.after(None)
    assert repair.repair(options.out).ok
    for writes in range(0, disk.count, step):
        out = shutil.copytree(tmp_path / "damaged.zarr", tmp_path / f"{writes}.zarr")
        disk.after(writes)
        with pytest.raises(StoreError, match="the disk is full"):
            repair.repair(out)
        disk.after(None)
        assert repair.repair(out).ok
        assert feature_files(out) == whole
        shutil.rmtree(out)


if __name__ == "__main__":
    {"full": full, "readonly": readonly}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
