"""SigLIP + Qwen3 against `LlavaForConditionalGeneration`, as llava_suite.py says."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import (
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import align
from tests.parity.llava_suite import LlavaSuite, Pair, make_pair

TOKENIZER = Path(align.__file__).parent / "assets" / "qwen3-tiny"
IMAGE_TOKEN = "<|image_pad|>"
P = 16


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("qwen3")
    tower = SiglipVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    text = Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return make_pair(
        root,
        SiglipVisionModel(tower),
        Qwen3ForCausalLM(text),
        tokenizer,
        processor,
        strategy="full",
        image_token=IMAGE_TOKEN,
        patches=P,
    )


class TestSiglipAndQwen3(LlavaSuite):
    """Layer -2, all patches ("full")."""
