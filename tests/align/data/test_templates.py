"""What each template writes, id by id, by hand; and against whole-string tokenising, as the
originals do it.

Sequences are written as (id, is supervised), a position each.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

import align
from align.data.templates import TEMPLATES, TemplateConfig, render
from align.data.tokens import IGNORE, SampleEncoder, TokenizedSample, check_template, describe
from align.errors import TemplateError
from featcache.errors import ConfigError
from featcache.manifests import Record, Turn
from tests.support_tokenizers import QWEN_IMAGE, llama2, llama3, qwen3

SHIPPED = Path(align.__file__).parent / "assets" / "qwen3-tiny"
CHATS = [name for name, template in TEMPLATES.items() if template.is_conversation]
Q = 2
PATCH = 777777  # what slots carry where the tokenizer has no image token

NEWLINE, END_OF_TEXT, IM_START, IM_END = 198, 151643, 151644, 151645
SYSTEM, USER, ASSISTANT = 8948, 872, 77091
YOU_ARE_A_HELPFUL_ASSISTANT = [2610, 525, 264, 10950, 17847, 13]
A, B, C, Y, DOT, QUESTION_MARK, BLANK = 32, 33, 34, 56, 13, 30, 220

Row = list[tuple[int, bool]]


def said(*texts: str, images: int = 1, system: str | None = None) -> Record:
    """A conversation: questions and answers in turn."""
    roles = ("human", "gpt")
    turns = [Turn(roles[i % 2], text) for i, text in enumerate(texts)]
    if system is not None:
        turns.insert(0, Turn("system", system))
    return Record("r", tuple(f"{i}.png" for i in range(images)), tuple(turns), None, "x:1")


class EqualImages(SampleEncoder):
    """With so many slots for each image."""

    def __init__(self, tokenizer, config, q, image_token_id, max_length) -> None:
        super().__init__(tokenizer, config, image_token_id, max_length)
        self.q = q

    def encode(self, record, slots=None):
        return super().encode(record, slots or [self.q] * len(record.images))

    def encode_prompt(self, record, slots=None):
        return super().encode_prompt(record, slots or [self.q] * len(record.images))


def encoder(
    tokenizer: PreTrainedTokenizerBase, max_length: int = 1000, q: int = Q, **template: object
) -> SampleEncoder:
    config = TemplateConfig(**template)  # type: ignore[arg-type]
    assert list(config.problems()) == []
    image = tokenizer.get_vocab().get("<|image_pad|>", PATCH)
    return EqualImages(tokenizer, config, q, image, max_length)


def rows(sample: TokenizedSample) -> Row:
    return [
        (int(i), bool(label != IGNORE))
        for i, label in zip(sample.input_ids, sample.labels, strict=True)
    ]


def given(*ids: int) -> Row:
    return [(i, False) for i in ids]


def learned(*ids: int) -> Row:
    return [(i, True) for i in ids]


# --- plain and caption


@pytest.mark.parametrize("question", ["<image>\nWhat?", "What?\n<image>", "What?"])
def test_plain_without_begin_of_text(question: str) -> None:
    sample = encoder(qwen3(), name="plain").encode(said(question, "A B"))
    assert rows(sample) == [
        *given(QWEN_IMAGE, QWEN_IMAGE),
        *learned(A, BLANK, B, NEWLINE),
    ]


def test_plain_with_begin_of_text() -> None:
    """The image at position 1. SentencePiece puts its blank before each text, as in LLaVA."""
    sample = encoder(llama2(), name="plain").encode(said("<image>\nWhat?", "A."))
    assert rows(sample) == [
        *given(1, PATCH, PATCH),
        *learned(319, 29889, 13),  # "▁A", ".", "<0x0A>"
    ]
    sample = encoder(llama3(), name="plain").encode(said("<image>\nWhat?", "A."))
    assert rows(sample) == [*given(128000, PATCH, PATCH), *learned(A, 627)]  # "A", ".\n"


def test_plain_keeps_the_captions_blanks() -> None:
    """The original does not strip: nothing is added to or taken from the caption."""
    sample = encoder(qwen3(), name="plain").encode(said("<image>", " A "))
    assert rows(sample)[Q:] == learned(BLANK, A, BLANK, NEWLINE)


def test_caption() -> None:
    encode = encoder(qwen3(), prompt="A?", prompt_many="B?")
    assert rows(encode.encode(said("<image>\nanything", " C.\n"))) == [
        *given(QWEN_IMAGE, QWEN_IMAGE, NEWLINE, A, QUESTION_MARK, NEWLINE),
        *learned(C, DOT, END_OF_TEXT),
    ]
    assert rows(encode.encode(said("", "C.", images=2))) == [
        *given(QWEN_IMAGE, QWEN_IMAGE, NEWLINE, QWEN_IMAGE, QWEN_IMAGE, NEWLINE),
        *given(B, QUESTION_MARK, NEWLINE),
        *learned(C, DOT, END_OF_TEXT),
    ]
    # Without a prompt the record's question takes its place, as in the flagship's trial run.
    own = encoder(qwen3(), prompt="").encode(said("Y?\n<image>", "C."))
    assert rows(own)[Q:] == [
        *given(NEWLINE, Y, QUESTION_MARK, NEWLINE),
        *learned(C, DOT, END_OF_TEXT),
    ]
    # Where there is no image, its own question stands in the prompt's place.
    assert rows(encode.encode(said("Y?", "C.", images=0))) == [
        *given(Y, QUESTION_MARK, NEWLINE),
        *learned(C, DOT, END_OF_TEXT),
    ]


# --- ChatML

QWEN_HEAD = given(
    *[IM_START, SYSTEM, NEWLINE, *YOU_ARE_A_HELPFUL_ASSISTANT, IM_END, NEWLINE],
    *[IM_START, USER, NEWLINE],
)


def test_qwen() -> None:
    sample = encoder(qwen3(), name="qwen").encode(said("<image>\nA?", "B."))
    assert rows(sample) == [
        *QWEN_HEAD,
        *given(QWEN_IMAGE, QWEN_IMAGE, NEWLINE, A, QUESTION_MARK, IM_END, NEWLINE),
        *given(IM_START, ASSISTANT, NEWLINE),
        *learned(B, DOT, IM_END),
        *given(NEWLINE),
    ]
    assert sample.num_supervised == 3


def test_qwen_string_is_that_of_the_original() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    view = describe(said("<image>\n{prompt}", "{answer}"), encoder(tokenizer, name="qwen"), [Q, Q])
    assert view.text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<image 1 x 2>\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    )
    assert view.target == "{answer}<|im_end|>"


def test_qwen_cambrian_mask() -> None:
    """The whole turn of the assistant, and 198, <|im_start|> and <|im_end|> everywhere; 271 and
    624 hold newlines too, and are not unmasked.
    """
    sample = encoder(qwen3(), name="qwen", mask="cambrian").encode(
        said("<image>\nA\n\nB.\nC", "B.")
    )
    assert rows(sample) == [
        *learned(IM_START),
        *given(SYSTEM),
        *learned(NEWLINE),
        *given(*YOU_ARE_A_HELPFUL_ASSISTANT),
        *learned(IM_END, NEWLINE, IM_START),
        *given(USER),
        *learned(NEWLINE),
        *given(QWEN_IMAGE, QWEN_IMAGE),
        *learned(NEWLINE),
        *given(A, 271, B, 624, C),
        *learned(IM_END, NEWLINE),
        *learned(IM_START, ASSISTANT, NEWLINE, B, DOT, IM_END, NEWLINE),
    ]
    # Nothing stands before the first position to predict it from.
    assert sample.num_supervised == sum(is_learned for _, is_learned in rows(sample)) - 1


def test_cambrian_mask_does_not_supervise_slots_that_carry_such_a_token() -> None:
    config = TemplateConfig(name="qwen", mask="cambrian")
    sample = EqualImages(qwen3(), config, Q, IM_END, 100).encode(said("<image>\nA?", "B."))
    assert sample.is_slot.sum() == Q
    assert (sample.labels[sample.is_slot] == IGNORE).all()


def test_qwen_with_several_turns_and_images() -> None:
    record = said("<image>\nA?", "B.", "A <image>", "C", images=2, system="Y")
    assert rows(encoder(qwen3(), name="qwen").encode(record)) == [
        *given(IM_START, SYSTEM, NEWLINE, Y, IM_END, NEWLINE, IM_START, USER, NEWLINE),
        *given(QWEN_IMAGE, QWEN_IMAGE, NEWLINE, A, QUESTION_MARK, IM_END, NEWLINE),
        *given(IM_START, ASSISTANT, NEWLINE),
        *learned(B, DOT, IM_END),
        *given(NEWLINE, IM_START, USER, NEWLINE),
        *given(QWEN_IMAGE, QWEN_IMAGE, NEWLINE, A, IM_END, NEWLINE),
        *given(IM_START, ASSISTANT, NEWLINE),
        *learned(C, IM_END),
        *given(NEWLINE),
    ]


def test_chatml_direct_has_no_newline_between_turns() -> None:
    encode = encoder(qwen3(), name="chatml_direct", system="Y")
    assert rows(encode.encode(said("<image>\nA?", "B."))) == [
        *given(IM_START, SYSTEM, NEWLINE, Y, IM_END, IM_START, USER, NEWLINE),
        *given(QWEN_IMAGE, QWEN_IMAGE, NEWLINE, A, QUESTION_MARK, IM_END),
        *given(IM_START, ASSISTANT, NEWLINE),
        *learned(B, DOT, IM_END),
    ]


# --- Vicuna and Llama 3

VICUNA_USER = (3148, 1001, 29901)  # "▁US", "ER", ":"
VICUNA_ASSISTANT = (319, 1799, 9047, 13566, 29901)  # "▁A", "SS", "IST", "ANT", ":"


def test_vicuna_v1() -> None:
    """ "SS USER: " <image> "\\nA? ASSISTANT: A.</s>": the blank before an answer is part of it."""
    encode = encoder(llama2(), name="vicuna_v1", system="SS")
    assert rows(encode.encode(said("<image>\nA?", "A."))) == [
        *given(1, 29871, 1799, *VICUNA_USER, 29871),
        *given(PATCH, PATCH),
        *given(29871, 13, 29909, 29973, *VICUNA_ASSISTANT),
        *learned(319, 29889, 2),
    ]


def test_vicuna_v1_answer_whose_blank_is_a_token() -> None:
    sample = encoder(llama2(), name="vicuna_v1").encode(said("<image>\nA?", "S"))
    assert rows(sample)[-4:] == [*given(29901), *learned(29871, 29903, 2)]


def test_vicuna_v1_goes_on_without_a_blank_after_the_end_of_a_turn() -> None:
    encode = encoder(llama2(), name="vicuna_v1", system="")
    assert rows(encode.encode(said("A?", "A.", "A?", "A.", images=0))) == [
        *given(1, *VICUNA_USER, 319, 29973, *VICUNA_ASSISTANT),
        *learned(319, 29889, 2),
        *given(3308, 1001, 29901, 319, 29973, *VICUNA_ASSISTANT),  # "US", "ER"
        *learned(319, 29889, 2),
    ]


def test_vicuna_v1_string_is_that_of_the_original() -> None:
    view = describe(said("A\n<image>", "B"), encoder(llama2(), name="vicuna_v1"), [Q, Q])
    # The blank that SentencePiece puts in front of a text is a token here, so it shows.
    assert view.text.replace("<s> ", "") == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: "
        "<image 1 x 2> \nA ASSISTANT: B</s>"
    )


def test_llama_v3() -> None:
    """Begin-of-text once, though template and tokenizer both have it; no blank lines."""
    encode = encoder(llama3(), name="llama_v3", system="Y")
    start, end, stop = 128006, 128007, 128009
    assert rows(encode.encode(said("<image>\nA?", "B.", "C", "\n\nA"))) == [
        *given(128000, start, 9125, end, Y, stop),
        *given(start, 882, end, PATCH, PATCH, NEWLINE, A, QUESTION_MARK, stop),
        *given(start, 78191, end),
        *learned(B, DOT, stop),
        *given(start, 882, end, C, stop),
        *given(start, 78191, end),
        *learned(271, A, stop),
    ]


def test_cambrian_1_system_text() -> None:
    (system,) = [
        part.text
        for part in render(said("A", "B"), TemplateConfig(name="llama_v3"))
        if getattr(part, "text", "").startswith("You are Cambrian")
    ]
    assert system.count("\n    ") == system.count("\n") == 2
    assert ". \n    As a multimodal" in system
    assert system.endswith("open-ended questions. ")


# --- the tokenizer's own chat template

THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
LLAMA_3 = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}\
<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
WRITERS = {
    "thinking": lambda: qwen3(THINKING),
    "llama2": lambda: llama2(LLAMA_2),
    "llama3": lambda: llama3(LLAMA_3),
    "shipped": lambda: AutoTokenizer.from_pretrained(SHIPPED),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "record",
    [
        said("A?", "B.", images=0),
        said(" A? ", " \nB.\n", "C <b>é</b>\n\n?", "...\nA  B", images=0),
    ],
    ids=["one turn", "two turns"],
)
def test_chat_is_what_the_tokenizer_itself_makes_of_it(writer: str, record: Record) -> None:
    tokenizer = WRITERS[writer]()
    encode = encoder(tokenizer, name="chat")
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn.role], "content": turn.text.strip()} for turn in record.turns]
    options = {"tokenize": True, "return_dict": False, "enable_thinking": False}
    whole = tokenizer.apply_chat_template(messages, **options)
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, **options)
    sample = encode.encode(record)
    assert sample.input_ids.tolist() == whole
    assert encode.encode_prompt(record).input_ids.tolist() == asked

    answers = [turn.text.strip() for turn in record.turns if turn.role == "gpt"]
    if len(answers) == 1:
        assert np.flatnonzero(sample.labels != IGNORE)[0] == len(asked)
    ends = {"llama2": "</s>", "llama3": "<|eot_id|>"}
    end = ends.get(writer, "<|im_end|>")
    target = tokenizer.decode(sample.labels[sample.labels != IGNORE])
    assert [text.strip() for text in target.split(end)] == [*answers, ""]
    assert encode.answer_text(sample.labels[sample.labels != IGNORE]) == answers[0]
    assert tokenizer.convert_tokens_to_ids(end) in encode.stop_ids


def test_chat_puts_the_image_where_the_text_has_it() -> None:
    tokenizer = WRITERS["shipped"]()
    text = "\n<|image_pad|>\nWhat is it?"
    messages = [{"role": "user", "content": text.strip()}, {"role": "assistant", "content": "Y"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    sample = encoder(tokenizer, q=1, name="chat").encode(said("What is it?\n<image>", "Y"))
    assert sample.input_ids.tolist() == expected
    assert sample.is_slot.sum() == 1


def test_chat_system() -> None:
    encode = encoder(qwen3(THINKING), name="chat", system="Y")
    expected = given(IM_START, SYSTEM, NEWLINE, Y, IM_END, NEWLINE, IM_START, USER, NEWLINE)
    assert rows(encode.encode(said("<image>", "B")))[: len(expected)] == expected


def test_offsets_that_come_without_their_blanks() -> None:
    """Llama 3's post-processor takes them off: the blank before B would stand at B's place."""
    template = "{% for m in messages %}{{ m.content }}" + (
        "{{ ' ' if m.role == 'user' else '<|eot_id|>' }}{% endfor %}"
    )
    encode = encoder(llama3(template), name="chat")
    assert rows(encode.encode(said("A", "B", images=0))) == [
        *given(A, BLANK),
        *learned(B, 128009),
    ]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template: take another template"),
        ("{{ messages | length }}<|im_end|>", "does not write every text once"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "does not write every text once"),
        ("{% for m in messages %}{{ m.content }}.{% endfor %}", "no special token, so that"),
        ("{% for m in messages %}{{ m.content[:3] }}<|im_end|>{% endfor %}", "changes the text"),
        ("{{ raise_exception('roles must alternate') }}", "says: roles must alternate"),
        ("{% if nothing %", "says: "),
        ("{% for m in messages %}{{ '' + m.content + ['text'] }}{% endfor %}", "says: can only"),
        (
            "{% if add_generation_prompt %}!{% endif %}"
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            "begins answers in another way",
        ),
    ],
)
def test_a_chat_template_that_cannot_be_followed(template: str | None, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        check_template(qwen3(template), TemplateConfig(name="chat"))
    assert str(caught.value).startswith("template.name=chat: ")
    assert "\n" not in str(caught.value)


def test_a_chat_template_that_cannot_do_one_conversation() -> None:
    """Found for the record, and counted; the run goes on with the others."""
    tokenizer = qwen3(THINKING.replace("| trim", "| replace('Y', '')"))
    check_template(tokenizer, TemplateConfig(name="chat"))
    with pytest.raises(TemplateError, match="changes the text it is given"):
        encoder(tokenizer, name="chat").encode(said("<image>", "Y"))


TOKENIZERS = {
    "qwen": qwen3,
    "chatml_direct": qwen3,
    "vicuna_v1": llama2,
    "llama_v3": llama3,
    "chat": lambda: qwen3(THINKING),
}


# --- spans


def whole_string(encode: SampleEncoder, text: str) -> list[int]:
    """Tokenised as the originals do it: the string split at its images, special tokens parsed."""
    ids: list[int] = []
    for i, chunk in enumerate(text.split("<image>")):
        ids += [encode.image_token_id] * Q if i else []
        ids += encode.tokenizer(chunk, add_special_tokens=False).input_ids
    return ids


def written(rng: random.Random, ends: bool = True) -> str:
    """Letters among newlines, blanks and marks, which is where tokenizers join."""
    text = "".join(rng.choices("ab \n\n.,?!'s1é", k=rng.randint(1, 12))) + "a"
    return text if ends else text.strip()


@pytest.mark.parametrize(
    ("make", "joined"), [(qwen3, 100), (lambda: AutoTokenizer.from_pretrained(SHIPPED), 0)]
)
def test_ids_are_those_of_the_whole_string(make, joined: int) -> None:  # type: ignore[no-untyped-def]
    """300 conversations whose turns begin and end in newlines, blanks and marks.

    joined: how many answers at least begin with what Qwen's vocabulary joins to the newline before
    them; tokenised apart, segment by segment, they would get other ids than the original has.
    """
    encode = encoder(make(), name="qwen")
    rng = random.Random(0)
    other_apart = 0
    for _ in range(300):
        question, reply, again, last = (written(rng) for _ in range(4))
        last = rng.choice(["", "\n"]) + last
        record = said(f"<image>\n{question}", reply, again, last)
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n<image>\n{question.strip()}<|im_end|>\n"
            f"<|im_start|>assistant\n{reply}<|im_end|>\n<|im_start|>user\n{again}<|im_end|>\n"
            f"<|im_start|>assistant\n{last}<|im_end|>\n"
        )
        sample = encode.encode(record)
        assert sample.input_ids.tolist() == whole_string(encode, text)
        learned_ids = sample.labels[sample.labels != IGNORE]
        assert encode.tokenizer.decode(learned_ids).endswith(f"{last}<|im_end|>")
        header, answer, both = encode.tokenizer(
            ["assistant\n", last, f"assistant\n{last}"], add_special_tokens=False
        ).input_ids
        other_apart += header + answer != both
    assert other_apart >= joined


@pytest.mark.parametrize("name", CHATS)
def test_answers_that_begin_with_a_letter_begin_a_token(name: str) -> None:
    """So generation, which is given the header alone, starts from what was trained on."""
    encode = encoder(TOKENIZERS[name](), name=name)
    rng = random.Random(2)
    for _ in range(100):
        record = said("A?", "a" + written(rng))
        sample, prompt = encode.encode(record), encode.encode_prompt(record)
        first = len(prompt.input_ids)
        assert sample.input_ids[:first].tolist() == prompt.input_ids.tolist()
        assert (sample.labels[:first] == IGNORE).all()
        assert sample.labels[first] != IGNORE


def test_cambrian_mask_is_the_originals() -> None:
    """The original's rule written out, turn by turn over the whole turn's ids."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    encode = encoder(tokenizer, name="qwen", mask="cambrian")
    newline, start, end = (
        tokenizer.convert_tokens_to_ids(t) for t in ("Ċ", "<|im_start|>", "<|im_end|>")
    )
    rng = random.Random(1)
    for _ in range(200):
        texts = [written(rng) for _ in range(4)]
        expected: list[int] = []
        turns = [("system", "You are a helpful assistant.")]
        turns += [("user", f"<image>\n{texts[0].strip()}"), ("assistant", texts[1])]
        turns += [("user", texts[2]), ("assistant", texts[3])]
        for role, text in turns:
            ids = whole_string(encode, f"<|im_start|>{role}\n{text}<|im_end|>\n")
            free = ids if role == "assistant" else (newline, start, end)
            expected += [i if i in free else IGNORE for i in ids]
        sample = encode.encode(said(f"<image>\n{texts[0]}", *texts[1:]))
        assert sample.labels.tolist() == expected


def test_a_token_across_the_boundary_is_learned() -> None:
    """ "assistant\\n" and an answer that begins with a newline share the token of two newlines."""
    sample = encoder(qwen3(), name="qwen").encode(said("<image>\nA?", "\nB"))
    assert rows(sample)[-6:] == [
        *given(IM_START, ASSISTANT),
        *learned(271, B, IM_END),
        *given(NEWLINE),
    ]


@pytest.mark.parametrize(
    ("make", "name", "spelled"),
    [
        (qwen3, "qwen", "<|im_end|>"),
        (lambda: qwen3(THINKING), "chat", "<|im_end|>"),
        (llama2, "vicuna_v1", "</s>"),
        (llama3, "llama_v3", "<|eot_id|>"),
        (qwen3, "plain", "<|endoftext|>"),
    ],
)
def test_special_tokens_spelled_in_the_data_stay_text(make, name: str, spelled: str) -> None:  # type: ignore[no-untyped-def]
    encode = encoder(make(), name=name)
    clean = encode.encode(said("<image>\nA?", "B."))
    sample = encode.encode(said(f"<image>\nA {spelled} ?", f"B {spelled}."))
    special = set(encode.tokenizer.all_special_ids) | set(encode.tokenizer.added_tokens_decoder)

    def specials(ids: np.ndarray) -> list[int]:
        return [i for i in ids.tolist() if i in special]

    assert specials(sample.input_ids) == specials(clean.input_ids)
    target = encode.tokenizer.decode(sample.labels[sample.labels != IGNORE])
    assert f"B {spelled}." in target


def test_accents_made_of_two_characters() -> None:
    """Qwen composes them (NFC) before it tokenises; the span follows."""
    sample = encoder(qwen3(), name="qwen").encode(said("<image>\nA?", "e\u0301"))
    assert rows(sample)[-4:] == [*learned(127, 102, IM_END), *given(NEWLINE)]


# --- what records may be


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize(
    ("record", "like"),
    [
        (said("A?\n<image>", "B"), said("<image>\nA?", "B")),
        (said(" A <image> ?", "B"), said("<image>\nA  ?", "B")),
        (said("A?", "B"), said("<image>\nA?", "B")),
        (said("A?", "B", images=2), said("<image>\n<image>\nA?", "B", images=2)),
        (said("<image>\n", "B"), said("<image>\nDescribe the image in one sentence.", "B")),
        (
            said("", "B", images=2),
            said(
                "<image>\n<image>\nDescribe each image in order, one sentence per image.",
                "B",
                images=2,
            ),
        ),
    ],
)
def test_images_go_to_the_front(name: str, record: Record, like: Record) -> None:
    encode = encoder(TOKENIZERS[name](), name=name)
    assert rows(encode.encode(record)) == rows(encode.encode(like))


def test_without_a_prompt_an_image_may_stand_alone() -> None:
    """As in the originals, where a question has no words."""
    sample = encoder(qwen3(), name="qwen", prompt="", system="").encode(said("<image>\n", "B"))
    assert rows(sample)[:8] == given(
        IM_START, USER, NEWLINE, QWEN_IMAGE, QWEN_IMAGE, IM_END, NEWLINE, IM_START
    )


@pytest.mark.parametrize("name", CHATS)
def test_several_images_of_a_turn_stay_where_the_text_speaks_of_them(name: str) -> None:
    encode = encoder(TOKENIZERS[name](), name=name)
    sample = encode.encode(said("A <image> B <image>?", "C", images=2))
    assert sample.is_slot.sum() == 2 * Q
    text = describe(said("A <image> B <image>?", "C", images=2), encode, [Q, Q]).text
    assert re.search(r"A +<image 1 x 2> +B +<image 2 x 2> ?\?", text)


@pytest.mark.parametrize("name", CHATS)
def test_a_first_answer_without_a_question_is_dropped(name: str) -> None:
    encode = encoder(TOKENIZERS[name](), name=name)
    whole = said("A?", "B")
    turns = (Turn("gpt", "Hello."), *whole.turns)
    record = Record("r", whole.images, turns, None, "x")
    assert rows(encode.encode(record)) == rows(encode.encode(whole))


@pytest.mark.parametrize("name", CHATS)
def test_generation_starts_with_the_header_of_the_answer(name: str) -> None:
    encode = encoder(TOKENIZERS[name](), name=name)
    whole = encode.encode(said("A?", "B."))
    prompt = encode.encode_prompt(said("A?", "B.", "C", "A"))
    first = int(np.flatnonzero(whole.labels != IGNORE)[0])
    assert prompt.input_ids.tolist() == whole.input_ids[:first].tolist()
    assert (prompt.labels == IGNORE).all()
    assert rows(encode.encode_prompt(said("A?"))) == rows(prompt)
    # An image of a directory is asked the config's question.
    bare = Record("b", ("0.png",), (), None, "dir")
    asked = said("Describe the image in one sentence.", "?")
    assert rows(encode.encode_prompt(bare)) == rows(encode.encode_prompt(asked))


def test_generation_does_not_depend_on_the_mask() -> None:
    prompts = [
        encoder(qwen3(), name="qwen", mask=mask).encode_prompt(said("A?", "B."))
        for mask in ("assistant", "cambrian")
    ]
    assert rows(prompts[0]) == rows(prompts[1])


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("qwen", [END_OF_TEXT, IM_END]),
        ("chatml_direct", [END_OF_TEXT, IM_END]),
        ("chat", [END_OF_TEXT, IM_END]),
        ("vicuna_v1", [2]),
        ("llama_v3", [128001, 128009]),
    ],
)
def test_what_ends_an_answer(name: str, stop: list[int]) -> None:
    encode = encoder(TOKENIZERS[name](), name=name)
    assert list(encode.stop_ids) == stop
    sample = encode.encode(said("A?", "S. A."))
    target = sample.labels[sample.labels != IGNORE].tolist()
    assert target[-1] == stop[-1]
    assert encode.answer_text([*target, *target]) == "S. A."
    assert encode.answer_text(target[:-1]) == "S. A."


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (said("A?", "B", "C"), "the last question has no answer"),
        (said("A?"), "no answer"),
        (said("A?", "B", "C", " \n"), "an empty answer"),
        (said("A?", "B <image>"), "<image> in the answer"),
        (said("<image>", "B", images=2), "wrong number of <image>"),
        (said("<image><image>", "B", images=1), "wrong number of <image>"),
        (said("<image>", "B", images=0), "wrong number of <image>"),
        (said("A?", "B", system="<image>"), "<image> in a system turn"),
        (said("", "B", images=0), "no question"),
        (
            Record("r", (), (Turn("human", "A"), Turn("human", "B")), None, "x"),
            "questions and answers do not take turns",
        ),
        (
            Record("r", (), (Turn("human", "A"), Turn("system", "B")), None, "x"),
            "a system turn in the middle",
        ),
    ],
)
def test_records_that_are_no_conversation(name: str, record: Record, reason: str) -> None:
    with pytest.raises(TemplateError, match=f"^{reason}"):
        encoder(TOKENIZERS[name](), name=name).encode(record)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_only_records_are_written_too(name: str) -> None:
    record, config = said("A?", "B", images=0), TemplateConfig(name=name)
    if name == "plain":
        with pytest.raises(TemplateError, match='"plain" needs an image'):
            render(record, config)
    else:
        assert render(record, config)
        sample = encoder(TOKENIZERS.get(name, qwen3)(), name=name).encode(record)
        assert not sample.is_slot.any()
        assert sample.num_supervised > 0


@pytest.mark.parametrize("mask", ["assistant", "cambrian"])
def test_cutting_leaves_some_of_the_answer(mask: str) -> None:
    """Under Cambrian's mask parts of the prompt are learned, which are nothing of the answer."""
    record = said("<image>\nA?", "B.", "A <image>", "C", images=2)
    whole = encoder(qwen3(), name="qwen", mask=mask).encode(record)
    prompt = len(encoder(qwen3(), name="qwen").encode_prompt(record).input_ids)
    second = int(np.flatnonzero(whole.is_slot)[-1])
    for max_length, reason in ((prompt, "prompt alone fill"), (second, "an image reaches beyond")):
        with pytest.raises(TemplateError, match=f"{reason} data.max_length={max_length}"):
            encoder(qwen3(), max_length, name="qwen", mask=mask).encode(record)
    cut = encoder(qwen3(), second + 1, name="qwen", mask=mask).encode(record)
    assert rows(cut) == rows(whole)[: second + 1]


# --- templates that a tokenizer cannot do


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_a_tokenizer_can_do(name: str) -> None:
    check_template(TOKENIZERS.get(name, qwen3)(), TemplateConfig(name=name))


@pytest.mark.parametrize(
    ("name", "make", "token"),
    [
        ("vicuna_v1", qwen3, "</s>"),
        ("llama_v3", qwen3, "<|begin_of_text|>"),
        ("qwen", llama3, "<|im_start|>"),
        ("chatml_direct", llama2, "<|im_start|>"),
    ],
)
def test_a_tokenizer_without_the_templates_special_token(name: str, make, token: str) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    tokenizer.name_or_path = "some/model"
    with pytest.raises(ConfigError) as caught:
        check_template(tokenizer, TemplateConfig(name=name))
    assert str(caught.value) == (
        f"template.name={name}: the tokenizer {type(tokenizer).__name__} (some/model) has no "
        f"special token {token}: choose a template that needs none, template.name=caption, or the "
        "tokenizer's own, template.name=chat"
    )


def test_a_tokenizer_without_offsets() -> None:
    with pytest.raises(ConfigError, match=r"ByT5Tokenizer has no fast form \(tokenizer.json\)"):
        check_template(ByT5Tokenizer(), TemplateConfig())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": "plain", "system": "Be kind."}, "system: template 'plain' has no system text"),
        ({"name": "qwen", "system": "<image>"}, "system: the template places <image> itself"),
        ({"name": "qwen", "mask": "all"}, "mask: must be one of 'assistant', 'cambrian'"),
        ({"name": "chat", "mask": "cambrian"}, "mask: 'cambrian' is a mask of template 'qwen'"),
        ({"name": "chatml"}, "name: no template 'chatml'; there are caption, plain, qwen,"),
    ],
)
def test_wrong_settings(changes: dict[str, str], problem: str) -> None:
    (found,) = TemplateConfig(**changes).problems()  # type: ignore[arg-type]
    assert found.startswith(problem)
