"""The same features in many formats, read in batches, beside memcpy and the disk.

    python benchmarks/bench_store.py             512 images of 729 x 1152 fp16, 8 GB of disk
    python benchmarks/bench_store.py --quick     64 images, two minutes

It is `align bench store --json` with its flags. A full run writes benchmarks/results/store.jsonl,
unless --out says otherwise. benchmarks/peers.txt holds the peers; docs/performance.md says what is
measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import console
from cli.align import group


def main() -> None:
    flags = sys.argv[1:]
    if not any(flag == "--quick" or flag.startswith("--out") for flag in flags):
        flags += ["--out", str(Path(__file__).with_name("results") / "store.jsonl")]
    raise SystemExit(console.run(group, ["bench", "store", "--json", *flags]))


if __name__ == "__main__":
    main()
