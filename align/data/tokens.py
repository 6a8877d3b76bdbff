"""Segments -> token ids, labels and slots, with the spans known while they are put together.

T sequence length
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from align.data.chat import ChatTemplate
from align.data.spans import SpanTokenizer
from align.data.templates import (
    PLACEHOLDER,
    TEMPLATES,
    Dialogue,
    EndOfText,
    Segment,
    Slots,
    Special,
    TemplateConfig,
    Text,
    render,
    render_prompt,
)
from align.errors import TemplateError
from featcache.errors import ConfigError
from featcache.manifests import Record, Turn

IGNORE = -100
"""The label of a position that is not learned, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """One sequence.

    input_ids: int64[T]; a slot carries the image token's id.
    labels: int64[T]; input_ids where supervised, else IGNORE. Not shifted.
    is_slot: bool[T], true where a visual token is put; the slots of image k come before those of
        image k + 1.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    is_slot: NDArray[np.bool_]

    @property
    def num_supervised(self) -> int:
        """Positions whose token is learned; the first has nothing before it to be learned from."""
        return int((self.labels[1:] != IGNORE).sum())


class SampleEncoder:
    """Records -> token sequences, for one tokenizer and template.

    tokenizer: of the language model.
    template: how records are written.
    image_token_id: the existing token that slots carry.
    max_length: longest sequence in tokens; longer ones lose the end of their answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: TemplateConfig,
        image_token_id: int,
        max_length: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.image_token_id = image_token_id
        self.max_length = max_length
        self._format = TEMPLATES[template.name]
        self._start = [] if self._format.writes_start else _start_ids(tokenizer)
        self._eos = tokenizer.eos_token_id

    @cached_property
    def _spans(self) -> SpanTokenizer:
        return SpanTokenizer(self.tokenizer)

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self._spans)

    @cached_property
    def _always_learned(self) -> list[int]:
        """Tokens that Cambrian-S's mask supervises wherever they stand."""
        if self.template.mask != "cambrian":
            return []
        ends = [self._spans.special_id(token) for token in ("<|im_start|>", "<|im_end|>")]
        return [self._spans.single_id("\n"), *ends]

    @cached_property
    def _end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer and say nothing themselves."""
        ends = [] if self._eos is None else [self._eos]
        ends += [self._spans.special_id(token) for token in self._format.stop_tokens]
        if self.template.name == "chat":
            ends.append(self._spans.special_id(self._chat.end))
        return tuple(dict.fromkeys(ends))

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a generated answer: end of text, the template's own, and all that hold
        its stop text.

        A newline seldom stands alone: Qwen has one token for a full stop with its newline.
        """
        stops = list(self._end_ids)
        text = self._format.stop_text
        if text is not None:
            every = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
            stops += [i for i, token in enumerate(every) if text in token]
        return tuple(stops)

    def answer_text(self, ids: Sequence[int]) -> str:
        """What generated token ids say, up to the first of `stop_ids`, without blanks at the ends.

        A token that holds the stop text may hold the answer's last characters before it.
        """
        stops = set(self.stop_ids)
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        said = list(ids[: end + 1])
        if said and said[-1] in self._end_ids:
            said.pop()
        text = str(self.tokenizer.decode(said))
        stop = self._format.stop_text
        return (text if stop is None else text.split(stop, 1)[0]).strip()

    def encode(self, record: Record, slots: Sequence[int]) -> TokenizedSample:
        """The whole sample, cut to `max_length` from its end. slots: of each of its images.

        Raises TemplateError where the record does not fit the template, or where cutting would
        reach the last image or leave nothing to learn.
        """
        sample = self.assemble(render(record, self.template), slots)
        if len(sample.input_ids) <= self.max_length:
            return sample
        if len(self.encode_prompt(record, slots).input_ids) >= self.max_length:
            raise TemplateError(
                f"its images and prompt alone fill data.max_length={self.max_length}"
            )
        if sample.is_slot[self.max_length :].any():
            raise TemplateError(f"an image reaches beyond data.max_length={self.max_length}")
        return TokenizedSample(
            sample.input_ids[: self.max_length],
            sample.labels[: self.max_length],
            sample.is_slot[: self.max_length],
        )

    def encode_prompt(self, record: Record, slots: Sequence[int]) -> TokenizedSample:
        """What generation starts from: everything before the first answer, nothing supervised."""
        prompt = self.assemble(render_prompt(record, self.template), slots)
        nothing = np.full_like(prompt.labels, IGNORE)  # Cambrian's mask reaches into prompts
        return TokenizedSample(prompt.input_ids, nothing, prompt.is_slot)

    def assemble(self, segments: list[Segment], slots: Sequence[int]) -> TokenizedSample:
        """Segments -> one uncut sequence; begin-of-text in front where the tokenizer wants it.

        slots: of each image. Raises TemplateError where the tokenizer lacks what the template
        writes.
        """
        ids = list(self._start)
        learned = [False] * len(ids)
        places: list[slice] = []
        for part in self._parts(segments):
            match part:
                case Slots(image):
                    places.append(slice(len(ids), len(ids) + slots[image]))
                    ids += [self.image_token_id] * slots[image]
                    learned += [False] * slots[image]
                case EndOfText(is_learned):
                    if self._eos is None:
                        raise TemplateError(
                            "the tokenizer has no end-of-text token: set "
                            "template.supervise_eos=false"
                        )
                    ids.append(self._eos)
                    learned.append(is_learned)
                case _:
                    run_ids, run_learned = self._spans.tokenize(part)
                    ids += run_ids
                    learned += run_learned.tolist()
        input_ids = np.array(ids, np.int64)
        is_slot = np.zeros(len(ids), np.bool_)
        for span in places:
            is_slot[span] = True
        is_learned_at = np.array(learned, np.bool_)
        if self.template.mask == "cambrian":
            is_learned_at |= np.isin(input_ids, self._always_learned) & ~is_slot
        return TokenizedSample(input_ids, np.where(is_learned_at, input_ids, IGNORE), is_slot)

    def _parts(
        self, segments: Iterable[Segment]
    ) -> Iterator[list[Text | Special] | Slots | EndOfText]:
        """The segments with those side by side that are tokenised as one string."""
        run: list[Text | Special] = []
        for segment in segments:
            if isinstance(segment, Text | Special):
                run.append(segment)
                continue
            if run:
                yield run
                run = []
            if isinstance(segment, Dialogue):
                yield from self._parts(self._chat.segments(segment))
            else:
                yield segment
        if run:
            yield run


def check_template(tokenizer: PreTrainedTokenizerBase, template: TemplateConfig) -> None:
    """Writes a sample before there are any, so that a run does not begin with a template that its
    tokenizer cannot do.

    Raises ConfigError with what is lacking and what to do.
    """
    encoder = SampleEncoder(tokenizer, template, 0, sys.maxsize)
    turns = (Turn("human", f"{PLACEHOLDER}\nWhat is it?"), Turn("gpt", "A cat."))
    record = Record("check", ("image",), turns, None, "check")
    try:
        encoder.encode(record, [1])
        encoder.encode_prompt(record, [1])
        _ = encoder.stop_ids
    except TemplateError as error:
        raise ConfigError(f"template.name={template.name}: {error}") from error


@dataclass(frozen=True, slots=True)
class TokenView:
    """One position of a sequence as a person reads it.

    token: the token's text, or "<image k>" on a slot (k from 1).
    """

    id: int
    token: str
    is_slot: bool
    is_supervised: bool


@dataclass(frozen=True, slots=True)
class SampleView:
    """What the model sees of one record, and what it learns from it.

    text: the sequence as text, with "<image k x N>" for the N slots of image k.
    target: the supervised text.
    """

    id: str
    text: str
    target: str
    tokens: tuple[TokenView, ...]


def describe(record: Record, encoder: SampleEncoder, slots: Sequence[int]) -> SampleView:
    """One record as `align show` prints it. slots: of each of its images.

    Raises TemplateError as `SampleEncoder.encode` does.
    """
    sample = encoder.encode(record, slots)
    decode = encoder.tokenizer.decode
    views: list[TokenView] = []
    image_of_slot = iter(np.repeat(np.arange(1, len(slots) + 1), slots).tolist())
    for i, token_id in enumerate(sample.input_ids.tolist()):
        is_slot = bool(sample.is_slot[i])
        token = f"<image {next(image_of_slot)}>" if is_slot else decode([token_id])
        is_supervised = i > 0 and bool(sample.labels[i] != IGNORE)
        views.append(TokenView(token_id, token, is_slot, is_supervised))

    parts: list[str] = []
    run: list[int] = []
    for i, view in enumerate(views):
        if view.is_slot:
            if i == 0 or views[i - 1].token != view.token:
                count = slots[int(view.token.strip("<image >")) - 1]
                parts += [decode(run), f"{view.token[:-1]} x {count}>"]
                run = []
        else:
            run.append(view.id)
    text = "".join([*parts, decode(run)])
    target = decode([view.id for view in views if view.is_supervised])
    return SampleView(record.id, text, target, tuple(views))


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-text token where the tokenizer puts one before any text (Llama), or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []
