"""Conversations in a tokenizer's own chat template, with the answers' places known.

The template is a program (Jinja) that may do anything with its messages, so nothing is assumed of
it. It is run once with marks in the place of the texts, which shows what it writes around them; for
each conversation it is run again with the texts, and both must agree, or the conversation is
refused.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import lru_cache

import jinja2
from transformers import PreTrainedTokenizerBase

from align.data.spans import SpanTokenizer, tokenizer_name
from align.data.templates import Dialogue, Segment, Special, Text, with_slots
from align.errors import TemplateError

OPTIONS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
"""Variables of some templates, unknown to the others: Qwen3 answers without thinking first, and
Llama 3 writes its own fallback instead of today's date, so that a resumed run sees the same text.
"""


@dataclass(frozen=True, slots=True)
class _Piece:
    """What the template writes itself, or the place of message number `message`."""

    text: str
    message: int | None
    supervised: bool


class ChatTemplate:
    """A tokenizer's chat template as segments.

    Of each answer is supervised: its text, with what is written between the header that generation
    starts from and it, and the end of the turn, i.e. all up to and with the first special token
    after the last answer.

    Raises TemplateError where the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spans: SpanTokenizer) -> None:
        self.name = tokenizer_name(tokenizer)
        if tokenizer.chat_template is None:
            raise TemplateError(
                f"the tokenizer {self.name} has no chat template: take another template, such as "
                "template.name=caption"
            )
        self._tokenizer = tokenizer
        longest_first = sorted(spans.special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._pieces = lru_cache(maxsize=128)(self._find_pieces)

    def segments(self, dialogue: Dialogue) -> list[Segment]:
        """What the template writes of a conversation.

        Raises TemplateError where it cannot write such a one, or writes something else than the
        texts given.
        """
        texts = [text for _, text in dialogue.messages]
        pieces = self._pieces(tuple(role for role, _ in dialogue.messages))
        expected = "".join(
            piece.text if piece.message is None else texts[piece.message] for piece in pieces
        )
        if self._write(list(dialogue.messages)) != expected:
            raise TemplateError(f"the chat template of {self.name} changes the text it is given")
        images = itertools.count()
        segments: list[Segment] = []
        for piece in pieces:
            if piece.message is None:
                segments += self._parse(piece.text, piece.supervised)
            elif piece.supervised:
                segments.append(Text(texts[piece.message], True))
            else:
                segments += with_slots(texts[piece.message], images)
        return segments

    @property
    def end(self) -> str:
        """The special token that ends an answer.

        Raises TemplateError where the template writes none.
        """
        written = self.segments(Dialogue((("user", "?"), ("assistant", "!"))))
        ends = [part.text for part in written if isinstance(part, Special) and part.supervised]
        return ends[-1]

    def _find_pieces(self, roles: tuple[str, ...]) -> tuple[_Piece, ...]:
        messages = [(role, _mark(i)) for i, role in enumerate(roles)]
        written = self._write(messages)
        places = [written.find(_mark(i)) for i in range(len(roles))]
        once = all(written.count(_mark(i)) == 1 for i in range(len(roles)))
        if not once or places != sorted(places):
            raise TemplateError(
                f"the chat template of {self.name} does not write every text once, in order"
            )
        answers = [i for i, role in enumerate(roles) if role == "assistant"]
        starts: dict[int, int] = {}
        ending = ""
        if answers:
            ending = self._ending(written, places[answers[-1]] + len(_mark(answers[-1])))
        for i in answers:
            given = self._write(messages[:i])
            # Some rewrite an answer that others follow (Qwen3 drops its thinking): there the
            # answer begins with its text.
            fits = written.startswith(given) and len(given) <= places[i]
            starts[i] = len(given) if fits else places[i]
            if not fits and i == answers[-1]:
                raise TemplateError(
                    f"the chat template of {self.name} begins answers in another way than it asks "
                    "for them (add_generation_prompt)"
                )
        pieces: list[_Piece] = []
        position = 0
        for i, place in enumerate(places):
            start = starts.get(i, place)
            pieces.append(_Piece(written[position:start], None, False))
            pieces.append(_Piece(written[start:place], None, True))
            pieces.append(_Piece("", i, i in starts))
            position = place + len(_mark(i))
            if i in starts:
                if not written.startswith(ending, position):
                    raise TemplateError(
                        f"the chat template of {self.name} ends its answers in different ways"
                    )
                pieces.append(_Piece(ending, None, True))
                position += len(ending)
        pieces.append(_Piece(written[position:], None, False))
        return tuple(piece for piece in pieces if piece.text or piece.message is not None)

    def _ending(self, written: str, position: int) -> str:
        """What is written from the end of the last answer to the first special token after it."""
        special = self._special.search(written, position)
        if special is None:
            raise TemplateError(
                f"the chat template of {self.name} ends an answer with no special token, so that "
                "the model would not learn to stop"
            )
        return written[position : special.end()]

    def _parse(self, text: str, supervised: bool) -> list[Segment]:
        segments: list[Segment] = []
        position = 0
        for special in self._special.finditer(text):
            segments += [
                Text(text[position : special.start()], supervised),
                Special(special.group(), supervised),
            ]
            position = special.end()
        return [*segments, Text(text[position:], supervised)]

    def _write(self, messages: list[tuple[str, str]]) -> str:
        """The conversation as text; with the header of an answer where none ends it."""
        try:
            written = self._tokenizer.apply_chat_template(
                [{"role": role, "content": text} for role, text in messages],
                tokenize=False,
                add_generation_prompt=messages[-1][0] != "assistant",
                **OPTIONS,
            )
        # Templates for content in parts raise the last two where it is text.
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            says = " ".join(str(error).split())
            raise TemplateError(f"the chat template of {self.name} says: {says}") from error
        assert isinstance(written, str)
        return written


def _mark(message: int) -> str:
    """Stands for a text. Of private-use characters, which no template writes itself."""
    return f"\ue000{message}\ue001"
