"""`featcache verify` of a store against a plain sequential read of the same files.

    python benchmarks/bench_verify.py             640 images of 729 x 1152 fp16, 1.07 GB
    python benchmarks/bench_verify.py --quick     128 images

Each round reads every data file once in blocks of 2 MB and verifies the store, in turn, with as
many threads: from a warm page cache, and from a cold one (the kernel is asked to drop the files'
pages; on tmpfs it has no disk to read them from again). Results: benchmarks/results/verify.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.bench import results
from align.bench.synthetic import write_store
from featcache.verify import BLOCK_BYTES, verify


def read_files(paths: list[Path], threads: int) -> None:
    def read(path: Path) -> None:
        block = bytearray(BLOCK_BYTES)
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, paths))


def drop(paths: list[Path]) -> None:
    """Have the kernel forget the files' pages, which are on disk already."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(store: Path, rounds: int, *, cold: bool = False) -> list[dict]:
    paths = sorted(store.glob("features/*/c/*/0/0"))
    nbytes = sum(path.stat().st_size for path in paths)
    rates: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for threads in (1, 2):
            if cold:
                drop(paths)
            start = time.perf_counter()
            read_files(paths, threads)
            read_s = time.perf_counter() - start
            if cold:
                drop(paths)
            start = time.perf_counter()
            report = verify(store, workers=threads)
            verify_s = time.perf_counter() - start
            assert report.ok and report.nbytes == nbytes
            if number:  # the first round warms the page cache
                rates.setdefault(f"sequential read, {threads} threads", []).append(
                    nbytes / read_s / 1e9
                )
                rates.setdefault(f"featcache verify, {threads} threads", []).append(
                    nbytes / verify_s / 1e9
                )
    config = {
        "bytes": nbytes,
        "files": len(paths),
        "codec": "fp16",
        "cache": "cold" if cold else "warm",
    }
    return [
        results.row(
            name,
            "verify",
            "GB/s",
            values,
            x=int(name.split(", ")[1].split()[0]),
            ceiling=sorted(rates[f"sequential read, {name.split(', ')[1]}"])[len(values) // 2],
            config=config,
        )
        for name, values in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="128 images, fewer rounds")
    parser.add_argument("--no-save", action="store_true", help="leave results/verify.jsonl alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images, rounds = (128, 3) if arguments.quick else (640, 7)
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store.zarr", images)
        rows = measure(store, rounds) + measure(store, rounds, cold=True)
    print(f"{'GB/s':>32} {'p20':>6} {'p50':>6} {'p80':>6} {'of read':>8}", file=sys.stderr)
    for row in rows:
        print(
            f"{row['config']['cache']} {row['provider']:>27} "
            f"{row['p20']:6.2f} {row['p50']:6.2f} {row['p80']:6.2f} "
            f"{row['p50'] / row['ceiling']:8.2f}",
            file=sys.stderr,
        )
    if not arguments.quick and not arguments.no_save:
        results.write(Path(__file__).with_name("results") / "verify.jsonl", rows)
    print(json.dumps({"results": rows}))


if __name__ == "__main__":
    main()
