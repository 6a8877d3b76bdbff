"""Segments -> token ids, labels and slots, with the spans known while they are put together.

T sequence length
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from align.data.templates import (
    EndOfText,
    Segment,
    Slots,
    TemplateConfig,
    Text,
    render,
    render_prompt,
    stop_text,
)
from align.errors import TemplateError
from featcache.manifests import Record

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
        """Positions whose token is learned."""
        return int((self.labels != IGNORE).sum())


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
        self._start = _start_ids(tokenizer)
        self._eos = tokenizer.eos_token_id
        # Prompts repeat in every sample; answers mostly do not, and 558K of them must not pile up.
        self._repeated_ids = lru_cache(maxsize=1024)(self._ids)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a generated answer: end of text, and all that hold the stop text.

        A newline seldom stands alone: Qwen has one token for a full stop with its newline.
        """
        stops = [] if self._eos is None else [self._eos]
        text = stop_text(self.template)
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
        if said and said[-1] == self._eos:
            said.pop()
        text = str(self.tokenizer.decode(said))
        stop = stop_text(self.template)
        return (text if stop is None else text.split(stop, 1)[0]).strip()

    def encode(self, record: Record, slots: Sequence[int]) -> TokenizedSample:
        """The whole sample, cut to `max_length` from its end. slots: of each of its images.

        Raises TemplateError where the record does not fit the template, or where cutting would
        reach the last image or leave nothing to learn.
        """
        sample = self.assemble(render(record, self.template), slots)
        if len(sample.input_ids) <= self.max_length:
            return sample
        cut = TokenizedSample(
            sample.input_ids[: self.max_length],
            sample.labels[: self.max_length],
            sample.is_slot[: self.max_length],
        )
        if sample.is_slot[self.max_length :].any() or cut.num_supervised == 0:
            raise TemplateError(
                f"its images and prompt alone fill data.max_length={self.max_length}"
            )
        return cut

    def encode_prompt(self, record: Record, slots: Sequence[int]) -> TokenizedSample:
        """What generation starts from: everything before the answer, nothing supervised."""
        return self.assemble(render_prompt(record, self.template), slots)

    def assemble(self, segments: list[Segment], slots: Sequence[int]) -> TokenizedSample:
        """Segments -> one uncut sequence; begin-of-text in front where the tokenizer wants it.

        slots: of each image.
        """
        ids = list(self._start)
        supervised: list[slice] = []
        places: list[slice] = []
        for segment in segments:
            start = len(ids)
            match segment:
                case Text(text, is_learned):
                    ids += self._ids(text) if is_learned else self._repeated_ids(text)
                    if is_learned:
                        supervised.append(slice(start, len(ids)))
                case Slots(image):
                    ids += [self.image_token_id] * slots[image]
                    places.append(slice(start, len(ids)))
                case EndOfText(is_learned):
                    if self._eos is None:
                        raise TemplateError(
                            "the tokenizer has no end-of-text token: set "
                            "template.supervise_eos=false"
                        )
                    ids.append(self._eos)
                    if is_learned:
                        supervised.append(slice(start, len(ids)))
        input_ids = np.array(ids, np.int64)
        labels = np.full(len(ids), IGNORE, np.int64)
        is_slot = np.zeros(len(ids), np.bool_)
        for span in supervised:
            labels[span] = input_ids[span]
        for span in places:
            is_slot[span] = True
        return TokenizedSample(input_ids, labels, is_slot)

    def _ids(self, text: str) -> list[int]:
        # A caption that spells a special token must not become one.
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(encoded.input_ids)


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
        views.append(TokenView(token_id, token, is_slot, bool(sample.labels[i] != IGNORE)))

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
