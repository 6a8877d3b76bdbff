"""The tables of docs/scale.md, section "Arithmetic", by `align plan`'s formulas. Nothing is timed.

    python benchmarks/plan_scale.py            prints them
    python benchmarks/plan_scale.py --write    puts them between the marks in docs/scale.md

Assumed is what `align plan` assumes where nothing is given, but that disks do not limit: the tables
say what a disk must do.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.connectors.mlp import MlpConfig
from align.connectors.resampler import ResamplerConfig
from align.flop import LANGUAGE_MODELS, LanguageModel
from align.plan import CORES_PER_GPU, Machine, Plan, Workload
from featcache.registry import ENCODERS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- begin: benchmarks/plan_scale.py --write -->", "<!-- end -->"

ENCODER = ENCODERS["siglip2-so400m"]
IMAGES = {"558K": 558_128, "2.5M": 2_500_000, "12M": 12_000_000}
GPUS = (1, 8, 64)
CODECS = ("fp16", "int8", "int4")
SMALL, LARGE = LANGUAGE_MODELS["qwen3-0.6b"], LANGUAGE_MODELS["qwen3-8b"]
SHOWN_MODELS = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b")
DISKS_GBPS = (0.5, 2.0, 7.0)
PLANNED_RUNS = 8


def plan(
    images: int,
    llm: LanguageModel = LARGE,
    gpus: int = 1,
    codec: str = "fp16",
    disk_gbps: float = 1e6,
    **workload: object,
) -> Plan:
    machine = Machine(
        gpus=gpus, cores=CORES_PER_GPU * gpus, read_gbps=disk_gbps, write_gbps=disk_gbps
    )
    return Plan(Workload(ENCODER, llm, images, codec=codec, **workload), machine)  # type: ignore[arg-type]


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def stores() -> str:
    """Bytes and files by data set and codec."""
    rows = []
    for name, images in IMAGES.items():
        found = {codec: plan(images, codec=codec) for codec in CODECS}
        sizes = [_terabytes(found[codec].store_bytes) for codec in CODECS]
        files = f"{found['fp16'].files:,} / {found['int8'].files:,}"
        rows.append([f"{name} ({images:,})", *sizes, f"{found['fp16'].shards:,}", files])
    return table(
        ["images", *(f"{codec}, TB" for codec in CODECS), "shards", "files fp16 / int8, int4"], rows
    )


def extractions() -> str:
    """Hours, and what keeps the encoder as the limit, by data set and GPUs."""
    rows = []
    for name, images in IMAGES.items():
        for gpus in GPUS:
            found = plan(images, gpus=gpus)
            rate = found.extraction
            writes = [plan(images, gpus=gpus, codec=codec).write_gbps_needed for codec in CODECS]
            row = [name, f"{gpus}", f"{rate.images_per_s:,.0f}", _time(found.extraction_hours)]
            rows.append([*row, f"{found.cores_needed:,}", *map(_figure, writes)])
    columns = ["images", "GPUs", "images/s", "time", "cores to decode"]
    return table([*columns, *(f"GB/s written, {codec}" for codec in CODECS)], rows)


def reads() -> str:
    """What training from the cache reads at the GPUs' limit, by GPUs, model and codec."""
    rows = []
    for gpus in GPUS:
        for llm in (SMALL, LARGE):
            found = [plan(IMAGES["558K"], llm, gpus, codec) for codec in CODECS]
            rate = f"{found[0].cached.images_per_s:,.0f}"
            epochs = [_time(plan(images, llm, gpus).cached_run_hours) for images in IMAGES.values()]
            needed = [_figure(each.read_gbps_needed) for each in found]
            rows.append([f"{gpus}", llm.name, rate, *needed, *epochs])
    return table(
        ["GPUs", "LLM", "images/s"]
        + [f"GB/s read, {codec}" for codec in CODECS]
        + [f"an epoch of {name}" for name in IMAGES],
        rows,
    )


def gains() -> str:
    """What leaving out the encoder gives at most, by model and visual tokens."""
    rows = []
    for name in SHOWN_MODELS:
        llm = LANGUAGE_MODELS[name]
        row = [llm.name]
        for connector in (ResamplerConfig(), MlpConfig()):
            found = plan(IMAGES["558K"], llm, connector=connector)
            row += [f"{found.workload.llm_flop / 1e12:.2f}", f"{found.compute_gain:.2f}x"]
        rows.append(row)
    return table(
        ["LLM", "64 tokens, TFLOP", "at most", "729 tokens, TFLOP", "at most"],
        rows,
    )


def break_evens() -> str:
    """Epochs after which the extraction is earned back, on one GPU with one disk."""
    rows = []
    for llm in (LANGUAGE_MODELS[name] for name in SHOWN_MODELS):
        row = [llm.name]
        for disk in DISKS_GBPS:
            for codec in ("fp16", "int4"):
                found = plan(IMAGES["558K"], llm, codec=codec, disk_gbps=disk, runs=PLANNED_RUNS)
                epochs = found.break_even_epochs
                row.append("never" if epochs is None else f"{_figure(epochs)} ({found.gain:.2f}x)")
        rows.append(row)
    columns = [f"{disk:g} GB/s, {codec}" for disk in DISKS_GBPS for codec in ("fp16", "int4")]
    return table(["LLM", *columns], rows)


def markdown() -> str:
    """All tables, as they stand in the page."""
    return "\n\n".join(
        [
            "The store, SigLIP2 so400m, one layer (729 x 1152) and the pooled output:",
            stores(),
            "Extraction. GB/s written and cores are what the GPUs' rate asks for:",
            extractions(),
            "Training from the cache, 64 visual tokens. GB/s read are what the GPUs' rate asks "
            "for:",
            reads(),
            "TFLOP of the frozen language model a sample (32 text tokens), and the most that "
            "leaving out the encoder's 0.665 TFLOP gives by operations alone:",
            gains(),
            "Epochs until the extraction of 558K images is earned back, all runs together, on one "
            "GPU, 64 visual tokens; in brackets how many times as fast each epoch is from then on:",
            break_evens(),
        ]
    )


def _terabytes(nbytes: int) -> str:
    return f"{nbytes / 1e12:.2f}"


def _figure(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:,.0f}"


def _time(hours: float) -> str:
    """53 s, 9.4 min, 1.2 h, 27 h."""
    for number, unit in ((hours * 3600, "s"), (hours * 60, "min")):
        if number < 60:
            return f"{number:.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"
    return f"{hours:.0f} h" if hours >= 10 else f"{hours:.1f} h"


def write(page: Path) -> None:
    """Replace what is between the marks."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put them into docs/scale.md")
    if parser.parse_args().write:
        write(PAGE)
    else:
        print(markdown())


if __name__ == "__main__":
    main()
