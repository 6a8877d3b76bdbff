"""The two tiny checkpoints: what ships loads in plain transformers, and the script remakes it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Qwen3ForCausalLM,
    SiglipModel,
    SiglipVisionModel,
)

import align
import featcache
from align.demo.encoder import hard_retrieval, pixels_of, probe
from align.demo.language import corpus
from align.demo.language_model import copy_accuracy
from align.demo.pretrain import VOCAB_SIZE, pretrain_encoder, pretrain_language_model
from align.demo.shapes import caption, render, sample_scenes
from align.demo.tokenizer import SPECIAL_TOKENS, train_tokenizer

ENCODER = Path(featcache.__file__).parent / "assets" / "siglip-tiny"
LANGUAGE_MODEL = Path(align.__file__).parent / "assets" / "qwen3-tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(LANGUAGE_MODEL / "tokenizer.json"))


def test_the_tokenizer_is_qwens_kind():
    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_MODEL)
    assert type(tokenizer).__name__ in ("Qwen2Tokenizer", "Qwen2TokenizerFast")
    assert tokenizer.eos_token_id == tokenizer.pad_token_id
    assert tokenizer.eos_token == "<|endoftext|>"
    for token in SPECIAL_TOKENS:
        assert tokenizer.convert_ids_to_tokens(tokenizer(token)["input_ids"]) == [token]
    assert len(tokenizer) <= VOCAB_SIZE


@pytest.mark.parametrize(
    "text",
    [
        "a small red circle left of a large blue square",
        "\nDescribe the image in one sentence.\n",
        "naïve 漢字 🙂 3.14\t\r\n  two  spaces",
    ],
)
def test_any_text_round_trips(text):
    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_MODEL)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_word_of_a_caption_is_one_token():
    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_MODEL)
    for scene in sample_scenes(100, np.random.default_rng(0)):
        text = caption(scene)
        assert len(tokenizer(text)["input_ids"]) == len(text.split())


def test_the_shipped_tokenizer_is_the_one_the_script_trains(tokenizer):
    assert train_tokenizer(corpus(0), VOCAB_SIZE).to_str() == tokenizer.to_str()


def test_the_encoder_loads_alone_and_whole():
    pixels = torch.zeros(1, 3, 64, 64)
    vision = SiglipVisionModel.from_pretrained(ENCODER, dtype=torch.float32).eval()
    whole = SiglipModel.from_pretrained(ENCODER, dtype=torch.float32).eval()
    with torch.inference_mode():
        alone = vision(pixels, output_hidden_states=True).hidden_states[-2]
        inside = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    assert alone.shape == (1, 64, 96)
    torch.testing.assert_close(alone, inside, rtol=0, atol=0)


def test_the_saved_processor_does_what_training_did():
    image = render(next(sample_scenes(1, np.random.default_rng(0))), np.random.default_rng(1))
    processor = AutoImageProcessor.from_pretrained(ENCODER, use_fast=False)
    processed = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processed, pixels_of([image]), rtol=0, atol=1e-6)


def test_the_encoder_tells_held_out_captions_from_near_misses(tokenizer):
    model = SiglipModel.from_pretrained(ENCODER, dtype=torch.float32).eval()
    assert hard_retrieval(model, tokenizer, seed=1, count=128) > 0.95


def test_a_linear_probe_reads_every_attribute_from_the_patches():
    model = SiglipModel.from_pretrained(ENCODER, dtype=torch.float32).eval()
    accuracy = probe(model, seed=1)
    assert min(accuracy[name] for name in ("size", "colour", "shape")) > 0.95, accuracy


def test_the_language_model_follows_a_description_of_a_held_out_scene(tokenizer):
    model = Qwen3ForCausalLM.from_pretrained(LANGUAGE_MODEL, dtype=torch.float32).eval()
    assert copy_accuracy(model, tokenizer, seed=1, noise=0.0, count=64) > 0.95


def test_the_same_seed_trains_the_same_weights(tmp_path):
    lines: list[str] = []
    for name in ("a", "b"):
        pretrain_encoder(tmp_path / name / "encoder", 2, 0, lines.append)
        pretrain_language_model(tmp_path / name / "llm", 2, 0, lines.append)
    for part in ("encoder", "llm"):
        first = (tmp_path / "a" / part / "model.safetensors").read_bytes()
        assert first == (tmp_path / "b" / part / "model.safetensors").read_bytes()
    assert lines


@pytest.mark.slow
def test_the_script_writes_both_folders(tmp_path):
    command = [sys.executable, "-m", "align.demo.pretrain", "--out", str(tmp_path), "--steps", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(align.__file__).parents[1]
    )
    assert "retrieval" in done.stderr
    SiglipVisionModel.from_pretrained(tmp_path / "siglip-tiny")
    Qwen3ForCausalLM.from_pretrained(tmp_path / "qwen3-tiny")
