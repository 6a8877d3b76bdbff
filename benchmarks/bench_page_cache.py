"""How a row is read for the first time decides how fast it is read ever after.

    python benchmarks/bench_page_cache.py            a file of 128 rows, 215 MB, a minute
    python benchmarks/bench_page_cache.py --quick    a file of 8 rows

Linux keeps what it read of a file in folios: single pages where one big read came to a random
place, larger ones where reads look like a sequence. Each round drops the file from the page cache,
reads its rows once in random order by one pattern of `preadv`s, and then times random rows from the
page cache, read whole. "sequential" reads the file from start to end instead: the ceiling of the
warm figures, which only a reader that reads whole shards can reach. featcache/_gather.c reads by
"4 KiB, 4 KiB, then 256 KiB". Results: benchmarks/results/page_cache.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.bench import results

ROW_BYTES = 729 * 1152 * 2
PITCH_BYTES = 411 * 4096
KIB = 1024
PATTERNS: dict[str, list[int]] = {
    "sequential": [],
    "whole row": [ROW_BYTES],
    "256 KiB": [256 * KIB],
    "4 KiB, then the rest": [4 * KIB, ROW_BYTES],
    "4 KiB, 4 KiB, then the rest": [4 * KIB, 4 * KIB, ROW_BYTES],
    "4 KiB, 4 KiB, then 256 KiB": [4 * KIB, 4 * KIB, 256 * KIB],
    "4 KiB, 4 KiB, then 1 MiB": [4 * KIB, 4 * KIB, 1024 * KIB],
}
"""Sizes of the reads of a row; the last one repeats."""


def first_reading(descriptor: int, rows: int, sizes: list[int], rng: np.random.Generator) -> float:
    """Seconds of reading every row once."""
    memory = memoryview(bytearray(ROW_BYTES))
    start = time.perf_counter()
    if not sizes:
        block = bytearray(8 << 20)
        for at in range(0, rows * PITCH_BYTES, len(block)):
            os.preadv(descriptor, [block], at)
    for row in rng.permutation(rows).tolist() if sizes else ():
        done = 0
        for size in itertools.chain(sizes, itertools.repeat(sizes[-1])):
            if done >= ROW_BYTES:
                break
            done += os.preadv(descriptor, [memory[done : done + size]], row * PITCH_BYTES + done)
    return time.perf_counter() - start


def later_reading(descriptor: int, rows: int, count: int, rng: np.random.Generator) -> float:
    """Seconds a row, from the page cache."""
    memory = bytearray(ROW_BYTES)
    chosen = rng.integers(0, rows, count).tolist()
    start = time.perf_counter()
    for row in chosen:
        os.preadv(descriptor, [memory], row * PITCH_BYTES)
    return (time.perf_counter() - start) / count


def measure(folder: Path, rows: int, rounds: int, count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    descriptor = os.open(folder / "rows", os.O_RDWR | os.O_CREAT)
    try:
        for row in range(rows):
            os.pwrite(descriptor, rng.bytes(PITCH_BYTES), row * PITCH_BYTES)
        os.fsync(descriptor)
        cold: dict[str, list[float]] = {name: [] for name in PATTERNS}
        warm: dict[str, list[float]] = {name: [] for name in PATTERNS}
        for _ in range(rounds):
            for name, sizes in PATTERNS.items():
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                seconds = first_reading(descriptor, rows, sizes, rng)
                cold[name].append(rows * ROW_BYTES / seconds / 1e9)
                warm[name].append(1 / later_reading(descriptor, rows, count, rng))
    finally:
        os.close(descriptor)
    config = {"rows": rows, "row_bytes": ROW_BYTES, "kernel": platform.release()}
    ceiling = float(np.median(warm["sequential"]))
    found = []
    for name in PATTERNS:
        found.append(results.row(name, "first reading", "GB/s", cold[name], config=config))
        found.append(
            results.row(
                name, "later readings", "images/s", warm[name], ceiling=ceiling, config=config
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 rows, one round")
    parser.add_argument("--no-save", action="store_true", help="leave the committed results alone")
    parser.add_argument("--dir", type=Path, help="on the disk to measure [the temporary folder]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        rows = measure(Path(folder), *((8, 1, 20) if arguments.quick else (128, 9, 1000)))
    for row in rows:
        of = f"  {row['p50'] / row['ceiling']:.2f} of sequential" if row["ceiling"] else ""
        print(
            f"{row['provider']:>28} {row['metric']:>15} {row['p50']:10,.2f} "
            f"({row['p20']:,.2f} - {row['p80']:,.2f}) {row['unit']}{of}",
            file=sys.stderr,
        )
    if not (arguments.quick or arguments.no_save):
        results.write(Path(__file__).with_name("results") / "page_cache.jsonl", rows)
    print(json.dumps({"results": rows}))


if __name__ == "__main__":
    main()
