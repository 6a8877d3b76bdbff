"""Checkpoints of real architectures with random weights, for tests of several packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)


def save_clip(folder: Path, width: int, seed: int = 4) -> None:
    """A CLIP tower with its processor: 32 px in 8-px patches, 16 x `width`."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)


def save_llama(
    folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 5, **changes: Any
) -> None:
    """A Llama of width 64 with a tokenizer, whose ids it has rows for. changes: of its config."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.1,
        **changes,
    }
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
