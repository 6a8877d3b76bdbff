"""Loading and freezing a language model, and telling two of them apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from align.errors import ModelError
from align.llm import FrozenLLM, LLMConfig, freeze, load_llm

CPU = torch.device("cpu")


def test_frozen(world: Path) -> None:
    llm = load_llm(LLMConfig(name=str(world / "qwen3")), CPU, torch.float32)
    assert not any(p.requires_grad for p in llm.model.parameters())
    assert not llm.model.training
    assert llm.hidden_size == 64
    assert llm.image_token_id == llm.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert llm.embedding.weight.shape == llm.head.shape == (512, 64)


def test_identity_is_of_the_weights_not_of_the_path_or_dtype(world: Path, tmp_path: Path) -> None:
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
    # Advice in several lines is not cut at the end of the first, within its sentence.
    assert not str(caught.value).rstrip().endswith(":")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gemma2", "granite", "llama"])
def test_models_that_do_more_to_their_logits_are_refused(
    llm: FrozenLLM, kind: str, dtype: torch.dtype
) -> None:
    """Random Gemma 2 logits are far below its cap of 30: it must be found all the same."""
    small = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model: PreTrainedModel
    match kind:
        case "gemma2":
            model = Gemma2ForCausalLM(Gemma2Config(**small, head_dim=16))
        case "granite":
            model = GraniteForCausalLM(GraniteConfig(**small, logits_scaling=8.0))
        case _:
            model = LlamaForCausalLM(LlamaConfig(**small))
    if kind == "llama":
        assert freeze(model.to(dtype), llm.tokenizer, LLMConfig()).hidden_size == 32
    else:
        with pytest.raises(ModelError, match=rf"a {kind} scales or caps its logits"):
            freeze(model.to(dtype), llm.tokenizer, LLMConfig())


def test_a_name_that_is_nowhere() -> None:
    with pytest.raises(ModelError) as caught:
        load_llm(LLMConfig(name="nosuchfolder"), CPU, torch.float32)
    start = "llm.name=nosuchfolder: neither a folder nor reachable on the hub: "
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


def test_an_attention_kernel_that_is_none(world: Path) -> None:
    config = LLMConfig(name=str(world / "qwen3"), attention="warp")
    with pytest.raises(ModelError, match=r"^llm.attention=warp: ") as caught:
        load_llm(config, CPU, torch.float32)
    assert "\n" not in str(caught.value)
