"""What the model sees and learns, id by id, against sequences put together by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import align
from align.data.templates import TemplateConfig, answer
from align.data.tokens import IGNORE, SampleEncoder, describe
from align.errors import TemplateError
from align.llm import FrozenLLM
from featcache.manifests import Record, Turn

SHIPPED_TOKENIZER = Path(align.__file__).parent / "assets" / "qwen3-tiny"
Q = 3
SLOTS = [Q, Q]
PROMPT = "Describe the image in one sentence."


def record(caption: str, images: int = 1, human: str | None = None) -> Record:
    asked = "<image>\n" * images if human is None else human
    keys = tuple(f"{i}.png" for i in range(images))
    return Record("r1", keys, (Turn("human", asked), Turn("gpt", caption)), None, "x:1")


def encoder(llm: FrozenLLM, max_length: int = 100, **template: object) -> SampleEncoder:
    config = TemplateConfig(**template)  # type: ignore[arg-type]
    return SampleEncoder(llm.tokenizer, config, llm.image_token_id, max_length)


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


def test_caption_template(llm: FrozenLLM) -> None:
    sample = encoder(llm).encode(record("a red square", human="What is this?\n<image>"), SLOTS)
    image, eos = llm.image_token_id, llm.tokenizer.eos_token_id
    given = [image] * Q + ids(llm.tokenizer, "\n") + ids(llm.tokenizer, PROMPT + "\n")
    learned = [*ids(llm.tokenizer, "a red square"), eos]
    assert sample.input_ids.tolist() == given + learned
    assert sample.labels.tolist() == [IGNORE] * len(given) + learned
    assert sample.is_slot.tolist() == [True] * Q + [False] * (len(given) + len(learned) - Q)


def test_caption_template_with_two_images(llm: FrozenLLM) -> None:
    sample = encoder(llm).encode(record("Image 1: a. Image 2: b.", images=2), SLOTS)
    line = [llm.image_token_id] * Q + ids(llm.tokenizer, "\n")
    asked = ids(llm.tokenizer, "Describe each image in order, one sentence per image.\n")
    learned = [*ids(llm.tokenizer, "Image 1: a. Image 2: b."), llm.tokenizer.eos_token_id]
    assert sample.input_ids.tolist() == line * 2 + asked + learned
    assert sample.num_supervised == len(learned)


def test_plain_template(llm: FrozenLLM) -> None:
    encode = encoder(llm, name="plain")
    sample = encode.encode(record("a red square", human="Anything at all.\n<image>"), SLOTS)
    learned = ids(llm.tokenizer, "a red square\n")
    assert sample.input_ids.tolist() == [llm.image_token_id] * Q + learned
    assert sample.labels.tolist() == [IGNORE] * Q + learned
    eos, *stops = encode.stop_ids
    assert eos == llm.tokenizer.eos_token_id
    assert set(ids(llm.tokenizer, "\n")) <= set(stops)
    assert all("\n" in llm.tokenizer.decode([stop]) for stop in stops)


def test_a_tokenizer_without_end_of_text(llm: FrozenLLM) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=llm.tokenizer.backend_tokenizer)
    encode = SampleEncoder(bare, TemplateConfig(), llm.image_token_id, 100)
    with pytest.raises(TemplateError, match=r"set template\.supervise_eos=false"):
        encode.encode(record("a cat"), SLOTS)


def test_without_eos(llm: FrozenLLM) -> None:
    sample = encoder(llm, supervise_eos=False).encode(record("a red square"), SLOTS)
    assert sample.labels.tolist()[-1] == ids(llm.tokenizer, "a red square")[-1]


def test_labels_follow_spans_though_eos_is_pad_and_captions_spell_tokens(llm: FrozenLLM) -> None:
    """Qwen3-Base pads with its eos; a caption may contain the image token's very text."""
    assert llm.tokenizer.eos_token_id == llm.tokenizer.pad_token_id
    text = "<|image_pad|> and <|endoftext|>"
    sample = encoder(llm).encode(record(text), SLOTS)
    assert sample.is_slot.sum() == Q
    learned = sample.labels[sample.labels != IGNORE]
    assert learned[-1] == llm.tokenizer.eos_token_id
    assert llm.image_token_id not in learned
    assert (learned[:-1] != llm.tokenizer.eos_token_id).all()
    assert llm.tokenizer.decode(learned[:-1]) == text


def test_prompt_is_what_comes_before_the_answer(llm: FrozenLLM) -> None:
    encode = encoder(llm)
    whole, prompt = (
        encode.encode(record("a cat"), SLOTS),
        encode.encode_prompt(record("a cat"), SLOTS),
    )
    given = int((whole.labels == IGNORE).sum())
    assert prompt.input_ids.tolist() == whole.input_ids[:given].tolist()
    assert (prompt.labels == IGNORE).all()
    bare = Record("b", ("0.png",), (), None, "dir")
    assert encode.encode_prompt(bare, SLOTS).input_ids.tolist() == prompt.input_ids.tolist()


def test_begin_of_text_goes_in_front(llm: FrozenLLM) -> None:
    """A tokenizer that puts a BOS before any text, as Llama's does, gets it before the image."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend = type(llm.tokenizer.backend_tokenizer).from_str(
        llm.tokenizer.backend_tokenizer.to_str()
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 444)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|endoftext|>"
    )
    encode = SampleEncoder(tokenizer, TemplateConfig(name="plain"), llm.image_token_id, 100)
    sample = encode.encode(record("a cat"), SLOTS)
    bos = tokenizer.bos_token_id
    assert sample.input_ids.tolist()[: 1 + Q] == [bos] + [llm.image_token_id] * Q
    assert bos not in sample.input_ids[1:]
    assert sample.labels[0] == IGNORE


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (record("  "), "no caption"),
        (record("a", images=2, human="<image>"), "wrong number of <image>"),
        (record("see <image>"), "<image> in the answer"),
        (Record("x", (), (Turn("gpt", "a"),), None, "x"), "no question"),
    ],
)
def test_records_that_do_not_fit(llm: FrozenLLM, wrong: Record, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        encoder(llm).encode(wrong, SLOTS)


def test_plain_needs_two_turns(llm: FrozenLLM) -> None:
    turns = (Turn("human", "<image>"), Turn("gpt", "a"), Turn("human", "b"), Turn("gpt", "c"))
    with pytest.raises(TemplateError, match="exactly one question"):
        encoder(llm, name="plain").encode(Record("x", ("0.png",), turns, None, "x"), SLOTS)


def test_placeholder_is_added_where_missing(llm: FrozenLLM) -> None:
    with_it = encoder(llm).encode(record("a cat"), SLOTS)
    without = encoder(llm).encode(record("a cat", human="no placeholder"), SLOTS)
    assert with_it.input_ids.tolist() == without.input_ids.tolist()


def test_truncation_takes_the_answers_end_and_never_an_image(llm: FrozenLLM) -> None:
    whole = encoder(llm).encode(record("a red square on a grey ground"), SLOTS)
    given = int((whole.labels == IGNORE).sum())
    cut = encoder(llm, max_length=given + 2).encode(record("a red square on a grey ground"), SLOTS)
    assert cut.input_ids.tolist() == whole.input_ids[: given + 2].tolist()
    assert cut.num_supervised == 2
    for too_short in (given, Q, Q - 1):
        with pytest.raises(TemplateError, match=f"fill data.max_length={too_short}"):
            encoder(llm, max_length=too_short).encode(record("a red square"), SLOTS)


def test_describe_shows_text_slots_and_target(llm: FrozenLLM) -> None:
    view = describe(record("a red square", images=2), encoder(llm), [Q, Q])
    asked = "Describe each image in order, one sentence per image."
    assert view.text == (
        f"<image 1 x 3>\n<image 2 x 3>\n{asked}\na red square{llm.tokenizer.eos_token}"
    )
    assert view.target == f"a red square{llm.tokenizer.eos_token}"
    slots = [t.token for t in view.tokens if t.is_slot]
    assert slots == ["<image 1>"] * 3 + ["<image 2>"] * 3
    assert not any(t.is_slot and t.is_supervised for t in view.tokens)
    assert len(view.tokens) == len(
        encoder(llm).encode(record("a red square", images=2), SLOTS).input_ids
    )


def test_answer_is_the_first_reply() -> None:
    assert answer(record(" a cat \n")) == "a cat"
    assert answer(Record("x", (), (), None, "x")) == ""


def test_dtypes(llm: FrozenLLM) -> None:
    sample = encoder(llm).encode(record("a"), SLOTS)
    assert (sample.input_ids.dtype, sample.is_slot.dtype) == (np.int64, np.bool_)


@pytest.mark.parametrize("name", ["caption", "plain"])
@pytest.mark.parametrize("text", ["a red square.", "a red square", "What?!", "naïve (two).", "."])
def test_a_references_own_tokens_say_the_reference(name: str, text: str) -> None:
    """With the shipped tokenizer, one of whose tokens is a full stop with its newline."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_TOKENIZER)
    encode = SampleEncoder(tokenizer, TemplateConfig(name=name), 0, 100)
    sample = encode.encode(record(text), SLOTS)
    learned = sample.labels[sample.labels != IGNORE].tolist()
    assert encode.answer_text(learned) == text
    # What a model goes on to say after the end is not part of the answer.
    assert encode.answer_text([*learned, *ids(tokenizer, " and more")]) == text


def test_a_token_that_ends_the_answer_keeps_what_it_holds_before_the_end(llm: FrozenLLM) -> None:
    encode = encoder(llm, name="plain")
    decode = llm.tokenizer.decode
    joined = [i for i in encode.stop_ids[1:] if decode([i]).index("\n") > 0]
    for stop in joined:
        said = encode.answer_text([*ids(llm.tokenizer, "a cat"), stop])
        assert said == ("a cat" + decode([stop]).split("\n")[0]).strip()
    newline = ids(llm.tokenizer, "\n")
    assert encode.answer_text([*ids(llm.tokenizer, "a cat."), *newline]) == "a cat."


TEXT_ONLY = Record("x", (), (Turn("human", "Say hello."), Turn("gpt", "Hello.")), None, "x:1")


def test_text_without_images_is_asked_its_own_question(llm: FrozenLLM) -> None:
    sample = encoder(llm).encode(TEXT_ONLY, [])
    learned = [*ids(llm.tokenizer, "Hello."), llm.tokenizer.eos_token_id]
    assert sample.input_ids.tolist() == ids(llm.tokenizer, "Say hello.\n") + learned
    assert sample.num_supervised == len(learned) and not sample.is_slot.any()


def test_the_plain_template_needs_an_image(llm: FrozenLLM) -> None:
    with pytest.raises(TemplateError, match='"plain" needs an image'):
        encoder(llm, name="plain").encode(TEXT_ONLY, [])
