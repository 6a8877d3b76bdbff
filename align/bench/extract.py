"""How near an extraction comes to the bare encoder, and what a second worker brings.

Each figure is of a process of its own; rounds over all of them, so that a shared machine's noise
falls on all alike.

* *forward*: the encoder alone, on batches that lie in memory: the ceiling.
* *extract*: the real command on images of a disk, from the first batch to the last commit record.
* *one core*, *two workers*: the real command on one core, and with as many workers as cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from align.bench import results
from featcache.errors import StoreError

IMAGE_SIZE = (640, 480)
"""Width and height of the images, as JPEGs of about 120 KB: LLaVA's and COCO's are like that."""


@dataclass(frozen=True, slots=True)
class ExtractPlan:
    """What to measure. images: of each extraction. batch_size: images per forward. rounds: of all.
    workers: of the comparison with one core; 0 leaves it out. A shard is a batch, so that few
    images give work to several workers."""

    model: str
    images: int
    batch_size: int
    rounds: int
    device: str = "cpu"
    codec: str = "fp16"
    workers: int = 0
    compile: bool = False


def write_photos(folder: Path, count: int, seed: int = 0) -> None:
    """JPEGs that take a decoder as long as photos: smooth shapes, noise and edges."""
    chance = np.random.default_rng(seed)
    width, height = IMAGE_SIZE
    folder.mkdir(parents=True)
    for number in range(count):
        small = chance.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(small).resize(IMAGE_SIZE, Image.Resampling.BICUBIC)
        grain = chance.normal(0, 12, (height, width, 3))
        pixels = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.jpg", quality=90)


def measure(
    folder: Path, plan: ExtractPlan, on_note: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Result rows. Raises StoreError where an extraction fails."""
    images = folder / "images"
    write_photos(images, plan.images)
    rates: dict[str, list[float]] = {}
    stages: dict[str, list[float]] = {}
    peaks: dict[str, list[float]] = {}

    def note(name: str, rate: float) -> None:
        rates.setdefault(name, []).append(rate)
        on_note(f"{name}: {rate:.4g} images/s")

    for number in range(plan.rounds):
        note("forward", _forward(plan))
        forms: dict[str, tuple[list[str], set[int] | None]] = {
            "extract": (["--workers", "1"], None)
        }
        if plan.workers:
            cores = sorted(os.sched_getaffinity(0))[: plan.workers]
            many = ["--workers", str(plan.workers)]
            forms["one core"] = ["--workers", "1"], {cores[0]}
            forms[f"{plan.workers} workers"] = many, set(cores)
        for name, (options, cores_of) in forms.items():
            out = folder / f"{name.replace(' ', '-')}-{number}.zarr"
            document = _extract(plan, images, out, options, cores_of)
            work = document["work"]
            note(name, plan.images / document["encoding_s"])
            peaks.setdefault(name, []).append(work["peak_ram_bytes"] / 1e6)
            if name == "extract":
                for stage, seconds in work["seconds"].items():
                    stages.setdefault(stage, []).append(1000 * seconds / plan.images)
            subprocess.run(["rm", "-r", str(out)], check=True)
    config = {
        "model": plan.model, "images": plan.images, "batch": plan.batch_size,
        "device": plan.device, "codec": plan.codec, "compile": plan.compile,
        "image_size": list(IMAGE_SIZE),
    }  # fmt: skip

    def row(provider: str, metric: str, unit: str, values: list[float], **more: Any) -> Any:
        return results.row(
            provider, metric, unit, values, config=config,
            packages=("transformers", "pillow"), **more,
        )  # fmt: skip

    ceiling = float(np.median(rates["forward"]))
    found = [row(name, "rate", "images/s", of, ceiling=ceiling) for name, of in rates.items()]
    found.append(
        row("extract", "of the bare encoder", "ratio", _ratios(rates["extract"], rates["forward"]))
    )
    if plan.workers:
        name = f"{plan.workers} workers"
        found.append(
            row(name, "of one worker on one core", "ratio", _ratios(rates[name], rates["one core"]))
        )
    found += [row("extract", stage, "ms/image", values) for stage, values in stages.items()]
    found += [row(name, "peak RAM of a worker", "MB", values) for name, values in peaks.items()]
    return found


def _ratios(left: list[float], right: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(left, right, strict=True)]


def _forward(plan: ExtractPlan) -> float:
    """images/s of the encoder alone, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "align.bench.extract", json.dumps(
            [plan.model, plan.device, plan.batch_size, plan.images, plan.compile]
        )],
        cwd=results.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise StoreError(f"the encoder {plan.model} alone failed: {_last_line(done)}")
    return float(done.stdout)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def _extract(
    plan: ExtractPlan, images: Path, out: Path, options: list[str], cores: set[int] | None
) -> dict[str, Any]:
    argv = [
        sys.executable, "-c", "from cli.featcache import main; main()", "extract", "--model",
        plan.model, "--random-weights", "--data", str(images), "--out", str(out), "--batch-size",
        str(plan.batch_size), "--device", plan.device, "--codec", plan.codec, "--shard-images",
        str(plan.batch_size), "--json", *(["--compile"] if plan.compile else []), *options,
    ]  # fmt: skip
    if cores is not None:
        listed = ",".join(map(str, sorted(cores)))
        argv = ["taskset", "--cpu-list", listed, *argv]
    done = subprocess.run(argv, cwd=results.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise StoreError(f"{' '.join(argv)} failed: {_last_line(done)}")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def forward_rate(model: str, device: str, batch_size: int, images: int, compiled: bool) -> float:
    """images/s of an encoder with random weights: batches of pixels in memory -> features there."""
    import torch

    from featcache.encoders import load_encoder

    more: dict[str, Any] = {"compile": True} if compiled else {}
    encoder = load_encoder(model, device=device, random_weights=True, **more)
    chance = np.random.default_rng(0)
    width, height = IMAGE_SIZE
    photo = Image.fromarray(chance.integers(0, 256, (height, width, 3), dtype=np.uint8))
    pixels = encoder.collate([encoder.preprocess(photo)] * batch_size).to(encoder.device)

    def encode() -> None:
        encoder.encode(pixels)
        if encoder.device.type == "cuda":
            torch.cuda.synchronize(encoder.device)

    encode()
    batches = max(1, images // batch_size)
    start = time.perf_counter()
    for _ in range(batches):
        encode()
    return batches * batch_size / (time.perf_counter() - start)


if __name__ == "__main__":
    print(forward_rate(*json.loads(sys.argv[1])))
