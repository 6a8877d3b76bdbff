"""Records -> segments: what is written around the images, and which part of it is learned.

A template never sees token ids. It returns segments (text, special tokens, image slots, the end of
text), each marked as supervised or not; `align.data.tokens` tokenises them, so labels follow from
spans and never from looking for a token again. docs/templates.md tables what each one writes.

To add a template: a function `Record, TemplateConfig -> list[Segment]` and a line in `TEMPLATES`.
It is called only with records that have an `<image>` for each of their images or none, and never
one in an answer; records without images reach it only with data.text_only=train.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from align.errors import TemplateError
from featcache.manifests import Record, Turn

PLACEHOLDER = "<image>"
MASKS = ("assistant", "cambrian")


@dataclass
class TemplateConfig:
    """How a record becomes text."""

    name: str = "caption"
    """"caption" (prompt, then caption), "plain" (LLaVA's stage 1: the caption alone), "qwen",
    "chatml_direct", "vicuna_v1", "llama_v3" (conversations), or "chat" (the conversation in the
    tokenizer's own chat template)."""
    prompt: str = "Describe the image in one sentence."
    """`caption`, one image: the line under the image; it replaces what the record asks, "" takes
    that. Conversations: the question of a record that asks nothing, such as a bare image."""
    prompt_many: str = "Describe each image in order, one sentence per image."
    """The same for several images."""
    system: str | None = None
    """Conversations: the system text of records without one of their own; null takes the template's
    own (`chat`: whatever the tokenizer's template does without), "" leaves it out."""
    mask: str = "assistant"
    """"assistant": the answers and what ends them are learned. "cambrian", with `qwen` only: the
    labels of Cambrian-S, which also learn the assistant's header, and every newline, <|im_start|>
    and <|im_end|> wherever it stands."""
    supervise_eos: bool = True
    """`caption`: end the target with the tokenizer's end-of-text token, so that the model learns
    to stop. Without it generation runs to its limit. `plain` ends with a newline, as in LLaVA."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one "field: reason" each."""
        template = TEMPLATES.get(self.name)
        if template is None:
            yield f"name: no template {self.name!r}; there are {', '.join(TEMPLATES)}"
        elif self.system is not None and not template.is_conversation:
            yield f"system: template {self.name!r} has no system text; leave it null"
        for field in ("prompt", "prompt_many", "system"):
            if PLACEHOLDER in (getattr(self, field) or ""):
                yield f"{field}: the template places {PLACEHOLDER} itself; leave it out"
        if self.mask not in MASKS:
            yield f"mask: must be one of {', '.join(map(repr, MASKS))}, got {self.mask!r}"
        elif self.mask == "cambrian" and self.name != "qwen":
            yield f"mask: 'cambrian' is a mask of template 'qwen', not of {self.name!r}"


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text; special tokens spelled out in it are plain characters."""

    text: str
    supervised: bool = False


@dataclass(frozen=True, slots=True)
class Special:
    """A special token of the tokenizer, by its text, e.g. "<|im_end|>"."""

    text: str
    supervised: bool = False


@dataclass(frozen=True, slots=True)
class Slots:
    """The place of the record's image number `image` (0-based); its features land here."""

    image: int


@dataclass(frozen=True, slots=True)
class EndOfText:
    """The tokenizer's end-of-text token."""

    supervised: bool = True


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation that the tokenizer's own chat template writes (`align.data.chat`).

    messages: (role, text) each; roles "system", "user", "assistant". Where the last one is the
        user's, the header of the answer to come is written too.
    """

    messages: tuple[tuple[str, str], ...]


Segment = Text | Special | Slots | EndOfText | Dialogue


def render(record: Record, config: TemplateConfig) -> list[Segment]:
    """The segments of one record, prompt and answer.

    Raises TemplateError with the reason, fit for a count of records left out, where the record
    cannot be put into the template.
    """
    _check_placeholders(record)
    return TEMPLATES[config.name].render(record, config)


def render_prompt(record: Record, config: TemplateConfig) -> list[Segment]:
    """The segments before the first answer: what generation starts from.

    Works on a record without an answer, such as an image of a directory.

    Raises TemplateError as `render` does.
    """
    _check_placeholders(record)
    # What Cambrian's mask supervises stands in the prompt too.
    config = replace(config, mask="assistant")
    prompt: list[Segment] = []
    for segment in TEMPLATES[config.name].render(_with_answer(record), config):
        if isinstance(segment, Dialogue):
            roles = [role for role, _ in segment.messages]
            prompt.append(Dialogue(segment.messages[: roles.index("assistant")]))
        elif isinstance(segment, Slots) or not segment.supervised:
            prompt.append(segment)
        else:
            break
    return prompt


def answer(record: Record) -> str:
    """The reference: the text of the first "gpt" turn, without surrounding blanks."""
    return next((turn.text.strip() for turn in record.turns if turn.role == "gpt"), "")


def _caption(record: Record, config: TemplateConfig) -> list[Segment]:
    """The flagship's template: each image on a line, the prompt on the next, then the caption.

        <image>
        Describe the image in one sentence.
        a red circle<end of text>

    Everything up to and with the newline after the prompt is given; the caption and the end-of-text
    token are learned. A record without images is asked its own question. Source: the Qwen3
    alignment run's templates A (one image) and B (several).
    """
    caption = answer(record)
    if not caption:
        raise TemplateError("no caption")
    segments: list[Segment] = []
    for image in range(len(record.images)):
        segments += [Slots(image), Text("\n")]
    segments += [Text(f"{_question(record, config)}\n"), Text(caption, supervised=True)]
    return [*segments, EndOfText()] if config.supervise_eos else segments


def _question(record: Record, config: TemplateConfig) -> str:
    """The config's prompt; the record's own where that is empty, or there is no image."""
    if prompt := _prompt(record, config):
        return prompt
    asked = next((turn.text for turn in record.turns if turn.role == "human"), "")
    question = asked.replace(PLACEHOLDER, "").strip()
    if not question:
        raise TemplateError("no question")
    return question


def _prompt(record: Record, config: TemplateConfig) -> str:
    if not record.images:
        return ""
    return config.prompt if len(record.images) == 1 else config.prompt_many


def _plain(record: Record, config: TemplateConfig) -> list[Segment]:
    r"""LLaVA's stage 1: the image, the caption and "\n", nothing else; the prompt is dropped.

    The caption, blanks at its ends included, and the final "\n" are learned; there is no
    end-of-text token. Source: `preprocess_plain` of LLaVA-1.5, which asserts what is refused here:
    an image, and exactly two turns.
    """
    if not record.images:
        raise TemplateError('template "plain" needs an image')
    turns = [turn for turn in record.turns if turn.role != "system"]
    if len(turns) != 2:
        raise TemplateError('template "plain" needs exactly one question and one answer')
    caption = turns[1].text
    if turns[1].role != "gpt" or not caption.strip():
        raise TemplateError("no caption")
    slots: list[Segment] = [Slots(image) for image in range(len(record.images))]
    return [*slots, Text(f"{caption}\n", supervised=True)]


HELPFUL = "You are a helpful assistant."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CAMBRIAN = (
    "You are Cambrian, a highly intelligent multimodal AI trained by NYU Vision X. ",
    "As a multimodal AI, you have the ability to process and analyze images. Whenever an image is "
    "present in the conversation, very carefully examine it and consider its content when "
    "formulating your response.",
    "You should give concise responses to very simple questions, but provide thorough responses "
    "to more complex and open-ended questions.",
)


def _qwen(record: Record, config: TemplateConfig) -> list[Segment]:
    """Cambrian-S's ChatML: a newline after each <|im_end|>; Qwen's own format.

    Source: `preprocess_qwen` of Cambrian-S and LLaVA-NeXT.
    """
    return _chatml(record, config, HELPFUL, between="\n")


def _chatml_direct(record: Record, config: TemplateConfig) -> list[Segment]:
    """Cambrian-1's ChatML for Yi-34B: no newline after <|im_end|>.

    Source: `conv_chatml_direct` and `preprocess_mpt` of Cambrian-1.
    """
    first, *rest = CAMBRIAN
    return _chatml(record, config, " ".join([first.rstrip(), *rest]), between="")


def _chatml(record: Record, config: TemplateConfig, system: str, *, between: str) -> list[Segment]:
    is_cambrian = config.mask == "cambrian"
    start, end = "<|im_start|>", "<|im_end|>"
    images = itertools.count()
    conversation = _conversation(record, config, system)
    segments: list[Segment] = []
    if conversation.system:
        said = Text(f"system\n{conversation.system}")
        segments += [Special(start), said, Special(end), Text(between)]
    for question, reply in conversation.rounds:
        segments += [Special(start), Text("user\n"), *with_slots(question, images)]
        segments += [Special(end), Text(between)]
        segments += [Special(start, is_cambrian), Text("assistant\n", is_cambrian)]
        segments += [Text(reply, True), Special(end, True), Text(between, is_cambrian)]
    return segments


def _vicuna_v1(record: Record, config: TemplateConfig) -> list[Segment]:
    """LLaVA-1.5's conversation with Vicuna: "{system} USER: ... ASSISTANT: ...</s>USER: ...".

    The blank after "ASSISTANT:" belongs to the answer: to SentencePiece it is part of its first
    word, and generation starts from the colon. Source: `conv_vicuna_v1`, `preprocess_v1`.
    """
    images = itertools.count()
    conversation = _conversation(record, config, VICUNA)
    segments: list[Segment] = []
    if conversation.system:
        segments.append(Text(f"{conversation.system} "))
    for question, reply in conversation.rounds:
        segments += [Text("USER: "), *with_slots(question, images), Text(" ASSISTANT:")]
        segments += [Text(f" {reply}", True), Special("</s>", True)]
    return segments


def _llama_v3(record: Record, config: TemplateConfig) -> list[Segment]:
    """Cambrian-1's conversation with Llama 3: its headers, without the blank line that Meta's own
    template (and so LLaVA-NeXT) has under them; for that one take `chat`.

    Source: `conv_llama_3`, `preprocess_llama_3` of Cambrian-1.
    """

    def header(role: str) -> list[Segment]:
        return [Special("<|start_header_id|>"), Text(role), Special("<|end_header_id|>")]

    end = "<|eot_id|>"
    images = itertools.count()
    # The original's text is indented in its source file, and so are its second and third line.
    conversation = _conversation(record, config, "\n    ".join(CAMBRIAN) + " ")
    segments: list[Segment] = [Special("<|begin_of_text|>")]
    if conversation.system:
        segments += [*header("system"), Text(conversation.system), Special(end)]
    for question, reply in conversation.rounds:
        segments += [*header("user"), *with_slots(question, images), Special(end)]
        segments += [*header("assistant"), Text(reply, True), Special(end, True)]
    return segments


def _chat(record: Record, config: TemplateConfig) -> list[Segment]:
    """The conversation in the tokenizer's own chat template.

    Blanks at the ends of a text are left out, as most such templates do.
    """
    conversation = _conversation(record, config, None)
    messages = [("system", conversation.system.strip())] if conversation.system else []
    for question, reply in conversation.rounds:
        messages += [("user", question.strip()), ("assistant", reply.strip())]
    return [Dialogue(tuple(messages))]


@dataclass(frozen=True, slots=True)
class Template:
    """A way of writing records.

    is_conversation: whether it has roles, a system text and any number of turns.
    writes_start: whether it writes the begin-of-text token itself, where there is to be one; else
        that token stands in front if the tokenizer puts one before any text.
    stop_tokens: special tokens that end an answer besides the end-of-text token.
    stop_text: text that does.
    """

    render: Callable[[Record, TemplateConfig], list[Segment]]
    is_conversation: bool = True
    writes_start: bool = False
    stop_tokens: tuple[str, ...] = ()
    stop_text: str | None = None


TEMPLATES = {
    "caption": Template(_caption, is_conversation=False),
    "plain": Template(_plain, is_conversation=False, stop_text="\n"),
    "qwen": Template(_qwen, stop_tokens=("<|im_end|>",)),
    "chatml_direct": Template(_chatml_direct, stop_tokens=("<|im_end|>",)),
    "vicuna_v1": Template(_vicuna_v1, stop_tokens=("</s>",)),
    "llama_v3": Template(_llama_v3, writes_start=True, stop_tokens=("<|eot_id|>",)),
    "chat": Template(_chat, writes_start=True),
}


@dataclass(frozen=True, slots=True)
class _Conversation:
    """system: None or "" where there is none. rounds: (question, answer) each, the questions with
    an `<image>` for each image of the record."""

    system: str | None
    rounds: list[tuple[str, str]]


def _conversation(record: Record, config: TemplateConfig, system: str | None) -> _Conversation:
    """Turns as the conversations of LLaVA and Cambrian prepare them.

    A first answer without a question is dropped. The one `<image>` of a turn moves to its front,
    onto a line of its own; several stay where they are, for the text may speak of them there. Where
    there is none, each image gets a line in front of the first question.
    """
    turns = list(record.turns)
    if config.system is not None:
        system = config.system
    if turns and turns[0].role == "system":
        system = turns.pop(0).text
    if turns and turns[0].role == "gpt":
        del turns[0]
    if any(turn.role == "system" for turn in turns):
        raise TemplateError("a system turn in the middle")
    if PLACEHOLDER in (system or ""):
        raise TemplateError(f"{PLACEHOLDER} in a system turn")
    questions, answers = turns[::2], turns[1::2]
    if any(turn.role != "human" for turn in questions) or any(
        turn.role != "gpt" for turn in answers
    ):
        raise TemplateError("questions and answers do not take turns")
    if not answers:
        raise TemplateError("no answer")
    if len(questions) > len(answers):
        raise TemplateError("the last question has no answer")
    if not all(turn.text.strip() for turn in answers):
        raise TemplateError("an empty answer")

    asked = [turn.text for turn in questions]
    if record.images and not any(PLACEHOLDER in text for text in asked):
        asked[0] = f"{PLACEHOLDER}\n" * len(record.images) + asked[0]
    if not asked[0].replace(PLACEHOLDER, "").strip():
        if not record.images:
            raise TemplateError("no question")
        asked[0] = f"{asked[0].strip()}\n{_prompt(record, config)}".strip()
    return _Conversation(
        system,
        [(_image_first(text), turn.text) for text, turn in zip(asked, answers, strict=True)],
    )


def _image_first(text: str) -> str:
    if text.count(PLACEHOLDER) != 1:
        return text
    return f"{PLACEHOLDER}\n{text.replace(PLACEHOLDER, '').strip()}".strip()


def with_slots(text: str, images: Iterator[int]) -> list[Segment]:
    """Text with slots in the place of each `<image>`, numbered by `images`."""
    first, *rest = text.split(PLACEHOLDER)
    segments: list[Segment] = [Text(first)]
    for part in rest:
        segments += [Slots(next(images)), Text(part)]
    return segments


def _check_placeholders(record: Record) -> None:
    """Every `<image>` in the text must have its image; where there is none the template adds it."""
    written = 0
    for turn in record.turns:
        count = turn.text.count(PLACEHOLDER)
        if count and turn.role == "gpt":
            raise TemplateError(f"{PLACEHOLDER} in the answer")
        written += count
    if written not in (0, len(record.images)):
        raise TemplateError(f"wrong number of {PLACEHOLDER} for its images")


def _with_answer(record: Record) -> Record:
    """The record with a stand-in answer, for templates asked only for what comes before it."""
    if answer(record):
        return record
    asked = [turn for turn in record.turns if turn.role != "gpt"]
    if not any(turn.role == "human" for turn in asked):
        asked.append(Turn("human", ""))
    turns = (*asked, Turn("gpt", "?"))
    return Record(record.id, record.images, turns, record.source, record.origin)
