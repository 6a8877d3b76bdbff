"""Random batches of stored features into memory: our reader, its peers, and memcpy.

    python benchmarks/bench_store.py             1,024 images of 729 x 1152 fp16, 1.7 GB
    python benchmarks/bench_store.py --quick     256 images, under a minute

Each round reads the same random batches of 32 through every provider, in turn, from a warm page
cache; figures are images/s over the rounds. The ceiling is one thread's memcpy of the same bytes
into one reused buffer, in the same round. Results: benchmarks/results/store.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorstore
import zarr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from align.bench import results
from align.bench.synthetic import write_store
from featcache.reader import FeatureReader

BATCH = 32


def providers(path: Path, batches: list[np.ndarray]) -> dict[str, Callable[[], None]]:
    """Name -> one pass over the batches."""
    store = featcache.open(path)
    out = np.empty((BATCH, store.num_patches, store.width), np.float16)
    with store.reader() as reader:
        source = reader.read(np.arange(store.num_rows)).numpy()
    array = zarr.open_array(path / "features/-2", mode="r")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/features/-2"}}
    tensor_array = tensorstore.open(spec).result()

    def memcpy() -> None:
        for rows in batches:
            for i, row in enumerate(rows):
                out[i] = source[row]

    # As in training: a reader lives as long as the run and keeps its ring of buffers.
    readers = {threads: store.reader(threads=threads) for threads in (1, 2)}
    # "once", the default, has checked every row in the first round, which is not timed.
    checking = store.reader(threads=1, check="always")

    def stream(reader: FeatureReader) -> Callable[[], None]:
        def run() -> None:
            for _ in reader.stream(batches):
                pass

        return run

    def fresh_memory() -> None:
        for rows in batches:
            readers[1].read(rows)

    def zarr_loop() -> None:
        for rows in batches:
            for i, row in enumerate(rows):
                out[i] = array[int(row)]

    def tensorstore_gather() -> None:
        for rows in batches:
            futures = [tensor_array[int(row)].read() for row in rows]
            for i, future in enumerate(futures):
                out[i] = future.result()

    return {
        "memcpy, 1 thread": memcpy,
        "featcache stream, 1 thread": stream(readers[1]),
        "featcache stream, 2 threads": stream(readers[2]),
        "featcache stream, 1 thread, every checksum": stream(checking),
        "featcache read, fresh memory, 1 thread": fresh_memory,
        "tensorstore, one read an image": tensorstore_gather,
        "zarr-python, arr[i]": zarr_loop,
    }


def measure(path: Path, images: int, rounds: int, batches_per_round: int) -> list[dict]:
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, images, BATCH) for _ in range(batches_per_round)]
    runs = providers(path, batches)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            if round_number:  # the first round warms caches and buffers
                rates[name].append(BATCH * batches_per_round / seconds)
    ceiling = float(np.median(rates["memcpy, 1 thread"]))
    store = featcache.open(path)
    config = {
        "images": images,
        "shape": [store.num_patches, store.width],
        "dtype": "float16",
        "batch": BATCH,
        "batches": batches_per_round,
        "cache": "warm",
    }
    return [
        results.row(name, "read", "images/s", values, ceiling=ceiling, config=config)
        for name, values in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="256 images, fewer rounds")
    parser.add_argument("--no-save", action="store_true", help="leave results/store.jsonl alone")
    arguments = parser.parse_args()
    images, rounds, batches = (256, 3, 8) if arguments.quick else (1024, 9, 32)
    with tempfile.TemporaryDirectory() as folder:
        path = write_store(Path(folder) / "store.zarr", images)
        rows = measure(path, images, rounds, batches)
    print(f"{'images/s':>40} {'p20':>8} {'p50':>8} {'p80':>8} {'of memcpy':>10}", file=sys.stderr)
    for row in rows:
        print(
            f"{row['provider']:>40} {row['p20']:8.0f} {row['p50']:8.0f} {row['p80']:8.0f} "
            f"{row['p50'] / row['ceiling']:10.2f}",
            file=sys.stderr,
        )
    if not arguments.quick and not arguments.no_save:
        results.write(Path(__file__).with_name("results") / "store.jsonl", rows)
    print(json.dumps({"results": rows}))


if __name__ == "__main__":
    main()
