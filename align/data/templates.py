"""Records -> segments: what is written around the images, and which part of it is learned.

A template never sees token ids. It returns segments (text, image slots, the end of text), each
marked as supervised or not; `align.data.tokens` tokenises them one by one, so labels follow from
spans and never from looking for a token again.

To add a template: a function `Record, TemplateConfig -> list[Segment]` and a line in `TEMPLATES`.
It is called only with records that have an answer, and an `<image>` for each image or none; records
without images reach it only with data.text_only=train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from align.errors import TemplateError
from featcache.manifests import Record, Turn

PLACEHOLDER = "<image>"


@dataclass
class TemplateConfig:
    """How a record becomes text."""

    name: str = "caption"
    """"caption" (prompt, then caption) or "plain" (LLaVA's stage 1: the caption alone)."""
    prompt: str = "Describe the image in one sentence."
    """`caption`, one image: the line under the image; it replaces what the record asks."""
    prompt_many: str = "Describe each image in order, one sentence per image."
    """`caption`, several images: the line under them."""
    supervise_eos: bool = True
    """`caption`: end the target with the tokenizer's end-of-text token, so that the model learns
    to stop. Without it generation runs to its limit. `plain` ends with a newline, as in LLaVA."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one "field: reason" each."""
        if self.name not in TEMPLATES:
            yield f"name: no template {self.name!r}; there are {', '.join(TEMPLATES)}"
        for field in ("prompt", "prompt_many"):
            if PLACEHOLDER in getattr(self, field):
                yield f"{field}: the template places {PLACEHOLDER} itself; leave it out"


@dataclass(frozen=True, slots=True)
class Text:
    """Text that is tokenised by itself; special tokens spelled out in it are plain characters."""

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


Segment = Text | Slots | EndOfText


def render(record: Record, config: TemplateConfig) -> list[Segment]:
    """The segments of one record, prompt and answer.

    Raises TemplateError with the reason, fit for a count of records left out, where the record
    cannot be put into the template.
    """
    _check_placeholders(record)
    return TEMPLATES[config.name].render(record, config)


def render_prompt(record: Record, config: TemplateConfig) -> list[Segment]:
    """The segments before the first supervised one: what generation starts from.

    Works on a record without an answer, such as an image of a directory.

    Raises TemplateError as `render` does.
    """
    _check_placeholders(record)
    prompt: list[Segment] = []
    for segment in TEMPLATES[config.name].render(_with_answer(record), config):
        if not isinstance(segment, Slots) and segment.supervised:
            break
        prompt.append(segment)
    return prompt


def answer(record: Record) -> str:
    """The reference: the text of the first "gpt" turn, without surrounding blanks."""
    return next((turn.text.strip() for turn in record.turns if turn.role == "gpt"), "")


def stop_text(config: TemplateConfig) -> str | None:
    """Text that ends an answer besides the end-of-text token, or None."""
    return TEMPLATES[config.name].stop_text


def _caption(record: Record, config: TemplateConfig) -> list[Segment]:
    """The flagship's template: each image on a line, the prompt on the next, then the caption.

        <image>
        Describe the image in one sentence.
        a red circle<end of text>

    Everything up to and with the newline after the prompt is given; the caption and the end-of-text
    token are learned. Source: the Qwen3 alignment run's templates A (one image) and B (several).
    """
    caption = _one_answer(record)
    if not record.images:
        # The prompts speak of images; without any, the record's own question is all there is.
        prompt = next((turn.text.strip() for turn in record.turns if turn.role == "human"), "")
    else:
        prompt = config.prompt if len(record.images) == 1 else config.prompt_many
    segments: list[Segment] = []
    for image in range(len(record.images)):
        segments += [Slots(image), Text("\n")]
    segments += [Text(f"{prompt}\n"), Text(caption, supervised=True)]
    return [*segments, EndOfText()] if config.supervise_eos else segments


def _plain(record: Record, config: TemplateConfig) -> list[Segment]:
    r"""LLaVA's stage 1: the image, the caption and "\n", nothing else; the prompt is dropped.

    The caption and the final "\n" are learned; there is no end-of-text token. Source:
    `preprocess_plain` of LLaVA-1.5, which asserts what is refused here: exactly two turns.
    """
    if len([turn for turn in record.turns if turn.role != "system"]) != 2:
        raise TemplateError('template "plain" needs exactly one question and one answer')
    if not record.images:
        raise TemplateError('template "plain" needs an image')
    slots: list[Segment] = [Slots(image) for image in range(len(record.images))]
    return [*slots, Text(_one_answer(record) + "\n", supervised=True)]


@dataclass(frozen=True, slots=True)
class Template:
    """A way of writing records.

    stop_text: what ends an answer besides the end-of-text token.
    """

    render: Callable[[Record, TemplateConfig], list[Segment]]
    stop_text: str | None = None


TEMPLATES = {
    "caption": Template(_caption),
    "plain": Template(_plain, stop_text="\n"),
}


def _one_answer(record: Record) -> str:
    caption = answer(record)
    if not caption:
        raise TemplateError("no caption")
    return caption


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
    turns = (Turn("human", ""), Turn("gpt", "?"))
    return Record(record.id, record.images, turns, record.source, record.origin)
