"""Storage codecs: bytes, error, speed; what entropy coding would save; its choices one by one.

    OMP_NUM_THREADS=1 python benchmarks/bench_codecs.py              all of it, a minute
    OMP_NUM_THREADS=1 python benchmarks/bench_codecs.py --quick      smaller, fewer rounds
    python benchmarks/bench_codecs.py --device cuda                  the speeds only, on a GPU
    python benchmarks/bench_codecs.py --model siglip2-so400m         the errors, on your encoder

Errors are of images that the channels were not calibrated on. "synthetic": 729 x 1152, low rank and
heavy tails, channels of unequal spread, six outlier channels of which three are massive and nearly
constant. "shapes": 64 x 96, layer -2 of the shipped tiny encoder on the demo's pictures.

Speeds are GB/s of the same features in fp16, one thread, on synthetic activations; every round runs
all codecs in turn. The ceiling is memcpy of these fp16 bytes, in the same round. Outputs are below
32 MB, which glibc's malloc recycles; above, fresh pages bound them to 1 GB/s here.
Results: benchmarks/results/codecs.jsonl, codecs-cuda.jsonl, codecs-model.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.bench import results
from align.demo.shapes import render, sample_scenes
from featcache.codecs import CODECS, LayerCodec
from featcache.codecs.int4 import rotation_of
from featcache.encoders import load_encoder

PATCHES, WIDTH = 729, 1152
ERROR_METRICS = [
    "SNR",
    "relative L2 error",
    "of the deviation from channel means",
    "max |error|",
    "mean patch cosine",
    "worst patch cosine",
]
Data = dict[str, tuple[Tensor, Tensor]]
"""Name -> activations to calibrate on, and others to measure on: float32[B, P, D] each."""


def synthetic(images: int, seed: int, patches: int = PATCHES, width: int = WIDTH) -> Tensor:
    """float32[B, P, D]; the "encoder" is the same for every seed, the images are not."""
    encoder, rng = np.random.default_rng(0), np.random.default_rng([1, seed])
    rank = 64
    basis = encoder.standard_normal((rank, width)) * np.linspace(1, 0.1, rank)[:, None] / 8
    spread = np.exp(0.5 * encoder.standard_normal(width))
    mean = 0.3 * encoder.standard_normal(width)
    outliers = encoder.choice(width, 6, replace=False)
    x = rng.standard_normal((images, patches, rank)) @ basis
    x = (x + 0.15 * rng.standard_t(3.5, x.shape)) * spread + mean
    noise = rng.standard_normal((images, patches, 6))
    x[..., outliers] = noise * (0.3, 0.3, 0.3, 3, 4, 6) + (25, -18, 12, 0, 0, 0)
    return torch.from_numpy(x.clip(-27.5, 27.5)).float()


def shapes(images: int, model: str = "tiny", random_weights: bool = False) -> Tensor:
    """float32[B, P, D]: an encoder's features of the demo's pictures."""
    rng = np.random.default_rng(0)
    encoder = load_encoder(model, random_weights=random_weights)
    pictures = [Image.fromarray(render(scene, rng)) for scene in sample_scenes(images, rng)]
    pixels = [encoder.preprocess(picture) for picture in pictures]
    return encoder.encode(encoder.collate(pixels)).features["-2"].float().clone()


def load(quick: bool) -> Data:
    count = 2 if quick else 8
    real = shapes(16 * count)
    return {
        "synthetic": (synthetic(count, seed=0), synthetic(count, seed=1)),
        "shapes": (real[: 4 * count], real[4 * count :]),
    }


def errors(x: Tensor, y: Tensor) -> dict[str, tuple[float, str]]:
    """Metric -> value and unit. x: float32[B, P, D]; y: what came back."""
    error = (y - x).double()
    relative = float(error.norm() / x.double().norm())
    cosine = torch.cosine_similarity(x.double(), y.double(), dim=-1)
    return {
        "relative L2 error": (relative, "ratio"),
        "of the deviation from channel means": (
            float(error.norm() / (x - x.mean((0, 1))).double().norm()),
            "ratio",
        ),
        "SNR": (-20 * math.log10(relative), "dB"),
        "max |error|": (float(error.abs().max()), "feature"),
        "mean patch cosine": (float(cosine.mean()), "ratio"),
        "worst patch cosine": (float(cosine.min()), "ratio"),
    }


def quality(data: Data) -> list[dict[str, Any]]:
    rows = []
    for codec in CODECS.values():
        layer = LayerCodec(codec, PATCHES, WIDTH)
        size = [float(layer.code_bytes + layer.scale_bytes)]
        config = {"shape": [PATCHES, WIDTH]}
        rows.append(results.row(codec.name, "stored", "bytes/image", size, config=config))
        for name, (calibration, x) in data.items():
            layer = LayerCodec(codec, *x.shape[1:], codec.calibrate(calibration))
            y = layer.encode(x)[0].decode(torch.float32)
            config = {"shape": list(x.shape), "calibrated_on": len(calibration)}
            for metric, (value, unit) in errors(x, y).items():
                rows.append(results.row(codec.name, metric, unit, [value], x=name, config=config))
    return rows


def speed(x: Tensor, rounds: int, device: str = "cpu") -> list[dict[str, Any]]:
    """x: float32[B, P, D]. One thread; on a GPU until its work is done."""
    torch.set_num_threads(1)
    x = x.to(device)
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    half, copy = x.half(), torch.empty_like(x, dtype=torch.float16)
    runs: dict[tuple[str, str, str], Callable[[], object]] = {
        ("memcpy", "copy", "float16"): lambda: copy.copy_(half)
    }
    for codec in CODECS.values():
        layer = LayerCodec(codec, *x.shape[1:], codec.calibrate(x))
        codes, scales = codec.encode(x, layer.channels)
        for values in (x, half):
            dtype = str(values.dtype).removeprefix("torch.")
            runs[codec.name, "encode", dtype] = lambda codec=codec, values=values, layer=layer: (
                codec.encode(values, layer.channels)
            )
            runs[codec.name, "decode", dtype] = (
                lambda codec=codec, codes=codes, scales=scales, layer=layer, values=values: (
                    codec.decode(codes, scales, layer.channels, values.dtype)
                )
            )
    del runs["fp16", "encode", "float16"], runs["fp16", "decode", "float16"]  # no work at all
    seconds: dict[tuple[str, str, str], list[float]] = {key: [] for key in runs}
    for number in range(rounds + 1):
        for key, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if number:  # the first warms caches and memory
                seconds[key].append(time.perf_counter() - start)
    gigabytes = half.nbytes / 1e9
    ceiling = gigabytes / float(np.median(seconds["memcpy", "copy", "float16"]))
    name = torch.cuda.get_device_name() if x.is_cuda else "cpu, 1 thread"
    config = {"shape": list(x.shape), "device": name}
    return [
        results.row(
            provider,
            metric,
            "GB/s of fp16",
            [gigabytes / s for s in times],
            x=dtype,
            ceiling=ceiling,
            config=config,
        )
        for (provider, metric, dtype), times in seconds.items()
    ]


def entropy(data: Data, rounds: int) -> list[dict[str, Any]]:
    """What general compressors save of the codes, and how fast they give them back."""
    from numcodecs import Shuffle, Zlib, Zstd

    rows = []
    for name, (calibration, x) in data.items():
        fp16_gigabytes = 2 * x.numel() / 1e9
        for codec in (CODECS[name] for name in ("fp16", "int8", "int4")):
            codes, _ = codec.encode(x, codec.calibrate(calibration))
            raw = codes.numpy().tobytes()
            forms = {"": raw}
            if codec.name == "fp16":
                forms[" shuffled"] = bytes(Shuffle(2).encode(raw))
            for form, stored in forms.items():
                for tool, compressor in {"zlib 1": Zlib(1), "zstd 1": Zstd(1)}.items():
                    packed = compressor.encode(stored)
                    speeds = []
                    for _ in range(rounds):
                        start = time.perf_counter()
                        compressor.decode(packed)
                        speeds.append(fp16_gigabytes / (time.perf_counter() - start))
                    provider = f"{tool} over {codec.name}{form}"
                    saved = [1 - len(packed) / len(raw)]
                    config = {"shape": list(x.shape)}
                    rows += [
                        results.row(provider, "saved", "ratio", saved, x=name, config=config),
                        results.row(
                            provider, "decode", "GB/s of fp16", speeds, x=name, config=config
                        ),
                    ]
    return rows


def channel_choices(data: Data) -> list[dict[str, Any]]:
    """int8 and fp8 with other static channel values than `calibrate` gives."""
    rows = []
    for name, (calibration, x) in data.items():
        flat = calibration.flatten(0, 1)
        for centre, offset in {"mean": flat.mean(0), "0": torch.zeros(flat.shape[1])}.items():
            rms = (flat - offset).square().mean(0).sqrt()
            peak = (flat - offset).abs().amax(0)
            scales = {"1": rms**0, "rms^0.5": rms**0.5, "rms^0.75": rms**0.75, "rms": rms}
            scales |= {"(rms peak)^0.5": (rms * peak).sqrt(), "peak^0.5": peak**0.5, "peak": peak}
            for label, scale in scales.items():
                channels = torch.stack([offset, scale / scale.max()])
                for codec in (CODECS["int8"], CODECS["fp8"]):
                    y = codec.decode(*codec.encode(x, channels), channels, torch.float32)
                    provider = f"{codec.name}, offset {centre}, scale {label}"
                    config = {"shape": list(x.shape)}
                    for metric, (value, unit) in errors(x, y).items():
                        rows.append(
                            results.row(provider, metric, unit, [value], x=name, config=config)
                        )
    return rows


def ablation(data: Data) -> list[dict[str, Any]]:
    """int4 with one choice changed at a time, without packing."""
    upper = torch.tensor(CODECS["int4"].LEVELS)  # type: ignore[attr-defined]
    lloyd, uniform = torch.cat([-upper.flip(0), upper]), torch.arange(16) - 7.5
    nf4 = torch.tensor(
        [
            *(-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0),
            *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1),
        ]
    )

    def rms(y: Tensor) -> Tensor:
        return y.square().mean(-1, keepdim=True).sqrt()

    def peak(y: Tensor) -> Tensor:
        return y.abs().amax(-1, keepdim=True)

    def nearest(y: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
        return levels[torch.bucketize(y / scale, (levels[1:] + levels[:-1]) / 2)] * scale

    def ours(y: Tensor) -> Tensor:
        return nearest(y, lloyd, torch.maximum(rms(y), peak(y) / 3.5))

    def best_of(y: Tensor) -> Tensor:
        tries = [nearest(y, lloyd, peak(y) / k) for k in np.geomspace(2.7, 9, 12).tolist()]
        best = torch.stack([(t - y).square().sum(-1) for t in tries]).argmin(0)
        return torch.stack(tries).gather(0, best[None, ..., None].expand(1, *y.shape))[0]

    def min_max(y: Tensor) -> Tensor:
        low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
        return ((y - low) / (high - low) * 15).round() * (high - low) / 15 + low

    def groups(quantise: Callable[[Tensor], Tensor], size: int = 32) -> Callable[[Tensor], Tensor]:
        return lambda y: quantise(y.unflatten(-1, (-1, size))).flatten(-2)

    def uniform_peak(y: Tensor) -> Tensor:
        return nearest(y, uniform, peak(y) / 8)

    def matrix(kind: str, width: int) -> Tensor:
        if kind == "none":
            return torch.eye(width)
        rotation = rotation_of(width, torch.device("cpu"))
        if kind == "2-D DCT":
            return torch.kron(rotation.left, rotation.right) * rotation.signs
        if kind == "random orthogonal":
            normal = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
            return torch.linalg.qr(normal.double())[0].float()
        block = torch.ones(1, 1)  # Hadamard of the largest power of two that divides the width
        while width % (2 * len(block)) == 0:
            block = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), block)
        blocks = torch.block_diag(*[block / math.sqrt(len(block))] * (width // len(block)))
        return blocks * rotation.signs

    variants: dict[str, tuple[str, float, Callable[[Tensor], Tensor]]] = {
        "as it is: 2-D DCT, std^0.5, Lloyd-Max, max(rms, peak/3.5)": ("2-D DCT", 0.5, ours),
        "rotation: none": ("none", 0.5, ours),
        "rotation: Hadamard blocks": ("Hadamard", 0.5, ours),
        "rotation: random orthogonal": ("random orthogonal", 0.5, ours),
        "channel scale: 1": ("2-D DCT", 0, ours),
        "channel scale: std^0.75": ("2-D DCT", 0.75, ours),
        "channel scale: std": ("2-D DCT", 1, ours),
        "patch scale: peak": ("2-D DCT", 0.5, lambda y: nearest(y, lloyd, peak(y) / 2.7326)),
        "patch scale: rms": ("2-D DCT", 0.5, lambda y: nearest(y, lloyd, rms(y))),
        "patch scale: max(rms, peak/3)": (
            *("2-D DCT", 0.5),
            lambda y: nearest(y, lloyd, torch.maximum(rms(y), peak(y) / 3)),
        ),
        "patch scale: best of 12": ("2-D DCT", 0.5, best_of),
        "levels: uniform, peak": ("2-D DCT", 0.5, uniform_peak),
        "levels: uniform, 0.335 rms": (
            *("2-D DCT", 0.5),
            lambda y: nearest(y, uniform, 0.3352 * rms(y)),
        ),
        "levels: NF4, peak": ("2-D DCT", 0.5, lambda y: nearest(y, nf4, peak(y))),
        "levels: uniform from min to max": ("2-D DCT", 0.5, min_max),
        "groups of 32 (+24 % bytes): rotated, uniform, peak": (
            *("2-D DCT", 0.5),
            groups(uniform_peak),
        ),
        "groups of 32 (+24 % bytes): not rotated, uniform, peak": (
            *("none", 0.5),
            groups(uniform_peak),
        ),
        "groups of 32 (+24 % bytes): rotated, Lloyd-Max": ("2-D DCT", 0.5, groups(ours)),
    }
    rows = []
    for name, (calibration, x) in data.items():
        flat = calibration.flatten(0, 1)
        for variant, (kind, power, quantise) in variants.items():
            scale = flat.std(0) ** power
            scale = scale.clamp_min(float(scale.mean()) / 4)
            rotation = matrix(kind, x.shape[-1])
            rotated = ((x - flat.mean(0)) / scale) @ rotation.T
            y = (quantise(rotated) @ rotation) * scale + flat.mean(0)
            config = {"shape": list(x.shape)}
            for metric, (value, unit) in errors(x, y).items():
                rows.append(results.row(variant, metric, unit, [value], x=name, config=config))
    return rows


def table(rows: list[dict[str, Any]], metrics: list[str]) -> str:
    """Markdown: a line for each provider, a column for each (metric, x)."""
    columns = {(r["metric"], r["x"]): r["unit"] for r in rows if r["metric"] in metrics}
    order = sorted(columns, key=lambda c: (metrics.index(c[0]), str(c[1])))
    names = [metric if x is None else f"{metric}, {x}" for metric, x in order]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(order)]
    for provider in dict.fromkeys(row["provider"] for row in rows):
        cells = []
        for column in order:
            found = [r for r in rows if (r["provider"], r["metric"], r["x"]) == (provider, *column)]
            cells.append(_cell(found[0]) if found else "")
        lines.append(f"| {provider} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if row["n"] == 1:
        return f"{row['p50']:.6f}" if "cosine" in row["metric"] else f"{row['p50']:.4g}"
    spread = f"{row['p50']:.2f} ({row['p20']:.2f} - {row['p80']:.2f})"
    return spread if row["ceiling"] is None else f"{spread}, {row['p50'] / row['ceiling']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less data, fewer rounds")
    parser.add_argument("--no-save", action="store_true", help="leave results/codecs.jsonl alone")
    parser.add_argument("--device", default="cpu", help="cuda: speeds on the GPU")
    parser.add_argument("--model", help="only the errors, on this encoder's features of 8 pictures")
    parser.add_argument("--random-weights", action="store_true", help="of --model")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else 15
    if arguments.model:
        features = shapes(8, arguments.model, arguments.random_weights)
        name = arguments.model + ", random weights" * arguments.random_weights
        rows = quality({name: (features[:4], features[4:])})
        print(table(rows, ERROR_METRICS), file=sys.stderr)
        if not arguments.no_save:
            results.write(Path(__file__).with_name("results") / "codecs-model.jsonl", rows)
        print(json.dumps({"results": rows}))
        return
    if arguments.device != "cpu":
        rows = speed(synthetic(32, seed=2), rounds, arguments.device)
        print(table(rows, ["copy", "encode", "decode"]), file=sys.stderr)
        if not arguments.no_save:
            results.write(Path(__file__).with_name("results") / "codecs-cuda.jsonl", rows)
        print(json.dumps({"results": rows}))
        return
    data = load(arguments.quick)
    parts = [quality(data), speed(synthetic(8, seed=2), rounds), entropy(data, rounds)]
    parts += [channel_choices(data), ablation(data)]
    error_metrics = ["relative L2 error", "of the deviation from channel means"]
    tables = [
        ["stored", *ERROR_METRICS],
        ["copy", "encode", "decode"],
        ["saved", "decode"],
        [*error_metrics, "max |error|", "worst patch cosine"],
        [*error_metrics, "worst patch cosine"],
    ]
    for rows, metrics in zip(parts, tables, strict=True):
        print(table(rows, metrics), end="\n\n", file=sys.stderr, flush=True)
    rows = [row for part in parts for row in part]
    if not arguments.quick and not arguments.no_save:
        results.write(Path(__file__).with_name("results") / "codecs.jsonl", rows)
    print(json.dumps({"results": rows}))


if __name__ == "__main__":
    main()
