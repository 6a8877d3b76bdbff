"""What a storage codec costs in the end: the demo trained from each codec's store, several seeds.

    python -m benchmarks.bench_codec_loss --out WORK

Each store is extracted anew, each run trains the demo's recipe in full, and is evaluated on the
held-out scenes. A run that was stopped goes on. About 1 minute a run on 2 idle cores.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from align.config import load_config
from align.demo.run import DemoSettings, write_data
from align.evaluate import evaluate
from align.run import load_run
from align.trainer import train
from benchmarks import results
from featcache.codecs import CODECS
from featcache.extract import ExtractOptions, extract

BASELINE = "fp16"
METRICS = {"loss": "nats per token", "attributes": "ratio", "exact_match": "ratio"}
"""Of `align.evaluate`: the held-out loss, and what the generated captions say."""


def measure(
    out: Path, settings: DemoSettings, codecs: list[str], seeds: list[int]
) -> list[dict[str, Any]]:
    """One row for each codec, metric and seed; and one for its difference to the baseline's of the
    same seed."""
    data = out / "data"
    files = write_data(data, settings)
    found: dict[tuple[str, int], dict[str, float]] = {}
    for codec in codecs:
        store = out / f"{codec}.zarr"
        extract(ExtractOptions("tiny", files, store, image_root=data, codec=codec))
        for seed in seeds:
            found[codec, seed] = _run(out, store, files, settings, seed)
    rows = []
    config = {"train": settings.num_train, "val": settings.num_val}
    for (codec, seed), figures in found.items():
        for metric, unit in METRICS.items():
            value = figures[metric]
            rows.append(results.row(codec, metric, unit, [value], x=seed, config=config))
            if codec != BASELINE and (BASELINE, seed) in found:
                rows.append(
                    results.row(
                        codec,
                        f"{metric} - {BASELINE}",
                        unit,
                        [value - found[BASELINE, seed][metric]],
                        x=seed,
                        config=config,
                    )
                )
    return rows


def _run(
    out: Path, store: Path, files: tuple[Path, Path], settings: DemoSettings, seed: int
) -> dict[str, float]:
    folder = out / f"{store.stem}-{seed}"
    config = load_config(settings.config, (*settings.overrides, f"train.seed={seed}"))
    config.data.files, config.data.val_files = [str(files[0])], [str(files[1])]
    config.data.images = str(files[0].parent)
    train(config, [store], folder, resume=True)
    figures = evaluate(load_run(folder)).figures
    print(store.stem, seed, {name: figures[name].value for name in METRICS}, flush=True)
    return {name: figures[name].value for name in METRICS}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the mean over the seeds, and each seed's difference to the baseline."""
    lines = [
        "| codec | metric | mean over seeds | difference of each seed |",
        "|---|---|---:|---:|",
    ]
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row["provider"], row["metric"]), []).append(row["p50"])
    for codec, metric in values:
        if metric in METRICS:
            differences = values.get((codec, f"{metric} - {BASELINE}"), [])
            shown = ", ".join(f"{value:+.4f}" for value in differences)
            mean = statistics.mean(values[codec, metric])
            lines.append(f"| {codec} | {metric} | {mean:.4f} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=list(CODECS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    rows = measure(out, DemoSettings(), arguments.codecs, arguments.seeds)
    print(table(rows))
    print(results.write("codec_loss", rows))


if __name__ == "__main__":
    main()
