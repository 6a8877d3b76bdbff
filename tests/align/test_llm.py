"""Loading and freezing a language model, and telling two of them apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.errors import ModelError
from align.llm import LLMConfig, load_llm

CPU = torch.device("cpu")


def test_frozen(world: Path) -> None:
    llm = load_llm(LLMConfig(name=str(world / "qwen3")), CPU, torch.float32)
    assert not any(p.requires_grad for p in llm.model.parameters())
    assert not llm.model.training
    assert llm.hidden_size == 64
    assert llm.image_token_id == llm.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert llm.embedding.weight.shape == llm.head.shape == (512, 64)


def test_identity_is_of_the_weights_not_of_the_path_or_dtype(world: Path, tmp_path: Path) -> None:
    import shutil

    moved = shutil.copytree(world / "qwen3", tmp_path / "elsewhere")
    here = load_llm(LLMConfig(name=str(world / "qwen3")), CPU, torch.float32).identity
    there = load_llm(LLMConfig(name=str(moved)), CPU, torch.bfloat16).identity
    assert {k for k in here if here[k] != there[k]} == {"name"}


def test_another_models_identity_differs(world: Path, tmp_path: Path, save_llm) -> None:  # type: ignore[no-untyped-def]
    save_llm(tmp_path / "wide", hidden_size=32, head_dim=8)
    wide = load_llm(LLMConfig(name=str(tmp_path / "wide")), CPU, torch.float32).identity
    here = load_llm(LLMConfig(name=str(world / "qwen3")), CPU, torch.float32).identity
    assert wide["probe"] != here["probe"]
    assert wide["hidden_size"] == 32
    assert wide["tokenizer"] == here["tokenizer"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_token": "<|nowhere|>"}, r"llm.image_token=<\|nowhere\|>: not a token of .*"),
        ({"name": "/no/such/folder"}, r"llm.name=/no/such/folder: no such folder"),
    ],
)
def test_clear_errors(world: Path, changes: dict[str, str], message: str) -> None:
    config = LLMConfig(**{"name": str(world / "qwen3"), **changes})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=message):
        load_llm(config, CPU, torch.float32)


def test_missing_weights_are_not_filled_with_random_ones(world: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(world / "qwen3", tmp_path / "partial"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors .*layers.1.mlp.up_proj.weight; download"):
        load_llm(LLMConfig(name=str(folder)), CPU, torch.float32)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"llm.name=.*partial: "):
        load_llm(LLMConfig(name=str(folder)), CPU, torch.float32)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"llm.name=.*: ") as caught:
        load_llm(LLMConfig(name=str(tmp_path)), CPU, torch.float32)
    assert "\n" not in str(caught.value)
