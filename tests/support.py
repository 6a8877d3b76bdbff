"""Helpers that several test modules call; fixtures are in conftest.py."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
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
    """The bytes of a store's features, scales, channel values and pooled outputs, by path."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for pattern in ("features/*/c/*/0/0", "scales/*/c/*/0", "channels/*/c/0/0", "pooled/c/*/0")
        for path in sorted(store.glob(pattern))
    }


class Killed(BaseException):
    """The process is gone: nothing is published or removed any more."""


class Publications:
    """Counts the renames by which files are published, and stops a program between two of them.

    What is on disk after a SIGKILL between two system calls is what is there when every later
    publication fails and nothing is cleaned up.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._after: int | None = None
        self._name: str | None = None
        rename, unlink = Path.replace, Path.unlink

        one_at_a_time = threading.Lock()

        def counted(path: Path, target: Path) -> Path:
            with one_at_a_time:
                if self._name is not None and self._name in Path(target).name:
                    self._after = self.count
                if self._after is not None and self.count >= self._after:
                    raise Killed
                self.count += 1
                return rename(path, target)

        def kept(path: Path, missing_ok: bool = False) -> None:
            if self._after is None:
                unlink(path, missing_ok=missing_ok)

        monkeypatch.setattr(Path, "replace", counted)
        monkeypatch.setattr(Path, "unlink", kept)

    @contextmanager
    def stopped(self, *, after: int | None = None, at: str | None = None) -> Iterator[None]:
        """Within: killed after so many publications, or before the first of a file named `at`."""
        self.count, self._after, self._name = 0, after, at
        try:
            yield
        finally:
            self._after = self._name = None


STORED = 11
"""Images of the fixture `store_path`."""
BROKEN = "0004.png"
"""The one among them that is no image."""


def bits(values: object) -> np.ndarray:
    """Values of any origin as bytes, so that NaN equals NaN."""
    if isinstance(values, torch.Tensor):
        return values.contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(values).view(np.uint8)
