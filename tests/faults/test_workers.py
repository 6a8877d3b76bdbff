"""Workers that are lost in the middle of an extraction, and how the real launchers start them.

tests/faults/kill_workers.py does the same with more workers and kills."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from featcache.verify import verify
from tests.faults import kill_workers
from tests.support import feature_files, write_images

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "from cli.featcache import main; main()"


def test_processes_that_are_killed(tmp_path: Path) -> None:
    counts = kill_workers.run("local", 2, 2, 240, tmp_path)
    assert counts["kills"] == 2 and counts["files_compared"] == 120


def test_ranks_that_are_killed(tmp_path: Path) -> None:
    """As srun starts them; those that are left do the others' shards."""
    counts = kill_workers.run("ranks", 3, 2, 240, tmp_path)
    assert counts["kills"] == 2 and counts["files_compared"] == 120


@pytest.mark.slow
def test_ray_actors_that_are_killed(tmp_path: Path) -> None:
    counts = kill_workers.run("ray", 2, 3, 2000, tmp_path)
    assert counts["kills"] == 3


@pytest.mark.slow
def test_eight_workers_twenty_kills_and_a_faulty_bucket(tmp_path: Path) -> None:
    with kill_workers.bucket(tmp_path) as where:
        assert kill_workers.run("local", 8, 20, 600, tmp_path, **where)["kills"] == 20


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_torchrun(encoder_dir: Path, tmp_path: Path) -> None:
    """The documented form, with one document and one summary for both ranks."""
    write_images(tmp_path / "images", 24)
    command = [
        "-m", "cli.featcache", "extract", "--model", str(encoder_dir), "--data",
        str(tmp_path / "images"), "--shard-images", "2", "--batch-size", "2", "--device", "cpu",
        "--json", "--out",
    ]  # fmt: skip
    alone = subprocess.run(
        [sys.executable, *command, str(tmp_path / "alone.zarr")],
        env=environment(), cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    assert json.loads(alone.stdout)["work"]["done"] == 24
    out = tmp_path / "two.zarr"
    two = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *command,
            str(out),
        ],
        env=environment(), cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    (document,) = two.stdout.splitlines()
    work = json.loads(document)["work"]
    assert work["done"] == 24
    assert two.stderr.count(" of 24 images have features") == 1
    (log,) = (out / "journal/jobs").glob("*-rank00001.log")
    assert "rank 1 of 2: done in" in log.read_text()
    assert feature_files(out) == feature_files(tmp_path / "alone.zarr")
    report = verify(out)
    assert report.ok and not report.notes


def test_ray(encoder_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    write_images(tmp_path / "images", 24)
    command = [
        sys.executable, "-m", "cli.featcache", "extract", "--model", str(encoder_dir),
        "--data", str(tmp_path / "images"), "--shard-images", "2", "--batch-size", "2",
        "--codec", "int8", "--json", "--out",
    ]  # fmt: skip
    subprocess.run(
        [*command, str(tmp_path / "alone.zarr")],
        env=environment(), cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    out = tmp_path / "two.zarr"
    # A short name: it becomes part of those of sockets.
    with tempfile.TemporaryDirectory() as folder:
        noted = Path(folder, "ray", "ray_current_cluster")
        noted.parent.mkdir()
        noted.write_text("127.0.0.1:1")  # of a cluster that was killed
        two = subprocess.run(
            [*command, str(out), "--executor", "ray", "--workers", "2"],
            env=environment() | {"RAY_TMPDIR": folder},
            cwd=tmp_path, check=True, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    work = json.loads(two.stdout)["work"]
    assert (work["done"], work["workers"], work["lost"]) == (24, 2, 0)
    assert feature_files(out) == feature_files(tmp_path / "alone.zarr")

    missing = subprocess.run(
        [*command, str(out), "--executor", "ray", "--model", "sigclip"],
        env=environment(), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1].startswith("error: unknown encoder 'sigclip'")


def test_a_ray_cluster_that_is_not_there(encoder_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    write_images(tmp_path / "images", 2)
    done = subprocess.run(
        [
            sys.executable, "-c", PROGRAM, "extract", "--model", str(encoder_dir), "--data",
            str(tmp_path / "images"), "--out", str(tmp_path / "store.zarr"), "--executor", "ray",
        ],
        env=environment() | {"RAY_ADDRESS": "127.0.0.1:1"},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: RAY_ADDRESS=127.0.0.1:1: no Ray cluster")
    assert not (tmp_path / "store.zarr").exists()


# A cluster that was started where somebody has a token asks for it, and a driver that is given an
# address does not send it by itself.
NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}


class RayCluster:
    """A Ray of its own on loopback, that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._folder = folder
        self.address = f"127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        ray = Path(sys.executable).with_name("ray")
        self._process = subprocess.Popen(
            [
                str(ray), "start", "--head", "--block", f"--port={self._port}", "--num-cpus=2",
                "--node-ip-address=127.0.0.1", "--include-dashboard=false",
                "--disable-usage-stats", "--object-store-memory=100000000",
            ],
            env=environment() | NO_TOKEN, cwd=self._folder, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1).close()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("the Ray head does not start")

    def kill(self) -> None:
        for pid in [*kill_workers.descendants(self._process.pid), self._process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


@pytest.mark.slow
def test_the_ray_head_is_restarted(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    write_images(tmp_path / "images", 6000)
    reference, out = tmp_path / "reference.zarr", tmp_path / "store.zarr"
    command = [
        sys.executable, "-m", "cli.featcache", "extract", "--model", "tiny", "--data",
        str(tmp_path / "images"), "--shard-images", "4", "--batch-size", "4", "--device", "cpu",
        "--out",
    ]  # fmt: skip
    subprocess.run([*command, str(reference)], env=environment(), cwd=tmp_path, check=True)
    cluster = RayCluster(tmp_path)
    over_ray = [*command, str(out), "--executor", "ray", "--workers", "2"]
    # How long a driver waits for a head that is gone.
    env = environment() | {
        "RAY_ADDRESS": cluster.address,
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
        **NO_TOKEN,
    }
    try:
        driver = subprocess.Popen(over_ray, env=env, cwd=tmp_path)
        while len(list(out.glob("journal/commit-*"))) < 10:
            assert driver.poll() is None
            time.sleep(0.05)
        cluster.kill()
        assert driver.wait(120) != 0
        committed = len(list(out.glob("journal/commit-*")))
        assert 10 <= committed < 1500
        cluster.start()
        subprocess.run(over_ray, env=env, cwd=tmp_path, check=True)
    finally:
        cluster.kill()
    assert feature_files(out) == feature_files(reference)
