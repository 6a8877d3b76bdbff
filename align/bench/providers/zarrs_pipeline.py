"""zarr-python with the codec pipeline of zarrs."""

from __future__ import annotations

from pathlib import Path

import zarr
import zarrs  # noqa: F401 - registers its pipeline

from align.bench.providers.base import Data
from align.bench.providers.zarr_python import Loop


class Zarrs(Loop):
    """zarr-python with the codec pipeline of zarrs, one `array[i]` after another."""

    def __init__(self, path: Path, data: Data) -> None:
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
        super().__init__(path, data)
