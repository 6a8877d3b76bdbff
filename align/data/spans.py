"""Text and special tokens -> token ids, each known to be supervised or not by the characters it
stands for.

n tokens of a run
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from align.data.templates import Special, Text
from align.errors import TemplateError

Run = tuple[Text | Special, ...]
"""Segments with no image between them."""


class SpanTokenizer:
    """Tokenises a run as one string, as the originals do, and says which of its tokens are learned.

    Whether a boundary between two segments is one between two tokens depends on the tokenizer and
    on the text: Qwen's has one token for a full stop with its newline, SentencePiece one for a word
    with the blank before it. So segments are not tokenised apart and put together, which gives
    other ids than the model's own format has; the string is tokenised once, and each token belongs
    to the characters that it came from. A token that holds supervised characters beside others is
    supervised: left out, the answer's beginning would never be learned.

    The special tokens of the template become tokens; those that the data spells stay characters.

    Raises TemplateError for a tokenizer without a fast form, which has no character offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise TemplateError(
                f"{tokenizer_name(tokenizer)} has no fast form (tokenizer.json), without which it "
                "is not known which characters a token stands for"
            )
        self.name = tokenizer_name(tokenizer)
        self.special_ids = {
            token.content: index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        self._backend = tokenizer.backend_tokenizer
        self._specials = frozenset(self.special_ids.values())
        # Prompts repeat in every sample; answers mostly do not, and 558K of them must not pile up.
        self._repeated = lru_cache(maxsize=1024)(self._tokenize)

    def tokenize(self, run: Sequence[Text | Special]) -> tuple[list[int], NDArray[np.bool_]]:
        """Token ids, n of them, and bool[n]: which are supervised.

        Raises TemplateError where the tokenizer lacks a special token of the run.
        """
        segments = tuple(run)
        if any(segment.supervised for segment in segments):
            return self._tokenize(segments)
        return self._repeated(segments)

    def special_id(self, token: str) -> int:
        """The id of a special token.

        Raises TemplateError where the tokenizer has none of this text.
        """
        if token not in self.special_ids:
            raise TemplateError(
                f"the tokenizer {self.name} has no special token {token}: choose a template that "
                "needs none, template.name=caption, or the tokenizer's own, template.name=chat"
            )
        return self.special_ids[token]

    def single_id(self, text: str) -> int:
        """The id of a text that is one token.

        Raises TemplateError where it is several.
        """
        ids = self._literal.encode(text, add_special_tokens=False).ids
        if len(ids) != 1:
            raise TemplateError(f"the tokenizer {self.name} has no single token for {text!r}")
        return int(ids[0])

    def _tokenize(self, run: Run) -> tuple[list[int], NDArray[np.bool_]]:
        text = "".join(segment.text for segment in run)
        meant = [self.special_id(part.text) for part in run if isinstance(part, Special)]
        encoding = self._parsing.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        if [index for index in ids if index in self._specials] != meant:
            ids, offsets = self._apart(run)
        learned = np.zeros(len(text), np.bool_)
        position = 0
        for segment in run:
            learned[position : position + len(segment.text)] = segment.supervised
            position += len(segment.text)
        if not ids:
            return [], np.zeros(0, np.bool_)
        # A token of no characters, as SentencePiece has for the blank that it adds in front,
        # belongs to the character after it.
        start, end = np.array(offsets, np.int64).T
        before = np.concatenate([[0], learned.cumsum()])
        end = np.minimum(np.maximum(end, start + 1), len(text))
        return ids, before[end] > before[np.minimum(start, end)]

    def _apart(self, run: Run) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets where the data spells a special token, so that parsing the string would
        find more of them than are meant: the text between the template's own is tokenised alone.

        Only a tokenizer that tells the beginning of a string from text after a special token (that
        of Llama 2) gives other ids for this, a blank in front of later turns.
        """
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for is_special, group in groupby(run, key=lambda part: isinstance(part, Special)):
            texts = [segment.text for segment in group]
            if is_special:
                for text in texts:
                    ids.append(self.special_id(text))
                    offsets.append((position, position + len(text)))
                    position += len(text)
            else:
                text = "".join(texts)
                encoding = self._literal.encode(text, add_special_tokens=False)
                ids += encoding.ids
                offsets += [(position + start, position + end) for start, end in encoding.offsets]
                position += len(text)
        return ids, offsets

    @cached_property
    def _parsing(self) -> Tokenizer:
        return self._copy()

    @cached_property
    def _literal(self) -> Tokenizer:
        """Reads special tokens as the characters they are spelled with."""
        literal = self._copy()
        literal.encode_special_tokens = True
        return literal

    def _copy(self) -> Tokenizer:
        """The tokenizer's own model without what would cut, pad or add; the post-processor also
        trims blanks from the offsets (Llama 3).
        """
        copy = Tokenizer.from_str(self._backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.post_processor = None
        return copy


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a message calls it: its class, and where it was loaded from."""
    place = tokenizer.name_or_path
    return type(tokenizer).__name__ + (f" ({place})" if place else "")
