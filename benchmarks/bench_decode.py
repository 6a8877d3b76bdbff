"""Decoding JPEGs by Pillow and by simplejpeg: bit for bit, and timed.

    python benchmarks/bench_decode.py            some minutes
    python benchmarks/bench_decode.py --quick    seconds; does not save

Compared with Pillow's pixels are simplejpeg's, for JPEGs of random sizes, qualities, subsamplings,
modes and damages; "equal", "different" and "refused" are counted for each kind.

Timed in rounds, all ways one after another in each, with one thread and with two (as many images a
thread), are decoding alone and decoding with the resize to 384 x 384 that SigLIP2 wants:

- Pillow, converted: `Image.open` and `.convert("RGB")`, which copies an image that is RGB already.
- Pillow: `featcache.images.decode`.
- simplejpeg, Arrow: Pillow reads the header (its limits and refusals must hold), simplejpeg decodes
  to Pillow's own layout of four bytes a pixel, and Arrow makes that memory an image without a copy
  (Pillow 11.2, pyarrow).
- simplejpeg, copied: the same by Pillow's other interfaces.
- simplejpeg, no image: the array alone. No way to an image can be faster.

Needs simplejpeg and pyarrow. Results: benchmarks/results/decode.jsonl.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.bench import results
from featcache.errors import ImageError
from featcache.images import FORMATS, decode

ROOT = Path(__file__).resolve().parents[1]
SIZES = ((336, 336), (640, 480), (4000, 3000))
QUALITY = 90
SIDE = 384
PACKAGES = ("pillow", "simplejpeg", "pyarrow")


def photo(width: int, height: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """uint8[height, width, 3]: structure at several scales and noise, 1.9 bits a pixel at q 90."""
    pixels = np.zeros((height, width, 3))
    for step, share in ((64, 0.6), (16, 0.3), (4, 0.1)):
        coarse = rng.integers(0, 256, (height // step + 1, width // step + 1, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pixels += share * np.asarray(smooth, dtype=np.float64)
    return (pixels + rng.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8)


def saved(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------ bit for bit


def kinds(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """One file of each kind, of one random picture and quality."""
    import simplejpeg

    width, height = map(int, rng.integers(1, 131, 2))
    pixels = photo(width, height, rng)
    image, quality = Image.fromarray(pixels), int(rng.integers(1, 101))
    for sampling in ("4:4:4", "4:2:2", "4:2:0"):
        for kind, progressive in (("baseline", False), ("progressive", True)):
            for restart in (0, 2):
                name = f"{sampling} {kind}" + ", restart markers" * bool(restart)
                yield (
                    name,
                    saved(
                        image,
                        quality=quality,
                        subsampling=sampling,
                        progressive=progressive,
                        restart_marker_blocks=restart,
                    ),
                )
    for sampling in ("440", "411"):
        yield (
            ":".join(sampling),
            simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling=sampling),
        )
    whole = saved(image, quality=quality)
    yield "grey", saved(image.convert("L"), quality=quality)
    yield "grey, progressive", saved(image.convert("L"), quality=quality, progressive=True)
    yield "RGB, Adobe marker", saved(image, quality=quality, keep_rgb=True)
    yield "CMYK", saved(image.convert("CMYK"), quality=quality)
    yield "MPO, first frame", _mpo(image, quality)
    yield "EXIF orientation 6", saved(image, quality=quality, exif=_turned())
    yield "bytes after the end", whole + b"\0trailing"
    yield "no end marker", whole[:-2]
    yield "truncated", whole[: len(whole) * 2 // 3]
    yield "a byte flipped", _flipped(whole, rng)


def _mpo(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "MPO", save_all=True, append_images=[image.rotate(180)], quality=quality)
    return buffer.getvalue()


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _flipped(data: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(data)
    damaged[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def outcome(data: bytes) -> str:
    """Of simplejpeg beside `featcache.images.decode`."""
    import simplejpeg

    try:
        expected = np.asarray(decode(data)[0])
    except ImageError:
        expected = None
    try:
        found = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return "refused by both" if expected is None else "refused"
    if expected is None:
        return "accepted, Pillow refuses"
    return "equal" if np.array_equal(found, expected) else "different"


def compare(pictures: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    found: dict[str, Counter[str]] = {}
    for _ in range(pictures):
        for kind, data in kinds(rng):
            found.setdefault(kind, Counter())[outcome(data)] += 1
    config = {"pictures": pictures, "sides": "1 to 130", "strict": True}
    return [
        results.row(
            "simplejpeg", what, "files", [float(n)], x=kind, config=config, packages=PACKAGES
        )
        for kind, counts in found.items()
        for what, n in counts.items()
    ]


# ------------------------------------------------------------------------------ timed


def ways(data: bytes, size: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """Name -> what decodes `data` to an RGB image."""
    import pyarrow
    import simplejpeg

    def converted() -> Image.Image:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.convert("RGB")

    def arrow() -> Image.Image:
        with Image.open(io.BytesIO(data), formats=FORMATS):
            pixels = pyarrow.array(simplejpeg.decode_jpeg(data, "RGBX").reshape(-1))
        quadruples = pyarrow.FixedSizeListArray.from_arrays(pixels, 4)
        return Image.fromarrow(quadruples, "RGB", size)

    def copied() -> Image.Image:
        pixels = simplejpeg.decode_jpeg(data, "RGBX")
        return Image.frombuffer("RGBX", size, pixels, "raw", "RGBX", 0, 1).convert("RGB")

    found: dict[str, Callable[[], Any]] = {
        "Pillow, converted": converted,
        "Pillow": lambda: decode(data)[0],
        "simplejpeg, Arrow": arrow,
        "simplejpeg, copied": copied,
    }
    first = np.asarray(found["Pillow"]())
    for name, way in found.items():
        if not np.array_equal(np.asarray(way()), first):
            raise SystemExit(f"{name} gives other pixels than Pillow at {size}")
    found["simplejpeg, no image"] = lambda: simplejpeg.decode_jpeg(data, "RGBX")
    return found


def measure(sizes: tuple[tuple[int, int], ...], rounds: int, seconds: float) -> list[dict]:
    """seconds: of one way in one round, about."""
    rng, rows = np.random.default_rng(0), []
    for size in sizes:
        data = saved(Image.fromarray(photo(*size, rng)), quality=QUALITY)
        runs: dict[tuple[str, str], Callable[[], Any]] = {}
        for name, way in ways(data, size).items():
            runs[name, "decode"] = way
            if name != "simplejpeg, no image":
                runs[name, "decode and resize"] = lambda way=way: way().resize(
                    (SIDE, SIDE), Image.Resampling.BILINEAR
                )
        start = time.perf_counter()
        decode(data)
        repeats = max(1, round(seconds / (time.perf_counter() - start)))
        for threads in (1, 2):
            found = _rounds(runs, rounds, repeats, threads)
            for (name, metric), values in found.items():
                unit = "CPU ms/image" if metric.endswith(" CPU") else "ms/image"
                x = f"{size[0]} x {size[1]}, {threads} thread{'s' * (threads > 1)}"
                config = {"file_bytes": len(data), "quality": QUALITY, "repeats": repeats}
                rows.append(
                    results.row(name, metric, unit, values, x=x, config=config, packages=PACKAGES)
                )
    return rows


def _rounds(
    runs: dict[tuple[str, str], Callable[[], Any]], rounds: int, repeats: int, threads: int
) -> dict[tuple[str, str], list[float]]:
    """ms an image, of wall time all threads together and of CPU time ("... CPU"), which other work
    on the machine disturbs less; the first round only warms."""
    found: dict[tuple[str, str], list[float]] = {
        (name, metric + clock): [] for name, metric in runs for clock in ("", " CPU")
    }
    with ThreadPoolExecutor(threads) as pool:
        for number in range(rounds + 1):
            for (name, metric), run in runs.items():

                def work(run: Callable[[], Any] = run) -> None:
                    for _ in range(repeats):
                        run()

                start, cpu = time.perf_counter(), time.process_time()
                for future in [pool.submit(work) for _ in range(threads)]:
                    future.result()
                if number:
                    scale = 1000 / (repeats * threads)
                    found[name, metric].append(scale * (time.perf_counter() - start))
                    found[name, metric + " CPU"].append(scale * (time.process_time() - cpu))
    return found


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        spread = f"  ({row['p20']:.2f} to {row['p80']:.2f})" if row["n"] > 1 else ""
        print(
            f"{row['x']:<34}{row['metric']:<26}{row['provider']:<22}{row['p50']:8.2f}{spread}",
            file=sys.stderr,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few files, few rounds")
    parser.add_argument("--no-save", action="store_true", help="leave the committed results alone")
    options = parser.parse_args()
    if missing := [name for name in ("simplejpeg", "pyarrow") if not find_spec(name)]:
        raise SystemExit(f"not installed; pip install {' '.join(missing)}")
    if options.quick:
        rows = compare(5) + measure(SIZES[:2], 3, 0.02)
    else:
        rows = compare(300) + measure(SIZES, 9, 0.25)
    show(rows)
    if not (options.quick or options.no_save):
        results.write(ROOT / "benchmarks/results/decode.jsonl", rows)
    print(json.dumps({"results": rows}))


if __name__ == "__main__":
    main()
