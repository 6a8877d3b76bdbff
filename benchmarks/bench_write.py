"""From features to a committed shard: quantise, put in place, write. One thread, no encoder.

    python -m benchmarks.bench_write [--quick]

GB/s of 16-bit input (P x D x 2 bytes an image), for each codec and stage. "encode" is the codec on
fp32 features, "place" copies into the shard buffer and takes the rows' checksums, "write" publishes
the shard with its fsync; extraction runs the last on its own thread. The ceiling is a plain write
and fsync of the same number of bytes as the shard has.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from align.bench import results
from featcache.codecs import CODECS, LayerCodec
from featcache.writer import ShardBuffer, ShardSpec

BATCH = 16


def measure(
    folder: Path, images: int, rounds: int, num_patches: int = 729, width: int = 1152
) -> list[dict[str, Any]]:
    """Rows for every codec; `images` a shard, a multiple of `BATCH`."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(BATCH, num_patches, width, generator=generator)
    input_gb = images * num_patches * width * 2 / 1e9
    config = {"images": images, "num_patches": num_patches, "width": width, "threads": 1}
    rows = []
    for name, codec in CODECS.items():
        layer = LayerCodec(codec, num_patches, width, codec.calibrate(features))
        spec = ShardSpec(images, {"-2": layer}, None, width)
        buffer = ShardBuffer(spec)
        seconds: dict[str, list[float]] = {"encode": [], "place": [], "write": [], "plain": []}
        for shard in range(rounds + 1):
            buffer.clear(0)
            encode = place = 0.0
            for first in range(0, images, BATCH):
                start = time.perf_counter()
                stored, _ = layer.encode(features)
                encoded = time.perf_counter()
                for i in range(BATCH):
                    buffer.set(first + i, {"-2": stored[i : i + 1]}, None, (0, 0))
                encode += encoded - start
                place += time.perf_counter() - encoded
            start = time.perf_counter()
            buffer.publish(folder)
            written = time.perf_counter() - start
            start = time.perf_counter()
            _plain_write(folder / "plain", spec.shard_bytes)
            plain = time.perf_counter() - start
            if shard:  # the first round warms up
                for stage, spent in zip(seconds, (encode, place, written, plain), strict=True):
                    seconds[stage].append(spent)
        ceiling = input_gb / sorted(seconds["plain"])[rounds // 2]
        for stage in ("encode", "place", "write"):
            rates = [input_gb / spent for spent in seconds[stage]]
            bound = ceiling if stage == "write" else None
            rows.append(
                results.row(name, stage, "GB/s of input", rates, ceiling=bound, config=config)
            )
    return rows


def _plain_write(path: Path, nbytes: int) -> None:
    block = bytes(1 << 20)
    with path.open("wb", buffering=0) as file:
        for start in range(0, nbytes, len(block)):
            file.write(block[: nbytes - start])
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shards, fewer rounds")
    parser.add_argument("--no-save", action="store_true", help="leave results/write.jsonl alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), *((32, 3) if arguments.quick else (128, 7)))
    for row in rows:
        of = f" ({row['p50'] / row['ceiling']:.2f} of a plain write)" if row["ceiling"] else ""
        print(
            f"{row['provider']:>5} {row['metric']:>7} {row['p50']:6.2f} GB/s{of}", file=sys.stderr
        )
    if not arguments.quick and not arguments.no_save:
        results.write(Path(__file__).with_name("results") / "write.jsonl", rows)
    print(json.dumps({"results": rows}))


if __name__ == "__main__":
    main()
