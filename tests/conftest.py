"""Fixtures that several packages' tests share."""

from __future__ import annotations

import os
from pathlib import Path

# Before huggingface_hub reads it: no test may wait for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.support import write_images

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP vision tower of 9 patches x 24 with random weights, as a checkpoint folder.

    9 x 24 x 2 B is no multiple of 4096, so that its shards have padding between chunks.
    """
    folder = tmp_path_factory.mktemp("encoder")
    config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 24, "width": 24}, resample=2).save_pretrained(folder)
    return folder


@pytest.fixture
def images_dir(tmp_path: Path) -> Path:
    """Ten small images."""
    write_images(tmp_path / "images", 10)
    return tmp_path / "images"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, a file's run in one: they share fixtures, and a machine
    has one Ray."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(str(item.path)))
