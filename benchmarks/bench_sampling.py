"""What a shuffle within windows of shards costs in randomness, time and, in the demo, in loss.

    python -m benchmarks.bench_sampling               mixing and costs, half a minute
    python -m benchmarks.bench_sampling --demo WORK   the demo trained both ways, 12 runs

How mixed a batch is: worked out, and counted over the batches of one epoch. What an epoch's order
costs is what a resume in the middle of it costs: nothing is replayed. The demo's images are in
random order already, where a window can do little harm, so it is trained on a store sorted by
caption as well, where it can. A demo that was stopped goes on.
Results: benchmarks/results/sampling.jsonl and sampling-demo.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import tracemalloc
from collections.abc import Sequence
from math import exp, lgamma
from pathlib import Path
from typing import Any

import numpy as np

from align.bench import results
from align.config import load_config
from align.data.sampling import Windows, epoch_order
from align.demo.run import DemoSettings, write_data
from align.evaluate import evaluate
from align.run import load_run
from align.trainer import train
from featcache.extract import ExtractOptions, extract

IMAGES, SHARD, BATCH, WINDOWS = 558_128, 128, 256, (8, 32, 128)
DEMO_METRICS = {"loss": "nats per token", "attributes": "ratio", "exact_match": "ratio"}


def same_shard_chance(pool: int, shard: int) -> float:
    """That two samples drawn from `pool` samples of whole shards are of one shard."""
    return (shard - 1) / (pool - 1)


def expected_shards(pool: int, shard: int, batch: int) -> float:
    """Distinct shards among `batch` samples drawn from `pool` samples of whole shards."""

    def log_choose(n: int, k: int) -> float:
        return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)

    none = exp(log_choose(pool - shard, batch) - log_choose(pool, batch))
    return pool / shard * (1 - none)


def effective_batch(batch: int, chance: float) -> float:
    """Independent samples that say as much as a batch does, were all of a shard alike.

    The variance of a mean over B samples, of which each pair is alike with a chance p, is that of
    B / (1 + (B - 1) p) independent ones.
    """
    return batch / (1 + (batch - 1) * chance)


def mixing(images: int = IMAGES) -> list[dict[str, Any]]:
    """Rows of how mixed a batch is: expected of one that lies in one window, and counted over all
    batches of an epoch, among them those across two windows."""
    shards = (np.arange(images) // SHARD).astype(np.int32)
    rows = []
    for window in (0, *WINDOWS):
        order = epoch_order(images, 0, 0, Windows(shards, window) if window else None)
        full = len(order) // BATCH * BATCH
        batches = np.sort(shards[order[:full]].reshape(-1, BATCH), axis=1)
        starts = np.diff(batches, axis=1, prepend=-1) != 0
        # A run of c samples of one shard holds c (c - 1) / 2 pairs.
        lengths = np.diff(np.flatnonzero(starts), append=batches.size)
        pairs = (lengths * (lengths - 1) / 2).sum() / (len(batches) * BATCH * (BATCH - 1) / 2)
        pool = window * SHARD or images
        config = {"images": images, "shard_images": SHARD, "batch": BATCH}
        expected = expected_shards(pool, SHARD, BATCH)
        chance = same_shard_chance(pool, SHARD)
        counted = starts.sum(axis=1).tolist()
        rows += [
            results.row("order", "shards in a batch", "shards", counted, x=window, config=config),
            results.row(
                "expected", "shards in a batch", "shards", [expected], x=window, config=config
            ),
            results.row("order", "pairs of one shard", "ratio", [pairs], x=window, config=config),
            results.row(
                "expected", "pairs of one shard", "ratio", [chance], x=window, config=config
            ),
            results.row(
                "expected",
                "effective batch, shards alike inside",
                "samples",
                [effective_batch(BATCH, chance)],
                x=window,
                config=config,
            ),
        ]
    return rows


def costs(sizes: Sequence[int] = (IMAGES, 10_000_000)) -> list[dict[str, Any]]:
    """Rows of an epoch's order: seconds, and bytes at the peak and afterwards."""
    rows = []
    for samples in sizes:
        shards = (np.arange(samples) // SHARD).astype(np.int32)
        for window in (0, 32):
            windows = Windows(shards, window) if window else None
            seconds = []
            for epoch in range(5):
                start = time.perf_counter()
                epoch_order(samples, 0, epoch, windows)
                seconds.append(time.perf_counter() - start)
            tracemalloc.start()
            order = epoch_order(samples, 0, 0, windows)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            config = {"samples": samples, "shard_images": SHARD}
            for metric, unit, values in (
                ("order of an epoch", "s", seconds),
                ("peak memory of an order", "bytes", [peak]),
                ("memory of an order", "bytes", [order.nbytes]),
            ):
                name = f"{metric}, {samples:,} samples"
                rows.append(results.row("order", name, unit, values, x=window, config=config))
    return rows


def demo(
    out: Path, settings: DemoSettings, seeds: list[int], windows: list[int]
) -> list[dict[str, Any]]:
    """Rows of the demo trained from a store in random order and from one sorted by caption."""
    in_random_order, val = write_data(out / "data", settings)
    in_sorted_order = in_random_order.with_name("sorted.jsonl")
    lines = in_random_order.read_text().splitlines(keepends=True)
    in_sorted_order.write_text("".join(sorted(lines, key=lambda x: json.loads(x)["caption"])))
    config = {"train": settings.num_train, "val": settings.num_val, "shard_images": SHARD}
    rows = []
    for name, file in (("random", in_random_order), ("sorted", in_sorted_order)):
        store = out / f"{name}.zarr"
        extract(ExtractOptions("tiny", (file, val), store, image_root=out / "data"))
        for seed in seeds:
            for window in windows:
                folder = out / f"{name}-{window}-{seed}"
                overrides = (f"train.seed={seed}", f"train.shuffle_window={window}")
                recipe = load_config(settings.config, (*settings.overrides, *overrides))
                recipe.data.files, recipe.data.val_files = [str(file)], [str(val)]
                recipe.data.images = str(out / "data")
                train(recipe, [store], folder, resume=True)
                figures = evaluate(load_run(folder)).figures
                for metric, unit in DEMO_METRICS.items():
                    value = figures[metric].value
                    print(name, window, seed, metric, value, file=sys.stderr, flush=True)
                    rows.append(
                        results.row(
                            f"demo, {name} order",
                            metric,
                            unit,
                            [value],
                            x=window,
                            config={**config, "seed": seed},
                        )
                    )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each figure, a column for each window; the mean over seeds."""
    windows = sorted({row["x"] for row in rows})
    values: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for row in rows:
        of_window = values.setdefault((row["provider"], row["metric"], row["unit"]), {})
        of_window.setdefault(row["x"], []).append(row["p50"])
    head = " | ".join(f"W = {window}" if window else "global" for window in windows)
    lines = [f"| | {head} |", f"|---|{'---:|' * len(windows)}"]
    for (provider, metric, unit), of_window in values.items():
        shown = (
            f"{statistics.mean(of_window[window]):,.4g}" if window in of_window else ""
            for window in windows
        )
        lines.append(f"| {provider}: {metric}, {unit} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, metavar="WORK", help="train the demo in this folder")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the demo")
    parser.add_argument("--windows", nargs="+", type=int, default=[0, 4, 1], help="of the demo")
    parser.add_argument("--no-save", action="store_true", help="leave results/ alone")
    arguments = parser.parse_args()
    if arguments.demo:
        name = "sampling-demo"
        rows = demo(arguments.demo.absolute(), DemoSettings(), arguments.seeds, arguments.windows)
    else:
        name, rows = "sampling", mixing() + costs()
    print(table(rows), file=sys.stderr)
    if not arguments.no_save:
        results.write(Path(__file__).with_name("results") / f"{name}.jsonl", rows)
    print(json.dumps({"results": rows}))


if __name__ == "__main__":
    main()
