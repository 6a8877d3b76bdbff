"""Kill the workers of a running extraction with SIGKILL, one at random after another, sometimes the
program itself as well, and compare every byte with one worker's undisturbed run.

    python tests/faults/kill_workers.py --executor local --workers 8 --kills 20
    python tests/faults/kill_workers.py --executor ray --workers 4 --kills 10
    python tests/faults/kill_workers.py --executor ranks --workers 4 --kills 10
    python tests/faults/kill_workers.py --bucket --workers 8 --kills 20

--bucket: the store is in an S3 server on this machine, behind a proxy that refuses, cuts or loses
one request in twenty.

What is killed: processes of `--executor local`; Ray's actors; ranks as srun starts them, which
nobody starts again. Each victim is the real command. Where it ends, or is killed, before there were
enough kills, it is run again, into an empty store where it had finished. Exits 1 on any difference.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featcache.files import remove_tree
from featcache.object_path import parse_location
from tests.support import feature_files, write_images

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "from cli.featcache import main; main()"
DRIVER_SHARE = 0.15
"""Of the kills, those that hit the program itself."""


def command(images: Path, out: str, model: str, codec: str) -> list[str]:
    return [
        sys.executable, "-c", PROGRAM, "extract", "--model", model, "--data", str(images),
        "--out", out, "--shard-images", "4", "--batch-size", "4", "--codec", codec,
        "--device", "cpu",
    ]  # fmt: skip


def processes() -> dict[int, tuple[int, str]]:
    """{pid: (parent, command line)} of all that run."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):  # it has ended meanwhile
            continue
        found[int(entry.name)] = (parent, line)
    return found


def descendants(pid: int) -> dict[int, str]:
    """{pid: command line} of a process' children and theirs."""
    everyone = processes()
    found: dict[int, str] = {}
    parents = {pid}
    while parents:
        children = {child for child, (parent, _) in everyone.items() if parent in parents}
        found |= {child: everyone[child][1] for child in children}
        parents = children
    return found


class Job:
    """A running extraction: its driver, and how its workers are found."""

    def __init__(self, executor: str, workers: int, argv: list[str], env: dict[str, str]) -> None:
        self.executor = executor
        self.ranks: list[subprocess.Popen[str]] = []
        environment = os.environ | env
        if executor == "ranks":
            for index in range(workers):
                slurm = {
                    "SLURM_PROCID": str(index), "SLURM_STEP_NUM_TASKS": str(workers),
                    "SLURM_LOCALID": str(index), "SLURM_JOB_ID": env["JOB"],
                    "SLURM_STEP_ID": "0",
                }  # fmt: skip
                self.ranks.append(self._start(argv, environment | slurm))
            self.driver = self.ranks[0]
        else:
            more = ["--executor", executor, "--workers", str(workers)]
            self.driver = self._start([*argv, *more], environment)

    def _start(self, argv: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(argv, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)

    def workers(self) -> list[int]:
        if self.executor == "ranks":
            return [rank.pid for rank in self.ranks[1:] if rank.poll() is None]
        name = "spawn_main" if self.executor == "local" else "ray::_Actor"
        return [pid for pid, line in descendants(self.driver.pid).items() if name in line]

    def end(self) -> str:
        """Wait for all of it; what the driver said."""
        _, err = self.driver.communicate(timeout=600)
        for rank in self.ranks[1:]:
            rank.communicate(timeout=600)
        return err

    def kill(self) -> None:
        for rank in self.ranks[1:]:
            rank.kill()
        self.driver.kill()
        self.end()


def run(
    executor: str,
    workers: int,
    kills: int,
    images: int,
    folder: Path,
    *,
    seed: int = 0,
    model: str = "tiny",
    codec: str = "fp16",
    out: str | None = None,
    env: dict[str, str] | None = None,
    files_of: Callable[[str], dict[str, bytes]] = lambda out: feature_files(Path(out)),
    commits_of: Callable[[str], int] = lambda out: len(
        list(Path(out).glob("journal/commit-*.json"))
    ),
    clear: Callable[[str], object] = lambda out: subprocess.run(["rm", "-r", out], check=True),
) -> dict[str, int]:
    """Returns counts. Raises AssertionError where a byte differs or a run fails otherwise than by
    having lost its workers.

    out, env, files_of, commits_of, clear: for a store elsewhere than in `folder`.
    """
    chance = random.Random(seed)
    write_images(folder / "images", images)
    reference = str(folder / "reference.zarr")
    subprocess.run(
        command(folder / "images", reference, model, codec),
        check=True, cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    expected = feature_files(Path(reference))
    out = out or str(folder / "killed.zarr")
    counts = {"kills": 0, "of_the_driver": 0, "runs": 0, "committed_when_killed": 0}
    while counts["kills"] < kills:
        counts["runs"] += 1
        assert counts["runs"] < 10 * kills, "no kill hits in time"
        argv = command(folder / "images", out, model, codec)
        job = Job(executor, workers, argv, {**(env or {}), "JOB": f"{os.getpid()}{counts['runs']}"})
        killed_driver = False
        while job.driver.poll() is None and counts["kills"] < kills and not killed_driver:
            before = commits_of(out)
            time.sleep(chance.uniform(0.05, 0.6))
            if job.driver.poll() is not None or commits_of(out) == before == 0:
                continue
            victims = job.workers()
            if not victims:
                continue
            counts["kills"] += 1
            counts["committed_when_killed"] += commits_of(out)
            if chance.random() < DRIVER_SHARE:
                counts["of_the_driver"] += 1
                killed_driver = True
                job.kill()
            else:
                os.kill(chance.choice(victims), signal.SIGKILL)
        if killed_driver:
            continue
        said = job.end()
        if job.driver.returncode == 0:
            if counts["kills"] < kills:
                clear(out)
        else:
            assert job.driver.returncode == 1 and "every committed shard is safe" in said, said
    last = Job(executor, workers, command(folder / "images", out, model, codec),
               {**(env or {}), "JOB": f"{os.getpid()}last"})  # fmt: skip
    said = last.end()
    assert last.driver.returncode == 0, said
    found = files_of(out)
    assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
    different = [name for name in expected if expected[name] != found[name]]
    assert not different, f"bytes differ in {different}"
    return counts | {"files_compared": len(found)}


@contextmanager
def bucket(folder: Path, seed: int = 0) -> Iterator[dict[str, Any]]:
    """What `run` must know to write into an S3 server behind a proxy that fails now and then."""
    from tests.support_s3 import Fault, Proxy, Request, S3Server

    chance = random.Random(seed)
    faults = [Fault("refuse"), Fault("refuse", 500), Fault("lose"), Fault("cut")]

    def sometimes(_: Request) -> Fault | None:
        return chance.choice(faults) if chance.random() < 0.05 else None

    server = S3Server()
    proxy = Proxy(server)
    proxy.start()
    before = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": proxy.url, "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
        "FEATCACHE_CACHE_DIR": str(folder / "tier"),
    }  # fmt: skip

    def names(out: str) -> list[str]:
        return [name for name, _ in parse_location(out).listing()]

    def files_of(out: str) -> dict[str, bytes]:
        wanted = re.compile(r"(features|scales|channels|pooled)/.*c/[0-9/]+")
        store = parse_location(out)
        return {name: (store / name).read_bytes() for name in names(out) if wanted.fullmatch(name)}

    def commits_of(out: str) -> int:
        return sum("journal/commit-" in name for name in names(out))

    try:
        server.make_bucket("bucket")
        with proxy.failing(sometimes):
            yield {
                "out": "s3://bucket/killed.zarr",
                "files_of": files_of,
                "commits_of": commits_of,
                "clear": lambda out: remove_tree(parse_location(out)),
            }
        assert proxy.faults
    finally:
        os.environ.clear()
        os.environ.update(before)
        proxy.stop()
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--executor", choices=["local", "ranks", "ray"], default="local")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="tiny", help="encoder name or folder")
    parser.add_argument("--codec", default="fp16")
    parser.add_argument("--bucket", action="store_true")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        bucket(Path(folder)) if arguments.bucket else nullcontext({}) as where,
    ):
        counts = run(
            arguments.executor, arguments.workers, arguments.kills, arguments.images, Path(folder),
            seed=arguments.seed, model=arguments.model, codec=arguments.codec, **where,
        )  # fmt: skip
    print(", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()))
    print("every byte equals one worker's undisturbed run's")


if __name__ == "__main__":
    main()
