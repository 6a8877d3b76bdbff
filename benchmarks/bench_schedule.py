"""What handing out shards costs, and what is left when the encoder costs nothing.

    python benchmarks/bench_schedule.py                 100,000 shards of 128 images; 10 minutes
    python benchmarks/bench_schedule.py --quick

*make*, *processes*, *Ray*: tasks made from a plan, and handed to workers that do nothing but say
that they are done. *record*, *journal*, *index*: each shard's commit record rendered, all of them
read again, the index compiled. The ceiling of their sum is one per cent of a run of these images at
500 images/s.

*written*: the whole pipeline with an encoder that gives zeros at once, 8 Ray actors on this
machine; the ceiling is a plain write and fsync of the same bytes by two threads, in the same run.
Results: benchmarks/results/schedule.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.bench import results
from featcache import layout
from featcache.encode import STAGES, TaskSource
from featcache.encoders import Encoded, Encoder, Pixels, load_encoder
from featcache.executors import Executor, open_executor
from featcache.extract import ExtractOptions, extract
from featcache.files import Seal
from featcache.index import build_arrays
from featcache.journal import Commit, Journal, Plan, RowRecord
from featcache.layout import Status, StoreInfo
from featcache.mend import Records
from featcache.sources import Sources
from featcache.tasks import PendingTasks
from featcache.worker import ShardDone, Worker, WorkerOptions, WorkProgress

PATCHES, WIDTH = 729, 1152
RATE = 500
"""images/s of one GPU, of which scheduling should take one per cent at most."""
FEATURES_BYTES = PATCHES * WIDTH * 2
EXECUTORS = {"processes": "local", "Ray": "ray"}


class NullEncoder(Encoder):
    """The tiny encoder, said to be as wide as siglip2-so400m; gives the same zeros at once."""

    _zeros: Tensor | None = None

    @property
    def num_patches(self) -> int:
        return PATCHES

    @property
    def width(self) -> int:
        return WIDTH

    def preprocess(self, image: Image.Image) -> np.ndarray[Any, Any]:
        return np.zeros((8, 8, 3), np.uint8)

    def collate(self, images: Any) -> Pixels:
        return Pixels(torch.zeros(len(images), 1, dtype=torch.uint8))

    def encode(self, pixels: Pixels) -> Encoded:
        if self._zeros is None or len(self._zeros) < len(pixels):
            self._zeros = torch.zeros(len(pixels), PATCHES, WIDTH, dtype=torch.float16)
        features = self._zeros[: len(pixels)]
        return Encoded(dict.fromkeys(self.layers, features), torch.zeros(len(pixels), WIDTH))


def null_encoder(name: str, *, gate: Path, workers: int, **more: Any) -> Encoder:
    """gate: a folder that opens when so many workers have come: what is timed begins with every
    encoder loaded."""
    tiny = load_encoder("tiny", **more)
    gate.mkdir(parents=True, exist_ok=True)
    (gate / str(os.getpid())).touch()
    while len(list(gate.iterdir())) < workers:
        time.sleep(0.05)
    return NullEncoder(
        tiny.name, tiny.revision, tiny.weights, tiny.tower, tiny.device, tiny.compute_dtype
    )


class NullWorker(Worker):
    """Says of every task that it is done."""

    def run(
        self, tasks: TaskSource, on_commit: Callable[[ShardDone], None] = lambda _: None
    ) -> Iterator[WorkProgress]:
        seconds = dict.fromkeys(STAGES, 0.0)
        done = 0
        while tasks.wait(1.0):
            task = tasks.next()
            if task is None:
                continue
            done += len(task.images)
            on_commit(ShardDone(task.shard, WorkProgress(len(task.images), seconds=seconds)))
            yield WorkProgress(done, done, seconds=seconds)
        yield WorkProgress(done, done, seconds=seconds)


def plan_of(shards: int, shard_images: int) -> Plan:
    images = shards * shard_images
    return Plan(
        1, 0, shard_images, 16, "/data/images",
        [f"{number // 10000:05d}/{number:09d}.jpg" for number in range(images)],
        np.arange(images),
        [],
        [number.to_bytes(16, "little") for number in range(images)],
    )  # fmt: skip


def scheduled(
    folder: Path, shards: int, shard_images: int, executors: dict[str, str] = EXECUTORS
) -> list[dict[str, Any]]:
    """What handing out shards and keeping account of them takes. executors: {what it is called: its
    name}."""
    images = shards * shard_images
    config = {"shards": shards, "shard_images": shard_images, "images": images}
    budget_ms = 0.01 * shard_images / RATE * 1000  # a shard's share of one per cent of the run
    spent: dict[str, float] = {}
    plan = plan_of(shards, shard_images)
    info = StoreInfo({}, "fp16", ["-2"], PATCHES, WIDTH, shard_images, pooled=True)
    pending = [(plan, shard) for shard in plan.shards]
    tasks = PendingTasks(pending, Sources([plan], plan.image_root), Records(folder, info, [plan]))

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        spent[name] = time.perf_counter() - start
        print(f"{name}: {1000 * spent[name] / shards:.3f} ms a shard", flush=True)
        return result

    timed("make", lambda: sum(1 for _ in tasks))
    options = WorkerOptions(folder, "tiny", make=NullWorker)
    for name, executor_name in executors.items():
        with open_executor(executor_name, 2, options) as executor:
            executor.describe()  # loaded: what is timed begins with the first task
            timed(name, lambda executor=executor: _run(executor, tasks, images))
    record = _record(shard_images)
    commits = [folder / layout.commit_path(shard) for shard in range(shards)]
    commits[0].parent.mkdir(parents=True)
    timed("record", lambda: [replace(record, shard=shard).render() for shard in range(shards)])
    files = list(record.files)
    for shard, path in enumerate(commits):
        own = {name: record.files[name] for name in files}
        path.write_bytes(replace(record, shard=shard, files=own).render())
    for name, seal in record.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.truncate(os.open(folder / name, os.O_CREAT | os.O_RDWR), seal.nbytes)
    plan.save(folder)
    journal = timed("journal", lambda: Journal.load(folder))
    assert not journal.pending
    timed("index", lambda: build_arrays(info, journal))
    found = [
        results.row(
            name, "scheduling", "ms/shard", [1000 * seconds / shards],
            ceiling=budget_ms, config=config, packages=("ray",),
        )
        for name, seconds in spent.items()
    ]  # fmt: skip
    for name in executors:
        # Making the tasks is part of handing them out; the journal is read when a run ends.
        total = sum(spent[part] for part in (name, "record", "journal", "index"))
        share = 100 * total / (images / RATE)
        row = results.row(name, "share of a run", "%", [share], ceiling=1.0, config=config)
        found.append(row)
    return found


def _run(executor: Executor, tasks: PendingTasks, images: int) -> None:
    *_, last = executor.run(tasks)
    assert last.done == images, last


def _record(shard_images: int) -> Commit:
    rows = [
        RowRecord(Status.OK, "", (640, 480), {"-2": 2**63 + slot, "pooled": 2**62 + slot})
        for slot in range(shard_images)
    ]
    # Of shard 0 for all: their files are asked for as often as if each had its own.
    seal = Seal(4096, "0123456789abcdef")
    files = {layout.shard_path("-2", 0): seal, layout.pooled_path(0): seal}
    versions = {"torch": "2.13.0", "transformers": "5.23.0", "pillow": "13.0", "numpy": "2.4"}
    return Commit(0, rows, files, dict.fromkeys(STAGES, 1.234567), versions)


def written(folder: Path, actors: int, shards: int, rounds: int) -> list[dict[str, Any]]:
    """GB/s of features through the pipeline, and of a plain write of as much, in turn: on a virtual
    machine a page of memory that was not in use lately costs more than writing to it.

    actors: of Ray; 0 leaves them out.
    """
    shard_images = 32
    images = folder / "images"
    images.mkdir(parents=True)
    chance = np.random.default_rng(0)
    for number in range(shards * shard_images):
        pixels = chance.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number:06d}.png")
    total_gb = shards * shard_images * FEATURES_BYTES / 1e9
    rates: dict[str, list[float]] = {}
    stages: dict[tuple[str, str], list[float]] = {}

    def note(name: str, rate: float) -> None:
        rates.setdefault(name, []).append(rate)
        print(f"{name}: {rate:.2f} GB/s", flush=True)

    for _ in range(rounds):
        note("plain write", total_gb / _plain(folder / "plain", shards, shard_images))
        for executor, workers in (("local", 1), ("ray", actors)):
            if not workers:
                continue
            name = f"{workers} {'Ray actors' if executor == 'ray' else 'worker'}"
            out, gate = folder / f"{executor}.zarr", folder / f"{executor}-gate"
            options = ExtractOptions(
                "tiny", (images,), out, shard_images=shard_images, executor=executor,
                workers=workers, device="cpu", decode_threads=1,
                load=partial(null_encoder, gate=gate, workers=workers),
            )  # fmt: skip
            with ray_cluster(workers) if executor == "ray" else nullcontext():
                done = extract(options)
            assert done.ok, done
            note(name, total_gb / done.encoding_s)
            for stage in ("wait", "write"):
                share = 100 * done.work.seconds[stage] / done.encoding_s / workers
                stages.setdefault((name, stage), []).append(share)
            shutil.rmtree(out)
            shutil.rmtree(gate)
    config = {"images": shards * shard_images, "shard_images": shard_images, "codec": "fp16"}
    ceiling = float(np.median(rates["plain write"]))
    found = [
        results.row(name, "written", "GB/s", values, ceiling=ceiling, config=config,
                    packages=("ray",))
        for name, values in rates.items()
    ]  # fmt: skip
    return found + [
        results.row(name, f"time in {stage}", "% of a worker", values, config=config,
                    packages=("ray",))
        for (name, stage), values in stages.items()
    ]  # fmt: skip


def _plain(folder: Path, shards: int, shard_images: int) -> float:
    """Seconds that two threads take to write and sync as many bytes, in as many files."""
    block = bytes(shard_images * FEATURES_BYTES)
    folder.mkdir()

    def write(number: int) -> None:
        with (folder / str(number)).open("wb", buffering=0) as file:
            file.write(block)
            os.fsync(file.fileno())

    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(shards)))
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds


@contextmanager
def ray_cluster(actors: int) -> Iterator[None]:
    """A Ray on this machine that counts a CPU for each actor, however many there are."""
    program = str(Path(sys.executable).with_name("ray"))
    start = ["start", "--head", f"--num-cpus={actors}", "--include-dashboard=false"]
    more = ["--disable-usage-stats", "--object-store-memory=100000000"]
    subprocess.run([program, *start, *more], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run([program, "stop", "--force"], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=("scheduled", "written"))
    parser.add_argument("--shards", type=int, help="that are handed out")
    parser.add_argument("--actors", type=int, default=8, help="of Ray that write; 0 for none")
    parser.add_argument("--rounds", type=int, default=3, help="of writing")
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # a process that has used Ray does not change its mode
    quick = arguments.quick
    shards = arguments.shards or (200 if quick else 100_000)
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        if arguments.only != "written":
            rows += scheduled(Path(folder) / "scheduled", shards, 16 if quick else 128)
        if arguments.only != "scheduled":
            actors, rounds = (2, 1) if quick else (arguments.actors, arguments.rounds)
            rows += written(Path(folder) / "written", actors, 3 if quick else 240, rounds)
    if arguments.out:
        results.write(arguments.out, rows)
    print(json.dumps({"benchmark": "schedule", "results": rows}))


if __name__ == "__main__":
    main()
