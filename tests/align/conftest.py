"""A whole small world, made once per test session: images, encoder, store, language model.

Random weights of the real architectures; nothing is downloaded and nothing stands in for a part.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import align
import featcache
from align.config import RunConfig, load_config
from align.llm import FrozenLLM, LLMConfig, load_llm
from featcache.extract import ExtractOptions, extract
from featcache.store import Store
from tests.support_s3 import bucket, environment, proxy, server  # noqa: F401 - fixtures

TOKENIZER = Path(align.__file__).parent / "assets" / "qwen3-tiny"
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange", "purple")
NUM_IMAGES = 40


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Sums in one order on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def remote_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers keeps the code of exported folders; not the user's own cache."""
    cache = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        patch.syspath_prepend(cache)
        yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/, captions.jsonl, siglip/ and qwen3/ under one folder."""
    return write_world(tmp_path_factory.mktemp("world"))


def write_world(root: Path) -> Path:
    """What `world` is."""
    (root / "images").mkdir()
    lines = []
    for i in range(NUM_IMAGES):
        colour = COLOURS[i % len(COLOURS)]
        image = Image.new("RGB", (40 + i, 40), "grey")
        left = 2 + i % 20
        ImageDraw.Draw(image).rectangle((left, 6, left + 12, 20 + i % 9), fill=colour)
        image.save(root / "images" / f"{i:03d}.png")
        caption = f"a {'large ' * (i % 3)}{colour} square at {left}"
        lines.append({"id": f"s{i}", "images": [f"{i:03d}.png"], "caption": caption})
    write_jsonl(root / "captions.jsonl", lines)
    save_siglip(root / "siglip")
    save_qwen3(root / "qwen3")
    return root


@pytest.fixture(scope="session")
def store(world: Path) -> Store:
    """Features of all images in layer -2: (40, 16, 48) fp16."""
    out = world / "store.zarr"
    extract(
        ExtractOptions(
            model=str(world / "siglip"),
            data=(world / "captions.jsonl",),
            image_root=world / "images",
            out=out,
            shard_images=16,
        )
    )
    return featcache.open(out)


@pytest.fixture(scope="session")
def llm(world: Path) -> FrozenLLM:
    """The small language model in fp32 on the CPU."""
    return load_llm(LLMConfig(name=str(world / "qwen3")), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def make_config(world: Path) -> Callable[..., RunConfig]:
    """A config of a few quick steps; overrides as on the command line."""

    def make(*overrides: str) -> RunConfig:
        return load_config(
            None,
            [
                f"llm.name={world / 'qwen3'}",
                "data.eval_ratio=0.2",
                "connector.num_latents=4",
                "connector.depth=1",
                "connector.heads=2",
                "connector.head_dim=16",
                "optim.lr=3e-3",
                "train.device=cpu",
                "train.steps=6",
                "train.batch_size=4",
                "train.log_every=1",
                "train.eval_every=3",
                "train.save_every=2",
                *overrides,
            ],
        )

    return make


def save_siglip(folder: Path, seed: int = 1, **changes: Any) -> None:
    """A random SigLIP tower with its processor: 32 px in 8-px patches, 16 x 48."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        **changes,
    }
    SiglipVisionModel(SiglipVisionConfig(**settings)).save_pretrained(folder)
    size = {"height": settings["image_size"], "width": settings["image_size"]}
    SiglipImageProcessorPil(size=size).save_pretrained(folder)


def save_qwen3(folder: Path, **changes: Any) -> None:
    """A random Qwen3 of width 64 with the shipped tokenizer, which has Qwen's special tokens."""
    torch.manual_seed(2)
    settings = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        **changes,
    }
    Qwen3ForCausalLM(Qwen3Config(**settings)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)


def write_jsonl(path: Path, lines: list[dict[str, Any]]) -> Path:
    """One object a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def jsonl() -> Callable[[Path, list[dict[str, Any]]], Path]:
    """`write_jsonl`, for tests that make files of their own."""
    return write_jsonl


@pytest.fixture
def save_llm() -> Callable[..., None]:
    """`save_qwen3`, for tests that need another language model."""
    return save_qwen3


@pytest.fixture
def extract_again(world: Path) -> Callable[..., Path]:
    """The same images under an encoder of the same shape with other weights."""

    def make(folder: Path, seed: int) -> Path:
        save_siglip(folder / "siglip", seed=seed)
        extract(
            ExtractOptions(
                model=str(folder / "siglip"),
                data=(world / "captions.jsonl",),
                image_root=world / "images",
                out=folder / "other.zarr",
            )
        )
        return folder / "other.zarr"

    return make
