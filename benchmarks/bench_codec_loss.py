"""What a storage codec costs in the end: the demo trained from each codec's store, several seeds.

    python -m benchmarks.bench_codec_loss --out WORK

Each store is extracted anew, each run trains the demo's recipe in full and is evaluated on the
held-out scenes: on its own store, and, for those trained on fp16, on every other codec's store. The
former holds the chance of training (another rounding leads to another run), the latter does not.
A run that was stopped goes on. About 1 minute a run on 2 idle cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import featcache
from align.bench import results
from align.config import load_config
from align.demo.run import DemoSettings, write_data
from align.evaluate import evaluate
from align.run import load_run
from align.trainer import train
from featcache.codecs import CODECS
from featcache.extract import ExtractOptions, extract
from featcache.join import StoreJoin

BASELINE = "fp16"
METRICS = {"loss": "nats per token", "attributes": "ratio", "exact_match": "ratio"}
"""Of `align.evaluate`: the held-out loss, and what the generated captions say."""


def measure(
    out: Path, settings: DemoSettings, codecs: list[str], seeds: list[int]
) -> list[dict[str, Any]]:
    """Rows for each codec, metric and seed: of runs trained on the codec's store, their held-out
    loss on the way, and the baseline's runs evaluated on it ("given fp16's weights")."""
    data = out / "data"
    files = write_data(data, settings)
    config = {"train": settings.num_train, "val": settings.num_val}
    rows = []

    def note(codec: str, seed: int, figures: dict[str, float], suffix: str = "") -> None:
        print(codec, seed, suffix, figures, file=sys.stderr, flush=True)
        for metric, value in figures.items():
            unit = METRICS.get(metric, "nats per token")
            rows.append(results.row(codec, metric + suffix, unit, [value], x=seed, config=config))

    for codec in codecs:
        store = out / f"{codec}.zarr"
        extract(ExtractOptions("tiny", files, store, image_root=data, codec=codec))
        for seed in seeds:
            run = _train(out, store, files, settings, seed)
            note(codec, seed, _figures(run))
            note(codec, seed, _losses_on_the_way(run))
    for codec in codecs:
        for seed in seeds:
            run = out / f"{BASELINE}-{seed}"
            if run.exists():
                swapped = _figures(run, out / f"{codec}.zarr")
                note(codec, seed, swapped, f", given {BASELINE}'s weights")
    return rows


def _train(
    out: Path, store: Path, files: tuple[Path, Path], settings: DemoSettings, seed: int
) -> Path:
    folder = out / f"{store.stem}-{seed}"
    config = load_config(settings.config, (*settings.overrides, f"train.seed={seed}"))
    config.data.files, config.data.val_files = [str(files[0])], [str(files[1])]
    config.data.images = str(files[0].parent)
    train(config, [store], folder, resume=True)
    return folder


def _figures(folder: Path, store: Path | None = None) -> dict[str, float]:
    """Of a run on the held-out scenes; store: another one of the same rows, in place of its own."""
    run = load_run(folder)
    if store is not None:
        run.stores = StoreJoin([featcache.open(store)])
    figures = evaluate(run).figures
    return {name: figures[name].value for name in METRICS}


def _losses_on_the_way(folder: Path) -> dict[str, float]:
    """The held-out loss of each evaluation while training."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        f"loss at step {event['step']}": event["loss"]
        for event in events
        if event["kind"] == "eval"
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: each metric's mean over the seeds, and each seed's difference to the baseline's."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row["metric"], row["provider"]), []).append(row["p50"])
    lines = ["| metric | codec | mean | difference of each seed |", "|---|---|---:|---:|"]
    for (metric, codec), of_seeds in sorted(values.items()):
        own = values.get((metric, BASELINE), of_seeds)
        shown = ", ".join(f"{value - base:+.5f}" for value, base in zip(of_seeds, own, strict=True))
        lines.append(f"| {metric} | {codec} | {statistics.mean(of_seeds):.5f} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=list(CODECS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--no-save", action="store_true", help="leave results/ alone")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    rows = measure(out, DemoSettings(), arguments.codecs, arguments.seeds)
    print(table(rows), file=sys.stderr)
    if not arguments.no_save:
        results.write(Path(__file__).with_name("results") / "codec_loss.jsonl", rows)
    print(json.dumps({"results": rows}))


if __name__ == "__main__":
    main()
