"""Four threads read at random while images are appended: every value as zarr-python reads it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

import featcache
from featcache.extract import ExtractOptions, extract
from tests.support import bits, write_images

THREADS = 4
READS = 10_000
APPENDS = 6
AT_ONCE = 5


@pytest.mark.parametrize(
    "native", [pytest.param(None), pytest.param(False, marks=pytest.mark.slow)]
)
def test_random_reads_while_images_are_appended(
    encoder_dir: Path, tmp_path: Path, native: bool | None
) -> None:
    """10,000 reads a thread, of one reader that all share and that is older than most appends, and
    of readers opened in between, which see what was appended until then."""
    options = ExtractOptions(
        model=str(encoder_dir), data=(tmp_path / "images",), out=tmp_path / "store.zarr",
        shard_images=4, batch_size=5,
    )  # fmt: skip
    write_images(tmp_path / "images", AT_ONCE * (APPENDS + 1))
    extract(replace(options, limit=AT_ONCE))
    by_zarr: dict[int, np.ndarray] = {}
    lock = threading.Lock()
    faults: list[str] = []
    grown: set[int] = set()
    done = [0] * THREADS
    shared_store = featcache.open(options.out)

    def expected(row: int) -> np.ndarray:
        with lock:
            if row not in by_zarr:
                array = zarr.open_array(options.out / "features/-2", mode="r")
                by_zarr[row] = bits(array[row])
            return by_zarr[row]

    def read(seed: int, shared: featcache.FeatureReader) -> None:
        rng = np.random.default_rng(seed)
        try:
            for part in range(10):
                late = part % 2  # every other part with a new reader
                store = featcache.open(options.out) if late else shared_store
                reader = store.reader(threads=2, native=native) if late else shared
                keys = [f"{i:04d}.png" for i in range(AT_ONCE * (APPENDS + 1))]
                rows = store.rows(keys)
                rows = rows[rows >= 0]
                grown.add(len(rows))
                for _ in range(READS // 10):
                    chosen = rng.choice(rows, rng.integers(1, 4))
                    found = bits(reader.read(chosen))
                    for k, row in enumerate(chosen.tolist()):
                        if not np.array_equal(found[k], expected(row)):
                            faults.append(f"row {row} in part {part}")
                    done[seed] += 1
                if late:
                    reader.close()
        except Exception as error:
            faults.append(repr(error))

    with shared_store.reader(threads=2, native=native) as shared:
        threads = [threading.Thread(target=read, args=(seed, shared)) for seed in range(THREADS)]
        for thread in threads:
            thread.start()
        for n in range(APPENDS):
            while sum(done) < THREADS * READS * n // APPENDS and not faults:
                time.sleep(0.001)
            extract(replace(options, limit=AT_ONCE * (n + 2)))
        for thread in threads:
            thread.join()
    assert not faults, faults[:5]
    assert sum(done) == THREADS * READS
    assert len(grown) > 2  # stores of several sizes were read
