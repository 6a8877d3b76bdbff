"""Opening big stores, and looking up the keys of a whole data set.

    python benchmarks/bench_open.py              indices of 1 M and 10 M rows, 1 GB of disk
    python benchmarks/bench_open.py --quick      10,000 rows, seconds

Only the index is there, no features. Each repeat is a fresh process, which imports what it needs
and then takes the time of `featcache.open` and of the first `rows()` of 1,000 keys, with the index
in the page cache and without. Memory is what these two calls add: "peak" is VmHWM, which counts the
mapped pages of the index, that the kernel takes back when it needs them; "own" is RssAnon.
The ceiling of the time is one pass over the index's bytes in the page cache by one thread.
Required: 1 M rows in 1 s and 200 MB, 10 M rows in 5 s and 1 GB.
Results: benchmarks/results/open.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xxhash

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.bench import results
from featcache.files import seal_of
from featcache.journal import DIGEST_BYTES, Failure, pack_failures
from featcache.layout import Status, StoreInfo, array_checksum, write_array

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 5
FIRST_KEYS = 1000
DATA_SET_KEYS = 558_128
REQUIRED = {1_000_000: (1.0, 200.0), 10_000_000: (5.0, 1000.0)}
"""{rows: (seconds, MB)}."""

PROBE = """
import json, random, sys, time
import featcache, featcache.store

def memory():
    lines = open("/proc/self/status").read().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
    return {name: int(found[name]) / 1e3 for name in ("VmHWM", "RssAnon")}

path, rows, first, data_set = sys.argv[1], *map(int, sys.argv[2:])
chance = random.Random(0)
few = [f"{i // 1000:05d}/{i:09d}.jpg" for i in chance.sample(range(rows), first)]
many = [f"{i // 1000:05d}/{i:09d}.jpg" for i in chance.sample(range(rows), data_set)]
before, start = memory(), time.perf_counter()
store = featcache.open(path)
found = store.rows(few)
opened, after = time.perf_counter() - start, memory()
assert (found >= 0).all()
start = time.perf_counter()
found = store.rows(many)
lookup = time.perf_counter() - start
assert (found >= 0).all()
print(json.dumps({
    "open": opened, "find": lookup,
    "peak": after["VmHWM"] - before["VmHWM"], "own": after["RssAnon"] - before["RssAnon"],
}))
"""


def write_index(root: Path, rows: int, num_patches: int = 729, width: int = 1152) -> Path:
    """A store of `rows` images, but for its features and its journal."""
    digits = np.arange(rows)[:, None] // 10 ** np.arange(8, -1, -1) % 10 + ord("0")
    thousands = np.arange(rows)[:, None] // 1000 // 10 ** np.arange(4, -1, -1) % 10 + ord("0")
    fixed = np.frombuffer(b"/.jpg", np.uint8)
    slash, suffix = (np.broadcast_to(part, (rows, len(part))) for part in (fixed[:1], fixed[1:]))
    keys = np.concatenate([thousands.astype(np.uint8), slash, digits.astype(np.uint8), suffix], 1)
    del digits, thousands
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(key.data) for key in keys), np.uint64, rows)
    order = np.argsort(hashes)
    rng = np.random.default_rng(0)
    failures = [Failure(f"{i}.jpg", "missing", "no such file") for i in range(rows // 1000)]
    arrays = {
        "key_hash": hashes[order],
        "key_bytes": keys[order].reshape(-1),
        "key_ends": np.arange(1, rows + 1, dtype=np.uint64) * keys.shape[1],
        "key_rows": order,
        "digests": rng.integers(0, 256, (rows, DIGEST_BYTES), np.uint8),
        "status": np.full(rows, Status.OK, np.uint8),
        "sizes": np.full((rows, 2), 640, np.int32),
        "failures": pack_failures(failures),
        "checksums/-2": rng.integers(0, 2**64, rows, np.uint64),
        "checksums/pooled": rng.integers(0, 2**64, rows, np.uint64),
    }
    checksums = {}
    for name, values in arrays.items():
        path = f"index/00000001/{name}"
        write_array(root / path, values)
        checksums[path] = array_checksum(values)
    StoreInfo(
        fingerprint={"encoder": {"name": "an index only"}},
        codec="fp16",
        layers=["-2"],
        num_patches=num_patches,
        width=width,
        shard_images=128,
        pooled=True,
        index="index/00000001",
        generation=1,
        checksums=checksums,
    ).save(root)
    return root


def probe(root: Path, rows: int, data_set: int) -> dict[str, float]:
    """What one fresh process measures: seconds of "open" and "find", MB of "peak" and "own"."""
    arguments = [str(root), str(rows), str(min(rows, FIRST_KEYS)), str(data_set)]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


def index_files(root: Path) -> list[Path]:
    return [path for path in sorted((root / "index").rglob("*")) if path.is_file()]


def forget(root: Path) -> None:
    """Take the index out of the page cache."""
    for path in index_files(root):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def one_pass(root: Path) -> float:
    """Seconds of reading and hashing every byte of the index, from the page cache."""
    start = time.perf_counter()
    seal_of(*index_files(root))
    return time.perf_counter() - start


def measure(root: Path, rows: int, repeats: int = REPEATS) -> list[dict]:
    data_set = min(rows, DATA_SET_KEYS)
    config = {
        "rows": rows,
        "index_bytes": sum(path.stat().st_size for path in index_files(root)),
        "keys": FIRST_KEYS,
        "required": REQUIRED.get(rows),
    }
    found = []
    for cache in ("warm", "cold"):
        runs, passes = [], []
        for repeat in range(repeats + (cache == "warm")):
            if cache == "cold":
                forget(root)
            run = probe(root, rows, data_set)
            if repeat or cache == "cold":  # the first run warms the cache
                runs.append(run)
                passes.append(one_pass(root))
        ceiling = float(np.median(passes))

        def add(metric: str, unit: str, name: str, runs: list = runs, **more: object) -> None:
            values = [run[name] for run in runs]
            where = {**config, "cache": cache}  # noqa: B023 - called in this round only
            found.append(
                results.row("featcache", metric, unit, values, x=rows, **more, config=where)
            )

        add("open and first rows", "s", "open", ceiling=ceiling)
        add("open and first rows, VmHWM", "MB", "peak")
        add("open and first rows, RssAnon", "MB", "own")
        if cache == "warm":
            config = {**config, "keys": data_set}
            add("rows of a data set", "s", "find")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10,000 rows")
    parser.add_argument("--no-save", action="store_true", help="leave results/open.jsonl alone")
    arguments = parser.parse_args()
    rows = []
    for count in (10_000,) if arguments.quick else REQUIRED:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(write_index(Path(folder) / "store.zarr", count), count)
    for row in rows:
        print(
            f"{row['x']:>10,} rows, {row['config']['cache']}: {row['metric']:<32} "
            f"{row['p50']:8.2f} {row['unit']} ({row['p20']:.2f} - {row['p80']:.2f})",
            file=sys.stderr,
        )
    if not arguments.quick and not arguments.no_save:
        results.write(Path(__file__).with_name("results") / "open.jsonl", rows)
    print(json.dumps({"results": rows}))


if __name__ == "__main__":
    main()
