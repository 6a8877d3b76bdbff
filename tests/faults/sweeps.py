"""Sweeps that take minutes, of which the suite runs a part.

python -m tests.faults.sweeps hdf5      every byte of an HDF5 store with one bit flipped; 10 minutes
python -m tests.faults.sweeps images    damaged image files through the decoder
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from featcache.convert import convert
from featcache.extract import ExtractOptions, extract
from tests.featcache.test_convert import all_of, same_or_one_line, verified
from tests.featcache.test_images import FORMATS, decode_damaged
from tests.support import write_images


def flip_every_byte(folder: Path) -> Counter[str]:
    """Of an int8 store of two images. Raises AssertionError for a wrong value, or where `verify`
    misses what a reader refuses."""
    write_images(folder / "images", 2)
    store, path = folder / "store.zarr", folder / "store.h5"
    extract(ExtractOptions("tiny", (folder / "images",), store, codec="int8", shard_images=2))
    convert(store, path)
    whole, content = all_of(path), path.read_bytes()
    rng, outcomes = np.random.default_rng(0), Counter[str]()
    for at, bit in enumerate(rng.integers(8, size=len(content)).tolist()):
        changed = bytearray(content)
        changed[at] ^= 1 << bit
        path.write_bytes(changed)
        same = same_or_one_line(path, whole)
        assert same or not verified(path), at
        outcomes["without effect on any value" if same else "refused in one line"] += 1
    return outcomes


def damage_images(count: int) -> Counter[str]:
    """`count` damaged files of each format."""
    outcomes = Counter[str]()
    for format in FORMATS:
        outcomes += decode_damaged(format, count)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["hdf5", "images"])
    parser.add_argument("--count", type=int, default=10_000, help="of images, for each format")
    arguments = parser.parse_args()
    if arguments.what == "images":
        outcomes = damage_images(arguments.count)
    else:
        with tempfile.TemporaryDirectory() as folder:
            outcomes = flip_every_byte(Path(folder))
    print(f"{outcomes.total():,} cases: {dict(outcomes)}")


if __name__ == "__main__":
    main()
