"""RAM of an extraction is that of a few shards, whatever the number of images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

PEAK_BYTES = """
import resource, sys
from pathlib import Path
from featcache.extract import ExtractOptions, extract
model, images, out, limit = sys.argv[1:]
result = extract(
    ExtractOptions(model, (Path(images),), Path(out), shard_images=16, limit=int(limit))
)
assert result.features == int(limit)
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.fixture
def wide_encoder(tmp_path: Path) -> Path:
    """64 patches x 512: 65,536 bytes of features an image, one block."""
    folder = tmp_path / "wide"
    config = SiglipVisionConfig(
        hidden_size=512, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8,
        image_size=64, patch_size=8,
    )  # fmt: skip
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_memory_does_not_grow_with_the_number_of_images(wide_encoder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(700):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.bmp")

    def peak_bytes(limit: int) -> int:
        arguments = [wide_encoder, tmp_path / "images", tmp_path / f"{limit}.zarr", limit]
        done = subprocess.run(
            [sys.executable, "-c", PEAK_BYTES, *map(str, arguments)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return int(done.stdout)

    few, many = peak_bytes(100), peak_bytes(700)
    features_bytes = 600 * 64 * 512 * 2
    # 39 MB more features were written; measured growth: 6 MB.
    assert many - few < features_bytes / 3
