"""LLaVA-1.5: CLIP without its class token + Llama, as llava_suite.py says; its sequences, and a
Llama checkpoint and a CLIP store through our whole program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from align.config import load_config
from align.data.templates import TemplateConfig
from align.data.tokens import IGNORE, SampleEncoder
from align.live import caption_images
from align.run import load_run, load_speaker
from align.trainer import train
from featcache.manifests import Record, Turn
from tests.parity.llava_suite import ANSWERS, LlavaSuite, Pair, make_pair

IMAGE_TOKEN = "<0x00>"
"""A byte that no caption has; Vicuna has no token of its own for images."""
P = 16


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: BPE over pieces that begin with a metaspace, bytes for what it does not know, and
    a begin-of-text token in front of every text."""
    pieces = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    pieces.train_from_iterator(ANSWERS.values(), trainer)
    trained = Tokenizer.from_str(pieces.to_str())
    trained.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trained.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("llama")
    tower = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    tokenizer = llama_tokenizer()
    text = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    language_model = LlamaForCausalLM(text)
    pair = make_pair(
        root,
        CLIPVisionModel(tower),
        language_model,
        tokenizer,
        processor,
        strategy="default",
        image_token=IMAGE_TOKEN,
        patches=P,
    )
    language_model.save_pretrained(root / "llama")
    tokenizer.save_pretrained(root / "llama")
    return pair


class TestClipAndLlama(LlavaSuite):
    """Layer -2, the class token dropped ("default")."""


def original_ids(tokenizer: PreTrainedTokenizerFast, prompt: str, image_token: int) -> list[int]:
    """LLaVA's way (RECIPES section 2): every chunk between images tokenised as a text of its own,
    with its begin-of-text token; of these only the first is kept."""
    chunks = [tokenizer(chunk).input_ids for chunk in prompt.split("<image>")]
    ids = [tokenizer.bos_token_id]
    for number, chunk in enumerate(chunks):
        assert chunk[0] == tokenizer.bos_token_id
        ids += [image_token] * P * (number > 0) + chunk[1:]
    return ids


@pytest.mark.parametrize("answer", [*ANSWERS.values(), "a café, 3 € – 100 %", "<s></s>"])
def test_plain_sequences_are_the_originals(pair: Pair, answer: str) -> None:
    """`<image>` + caption + newline: the image at position 1, begin-of-text and image not learned,
    caption and newline learned, no end of text."""
    llm = pair.ours.llm
    encoder = SampleEncoder(llm.tokenizer, TemplateConfig(name="plain"), llm.image_token_id, 500)
    turns = (Turn("human", "<image>\nWhat is it?"), Turn("gpt", answer))
    sample = encoder.encode(Record("0", ("0.png",), turns, None, "x:1"), [P])
    if "<s>" in answer:  # the original would make tokens of what a caption spells; we do not
        start = [1, *[llm.image_token_id] * P]
        assert sample.input_ids[: P + 1].tolist() == start
        assert not {1, 2} & set(sample.input_ids[P + 1 :].tolist())
        return
    expected = original_ids(llm.tokenizer, f"<image>{answer}\n", llm.image_token_id)
    assert sample.input_ids.tolist() == expected
    assert sample.is_slot.tolist() == [1 <= t <= P for t in range(len(expected))]
    assert sample.labels.tolist() == [IGNORE] * (1 + P) + expected[1 + P :]
    newline = llm.tokenizer.convert_tokens_to_ids("<0x0A>")
    assert expected[0] == 1 and expected[-1] == newline


def test_whole_program(pair: Pair, tmp_path: Path) -> None:
    """A Llama checkpoint folder and a CLIP store: trained, loaded, and captioning live."""
    config = load_config(
        None,
        [
            f"llm.name={pair.root / 'llama'}",
            f"llm.image_token={IMAGE_TOKEN}",
            "connector.name=mlp",
            "template.name=plain",
            "data.eval_ratio=0",
            "data.max_images=null",
            "eval.max_new_tokens=4",
            "train.device=cpu",
            "train.steps=2",
            "train.batch_size=2",
        ],
    )
    store = pair.store("fp16")
    result = train(config, [store], tmp_path / "run")
    assert result.step == 2
    run = load_run(tmp_path / "run")
    before = pair.ours.llm.model.state_dict()
    frozen = run.model.llm.model.state_dict()
    assert all(torch.equal(frozen[name], before[name]) for name in before)
    run.close()
    speaker = load_speaker(tmp_path / "run")
    (said,) = caption_images(speaker, [pair.root / "0.png"])
    assert isinstance(said, str)
