"""Every family of connectors on the demo's pictures: what each learns of scenes never seen.

    python benchmarks/demo_connectors.py --out OUT              20 minutes on 2 cores
    python benchmarks/demo_connectors.py --out OUT --only pool  those whose names hold a word

All are trained as the recipe `demo` trains, on the same store, in the same steps; each is evaluated
on 500 held-out scenes, with their own features and with another scene's. Seeds differ in nothing
but chance: figures are of one seed. Run it again to go on after a stop.
Results: benchmarks/results/connectors.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.bench import results
from align.config import load_config
from align.demo.run import QUICK, DemoSettings, write_data
from align.evaluate import evaluate
from align.run import load_run
from align.trainer import train
from featcache.extract import ExtractOptions, extract

CONNECTORS: dict[str, tuple[str, ...]] = {
    "resampler": (),
    "mlp": ("connector.name=mlp",),
    "mlp, newlines": ("connector.name=mlp", "layout.newline=true"),
    "pool, mean": ("connector.name=pool", "connector.kind=mean", "connector.depth=1"),
    "pool, average 4 x 4": ("connector.name=pool", "connector.kind=average", "connector.side=4"),
    "pool, shuffle by 2": ("connector.name=pool", "connector.kind=shuffle", "connector.factor=2"),
    "pool, stride 2": ("connector.name=pool", "connector.kind=stride", "connector.factor=2"),
    "conv 4 x 4": ("connector.name=conv", "connector.side=4", "connector.width=128"),
    "sva 4 x 4": (
        "connector.name=sva", "connector.side=4", "connector.width=128", "connector.heads=4",
        "connector.depth=2", "connector.token_lengths=[64]",
    ),
}  # fmt: skip
SHOWN = ("attributes", "exact_match")


def measure(out: Path, settings: DemoSettings, only: str = "") -> list[dict[str, Any]]:
    """Result rows."""
    files = write_data(out / "data", settings)
    store = out / "store.zarr"
    extract(ExtractOptions(model="tiny", data=files, image_root=out / "data", out=store))
    rows = []
    for name, overrides in CONNECTORS.items():
        if only not in name:
            continue
        own = (
            f"data.files=[{files[0]}]",
            f"data.val_files=[{files[1]}]",
            f"data.images={out / 'data'}",
        )
        config = load_config("demo", [*overrides, *own, *settings.overrides])
        folder = out / name.replace(", ", "-").replace(" ", "")
        start = time.perf_counter()
        train(config, [store], folder, resume=True)
        seconds = time.perf_counter() - start  # of this call: less where it was resumed
        run = load_run(folder)
        found = {
            "own": evaluate(run).figures,
            "shuffled": evaluate(run, shuffle_features=True).figures,
        }
        described = {
            "connector": list(overrides),
            "slots": run.model.connector.num_slots((64, 64)),
            "parameters": sum(p.numel() for p in run.model.connector.parameters()),
            "steps": run.step,
            "scenes": settings.num_val,
            "seconds": round(seconds),
        }
        for features, figures in found.items():
            for metric in SHOWN:
                figure = figures[metric]
                rows.append(
                    results.row(
                        name, f"{metric}, {features} features", "ratio", [figure.value],
                        ceiling=1.0, config={**described, "chance": figure.chance},
                    )
                )  # fmt: skip
        print(
            f"{name}: {described['slots']} slots, {described['parameters']:,} parameters, "
            f"attributes {found['own']['attributes'].value:.3f} "
            f"(shuffled {found['shuffled']['attributes'].value:.3f}), exact "
            f"{found['own']['exact_match'].value:.3f}, {seconds:.0f} s",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    rows = measure(
        arguments.out.absolute(), QUICK if arguments.quick else DemoSettings(), arguments.only
    )
    if arguments.results:
        results.write(arguments.results, rows)
    print(json.dumps({"benchmark": "connectors", "results": rows}))


if __name__ == "__main__":
    main()
