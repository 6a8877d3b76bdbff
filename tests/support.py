"""Helpers that several test modules call; fixtures are in conftest.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, count: int, seed: int = 0) -> list[str]:
    """`count` PNGs of random smooth colours and random sizes; returns their names."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for i in range(count):
        small = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        size = tuple(int(n) for n in rng.integers(10, 50, 2))
        name = f"{i:04d}.png"
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(folder / name)
        names.append(name)
    return names


def write_captions(file: Path, names: list[str]) -> Path:
    """A caption JSONL over images."""
    lines = [
        json.dumps({"id": name, "images": [name], "caption": f"image {i}"})
        for i, name in enumerate(names)
    ]
    file.write_text("\n".join(lines) + "\n")
    return file


def feature_files(store: Path) -> dict[str, bytes]:
    """The bytes of every shard and every pooled chunk of a store, by path."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for pattern in ("features/*/c/*/0/0", "pooled/c/*/0")
        for path in sorted(store.glob(pattern))
    }
