"""The reader by itself: codecs, dequantisation, two stores at once, and memory at 10 M rows.

    python benchmarks/bench_reader.py            512 images, 3 GB of disk, some minutes
    python benchmarks/bench_reader.py --quick    96 images, under a minute

- codecs: random batches of 32 from a warm page cache through `reader.stream` with one thread, for
  each codec; beside it decoding alone, from memory, with one thread, to the compute dtype given.
- fresh memory: touching 54 MB for the first time, in pages of 4 KiB and as the reader allocates.
- join: the same images from two stores, with one thread a store: one after the other, against
  `StoreJoin`, which asks both at once; latency of a single batch, and images/s of a stream.
- memory: a fresh process opens a store of 10 M rows (sparse files, no checks), streams batches
  from it at random, and says what RSS grew by beyond the index's mapped pages. Required: the budget
  plus 64 MB, and 32 bytes a row.

Every comparison is made in rounds, one after another in each; the ceiling of a read is memcpy of as
many bytes by one thread into one reused buffer. Results: benchmarks/results/reader.jsonl.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as cli/console.py, before torch's first use
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.bench import results
from align.bench.synthetic import write_store
from benchmarks.bench_open import write_index
from featcache.buffers import allocate
from featcache.codecs import CODECS, LayerCodec, get_codec
from featcache.convert import convert
from featcache.join import StoreJoin
from featcache.layout import features_path, shard_path
from featcache.store import Store

ROOT = Path(__file__).resolve().parents[1]
BATCH = 32
BUDGET_BYTES = 256 << 20
SPARE_BYTES = 64 << 20
ROW_BYTES = 32

PROBE = """
import json, sys
import numpy as np
import featcache, featcache.store, featcache.reader

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

path, budget, batches = sys.argv[1], *map(int, sys.argv[2:])
import torch
before = memory("RssAnon")
store = featcache.open(path)
rng = np.random.default_rng(0)
rows = (rng.integers(0, store.num_rows, 4096) for _ in range(batches))
with store.reader(budget_bytes=budget, check="never", threads=2) as reader:
    for features in reader.stream(rows):
        pass
    print(json.dumps(memory("RssAnon") - before))
"""


def rounds_of(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round; the first round warms caches and buffers."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def random_batches(images: int, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, images, BATCH) for _ in range(count)]


def copying(store: Store, batches: list[np.ndarray]) -> Callable[[], None]:
    """One thread's memcpy of the stored form of the same rows."""
    with store.reader() as reader:
        stored = reader.read_stored(np.arange(store.num_rows))
    source = stored.codes.view(torch.uint8).flatten(1).numpy()
    out = np.empty((BATCH, source.shape[1]), np.uint8)

    def run() -> None:
        for rows in batches:
            for place, row in enumerate(rows):
                out[place] = source[row]

    return run


def measure_codecs(folder: Path, images: int, rounds: int, num_patches: int, width: int) -> list:
    torch.set_num_threads(1)
    first = write_store(folder / "fp16.zarr", images, num_patches, width)
    stores = {"fp16": Store(first)}
    for codec in CODECS:
        if codec != "fp16":
            path = folder / f"{codec}.zarr"
            convert(first, path, codec=codec)
            stores[codec] = Store(path)
    batches = random_batches(images, max(2, images // BATCH))
    runs: dict[str, Callable[[], object]] = {}
    for codec, store in stores.items():
        reader = store.reader(threads=1, check="never")
        stored = reader.read_stored(batches[0])
        runs[f"{codec} memcpy"] = copying(store, batches)
        runs[f"{codec} read"] = lambda r=reader: [None for _ in r.stream(batches)]
        for dtype in (torch.float32, torch.bfloat16):
            runs[f"{codec} decode {dtype}"] = lambda s=stored, d=dtype: s.decode(d)
    seconds = rounds_of(runs, rounds)
    rows = []
    read_images = BATCH * len(batches)
    for codec, store in stores.items():
        image_bytes = store.layer_codec("-2").image_bytes
        config = {"shape": [num_patches, width], "batch": BATCH, "image_bytes": image_bytes}
        copied = float(np.median(seconds[f"{codec} memcpy"]))
        read = [read_images / s for s in seconds[f"{codec} read"]]
        rows.append(
            results.row(
                codec, "read", "images/s", read, ceiling=read_images / copied, config=config
            )
        )
        for dtype in (torch.float32, torch.bfloat16):
            found = [BATCH / s for s in seconds[f"{codec} decode {dtype}"]]
            name = str(dtype).removeprefix("torch.")
            rows.append(results.row(codec, "decode", "images/s", found, x=name, config=config))
    return rows


def measure_fresh_memory(num_patches: int, width: int, rounds: int) -> list:
    layer = LayerCodec(get_codec("fp16"), num_patches, width)
    nbytes = BATCH * layer.code_bytes

    def small_pages() -> None:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        np.frombuffer(memory, np.uint8).fill(0)

    runs: dict[str, Callable[[], object]] = {
        "pages of 4 KiB": small_pages,
        "featcache.buffers": lambda: allocate(layer, BATCH).codes.zero_(),
    }
    config = {"nbytes": nbytes}
    return [
        results.row(name, "first touch", "GB/s", [nbytes / s / 1e9 for s in seconds], config=config)
        for name, seconds in rounds_of(runs, rounds).items()
    ]


def measure_join(folder: Path, images: int, rounds: int, num_patches: int, width: int) -> list:
    """fp16 beside int8 of the same images, one thread a store."""
    stores = [Store(folder / "fp16.zarr"), Store(folder / "int8.zarr")]
    batches = random_batches(images, max(2, images // BATCH))
    both = [np.stack([rows, rows], axis=1) for rows in batches]
    readers = [store.reader(threads=1, check="never") for store in stores]
    joined = StoreJoin(stores).reader(threads=1, check="never", budget_bytes=1 << 30)

    def alone(which: int) -> Callable[[], object]:
        return lambda: [readers[which].begin(rows).result() for rows in batches]

    runs: dict[str, Callable[[], object]] = {
        "fp16 alone": alone(0),
        "int8 alone": alone(1),
        "one store after the other": lambda: [
            [reader.begin(rows).result() for reader in readers] for rows in batches
        ],
        "joined": lambda: [
            [reading.result() for reading in [r.begin(rows) for r in joined.readers]]
            for rows in batches
        ],
    }
    streams: dict[str, Callable[[], object]] = {
        "one store after the other": lambda: [
            None for reader in readers for _ in reader.stream(batches)
        ],
        "joined": lambda: [None for _ in joined.stream(both)],
    }
    config = {"shape": [num_patches, width], "batch": BATCH, "codecs": ["fp16", "int8"]}
    rows = []
    for name, seconds in rounds_of(runs, rounds).items():
        found = [1e3 * s / len(batches) for s in seconds]
        rows.append(results.row(name, "latency, fresh memory", "ms/batch", found, config=config))
    for name, seconds in rounds_of(streams, rounds).items():
        found = [BATCH * len(batches) / s for s in seconds]
        rows.append(results.row(name, "read from both", "images/s", found, config=config))
    return rows


def measure_memory(folder: Path, images: int, batches: int, repeats: int) -> list:
    root = write_index(folder / "big.zarr", images, num_patches=1, width=1024)
    store = Store(root)
    shards = -(-images // store.info.shard_images)
    (root / features_path("-2")).mkdir(parents=True)
    size = store.spec.geometry("-2").pitch_bytes * store.info.shard_images
    for shard in range(shards):
        path = root / shard_path("-2", shard)
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            file.truncate(size)  # zeros that take no room
    found = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", PROBE, str(root), str(BUDGET_BYTES), str(batches)],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.append(json.loads(done.stdout) / 1e6)
    allowed = (BUDGET_BYTES + SPARE_BYTES + ROW_BYTES * images) / 1e6
    config = {"rows": images, "budget_bytes": BUDGET_BYTES, "batch": 4096, "allowed_mb": allowed}
    return [results.row("featcache", "reader RssAnon", "MB", found, x=images, config=config)]


def measure(
    folder: Path, images: int, rounds: int, rows: int, num_patches: int = 729, width: int = 1152
) -> list:
    found = measure_codecs(folder, images, rounds, num_patches, width)
    found += measure_fresh_memory(num_patches, width, rounds)
    found += measure_join(folder, images, rounds, num_patches, width)
    return found + measure_memory(folder, rows, batches=64, repeats=min(3, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="96 images, 100,000 rows")
    parser.add_argument("--no-save", action="store_true", help="leave the committed results alone")
    arguments = parser.parse_args()
    sizes = (96, 3, 100_000) if arguments.quick else (512, 9, 10_000_000)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), *sizes)
    for row in rows:
        of = f" {row['p50'] / row['ceiling']:.2f} of memcpy" if row["ceiling"] else ""
        allowed = row["config"].get("allowed_mb")
        of += f" of {allowed:,.0f} allowed" if allowed else ""
        print(
            f"{row['provider']:>26} {row['metric']:>22} {row['x'] or '':>9} "
            f"{row['p50']:10,.1f} ({row['p20']:,.1f} - {row['p80']:,.1f}) {row['unit']}{of}",
            file=sys.stderr,
        )
    if not (arguments.quick or arguments.no_save):
        results.write(ROOT / "benchmarks/results/reader.jsonl", rows)
    print(json.dumps({"results": rows}))


if __name__ == "__main__":
    main()
