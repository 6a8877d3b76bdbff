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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

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
    """The tiny encoder, said to be as wide as siglip2-so400m; gives zeros at once."""

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
        features = torch.zeros(len(pixels), PATCHES, WIDTH, dtype=torch.float16)
        return Encoded(dict.fromkeys(self.layers, features), torch.zeros(len(pixels), WIDTH))


def null_encoder(name: str, **more: Any) -> Encoder:
    tiny = load_encoder("tiny", **more)
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


def measure(
    folder: Path,
    shards: int,
    shard_images: int,
    actors: int,
    written_shards: int,
    executors: dict[str, str] = EXECUTORS,
) -> list[dict[str, Any]]:
    """Result rows. actors: of Ray, in the last section; 0 leaves them out. executors: {what it is
    called: its name} of those that are handed shards."""
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
    return found + written(folder / "written", actors, written_shards)


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


def written(folder: Path, actors: int, shards: int) -> list[dict[str, Any]]:
    """GB/s of features through the pipeline, and of a plain write of as much."""
    shard_images = 32
    images = folder / "images"
    images.mkdir(parents=True)
    chance = np.random.default_rng(0)
    for number in range(shards * shard_images):
        pixels = chance.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number:06d}.png")
    total_gb = shards * shard_images * FEATURES_BYTES / 1e9
    found = []
    plain = []
    block = bytes(shard_images * FEATURES_BYTES)
    for _ in range(3):
        start = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda n: _plain(folder / f"plain-{n}", block), range(shards)))
        plain.append(total_gb / (time.perf_counter() - start))
        for path in folder.glob("plain-*"):
            path.unlink()
    ceiling = float(np.median(plain))
    config = {"images": shards * shard_images, "shard_images": shard_images, "codec": "fp16"}
    found.append(results.row("plain write", "written", "GB/s", plain, config=config))
    for executor, workers in (("local", 1), ("ray", actors)):
        if not workers:
            continue
        out = folder / f"{executor}.zarr"
        options = ExtractOptions(
            "tiny", (images,), out, shard_images=shard_images, executor=executor, workers=workers,
            device="cpu", decode_threads=1, load=null_encoder,
        )  # fmt: skip
        with ray_cluster(workers) if executor == "ray" else nullcontext():
            done = extract(options)
        assert done.ok, done
        row = results.row(
            f"{workers} {'Ray actors' if executor == 'ray' else 'worker'}", "written", "GB/s",
            [total_gb / done.encoding_s], ceiling=ceiling, config=config, packages=("ray",),
        )  # fmt: skip
        print(f"{row['provider']}: {row['p50']:.2f} GB/s of {ceiling:.2f}", flush=True)
        found.append(row)
    return found


@contextmanager
def ray_cluster(actors: int) -> Iterator[None]:
    """A Ray on this machine that counts a CPU for each actor, however many there are."""
    program = str(Path(sys.executable).with_name("ray"))
    os.environ["RAY_AUTH_MODE"] = "disabled"
    start = ["start", "--head", f"--num-cpus={actors}", "--include-dashboard=false"]
    more = ["--disable-usage-stats", "--object-store-memory=100000000"]
    subprocess.run([program, *start, *more], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run([program, "stop", "--force"], check=True, capture_output=True)


def _plain(path: Path, block: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(block)
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--shards", type=int)
    parser.add_argument("--actors", type=int, default=8, help="of Ray that write; 0 for none")
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    shards = arguments.shards or (200 if arguments.quick else 100_000)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        if arguments.quick:
            rows = measure(Path(folder), shards, 16, 2, 3)
        else:
            rows = measure(Path(folder), shards, 128, arguments.actors, 48)
    if arguments.out:
        results.write(arguments.out, rows)
    print(json.dumps({"benchmark": "schedule", "results": rows}))


if __name__ == "__main__":
    main()
