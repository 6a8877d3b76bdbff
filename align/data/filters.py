"""Caption filters: which records of data files are worth training on, and why the others are not.

What passes is written as JSON lines that hold the elements as their files state them, so that
`featcache extract` and `align train` read the same records; what does not is named beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from align.data.near_duplicates import NearDuplicates
from align.errors import DataError
from featcache.errors import ConfigError
from featcache.files import publish
from featcache.manifests import EMPTY_CAPTION, DataFiles, Entry, Record, Skipped, find_data
from featcache.object_path import StorePath

SPAM = ("watermark", "stock photo", "download", "click")
"""What captions of stock photographs and web pages hold (the Qwen3 alignment specification)."""

CHUNK = 4096
"""Records that are judged at once: a tokenizer is several times faster with many texts."""

REASONS = ("unusable", "empty", "too short", "too long", "spam", "duplicate", "near duplicate")
"""In this order they are looked for, and the first is what a record is dropped for."""


@dataclass(frozen=True)
class FilterConfig:
    """What a caption must be. A record's caption is all its answers, one after the other."""

    min_length: int = 5
    """Fewest words, or tokens where there is a tokenizer; 0 sets no limit."""
    max_length: int | None = 60
    """Most words or tokens; None sets no limit."""
    tokenizer: str | None = None
    """A language model's name or folder, whose tokens are counted; None counts words."""
    spam: tuple[str, ...] = SPAM
    """Words, or several in a row, that no caption may hold; case and blanks do not count."""
    duplicates: bool = False
    """Keep captions that an earlier record has, case and blanks aside."""
    near: float | None = None
    """Drop captions that share this much of their words with an earlier one that was kept, e.g.
    0.8 (align/data/near_duplicates.py); None does not look."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one "field: reason" each."""
        if self.min_length < 0:
            yield f"min_length: must be at least 0, got {self.min_length}"
        if self.max_length is not None and self.max_length < max(1, self.min_length):
            yield (
                f"max_length: must be at least min_length={self.min_length} and 1, "
                f"got {self.max_length}"
            )
        if not all(words.strip() for words in self.spam):
            yield "spam: holds an empty text"
        if self.near is not None and not 0 < self.near <= 1:
            yield f"near: must be in (0, 1], got {self.near}"

    @property
    def unit(self) -> str:
        """What lengths are counted in."""
        return "words" if self.tokenizer is None else "tokens"


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that did not pass.

    id: the record's own, or its place in the data file where it has none. reason: of `REASONS`.
    detail: what was found, e.g. "3 words"; for a duplicate the id of the record that it repeats.
    origin: its place, e.g. "train.jsonl:12".
    """

    id: str
    reason: str
    detail: str
    origin: str


@dataclass(slots=True)
class FilterResult:
    """What became of the records.

    counts: dropped records by reason, all `REASONS`. first: the first few ids of each.
    image_root: what the image paths of the written file are relative to, as those it was made of.
    """

    out: Path
    dropped: Path
    image_root: StorePath
    found: int = 0
    kept: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    first: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in REASONS})


def filter_records(
    files: Sequence[StorePath | str],
    images: StorePath | str | None,
    out: Path,
    config: FilterConfig,
    *,
    force: bool = False,
    on_progress: Callable[[int], None] = lambda _: None,
) -> FilterResult:
    """Writes the records of `files` that pass to `out`, one JSON object a line, in their order, and
    beside it `Dropped` lines of the others (`dropped_path`). Either file is there whole or not.

    files, images: as `featcache.manifests.read_manifest` takes them.
    force: replace the files that are there. on_progress: told how many records were judged.

    Memory: `CHUNK` records, a JSON array whole, what was dropped, and 0.2 KB for each caption
    that was kept (with `near`, 0.3 KB).

    Raises ConfigError for values that cannot be, a tokenizer that cannot be loaded, or an `out`
    that exists or is one of `files`; DataError where nothing passes or `out` cannot be written;
    ManifestError where a file cannot be read.
    """
    if problems := list(config.problems()):
        raise ConfigError("; ".join(problems))
    data = find_data(files, images)
    result = FilterResult(out, dropped_path(out), data.image_root)
    _require_free(result, data, force)
    sieve = _Sieve(config)
    dropped: list[bytes] = []

    def kept_lines() -> Iterator[bytes]:
        entries = data.entries()
        while chunk := list(islice(entries, CHUNK)):
            lines: list[str] = []
            for entry, verdict in zip(chunk, sieve.judge(chunk), strict=True):
                if verdict is None:
                    # `str` of ids that JSON has no type for, such as a parquet file's dates: what
                    # the record says.
                    lines.append(json.dumps(entry.element, default=str) + "\n")
                    continue
                dropped.append(f"{json.dumps(asdict(verdict))}\n".encode())
                result.counts[verdict.reason] += 1
                if len(result.first[verdict.reason]) < 3:
                    result.first[verdict.reason].append(verdict.id)
            result.found += len(chunk)
            result.kept += len(lines)
            on_progress(result.found)
            yield "".join(lines).encode()
        if not result.kept:
            _refuse_nothing(result, data)

    try:
        publish(out, kept_lines())
        publish(result.dropped, dropped)
    except OSError as error:
        raise DataError(
            f"{error.filename or out}: cannot be written: {error.strerror}; free some space or "
            "choose another --out"
        ) from error
    return result


def dropped_path(out: Path) -> Path:
    """captions.jsonl -> captions.dropped.jsonl"""
    return out.with_name(f"{out.stem}.dropped.jsonl")


def _require_free(result: FilterResult, data: DataFiles, force: bool) -> None:
    read = {path.resolve() for path in data.files if isinstance(path, Path)}
    for path in (result.out, result.dropped):
        if path.resolve() in read:
            raise ConfigError(f"--out {path}: is one of the --data files; choose another place")
        if path.is_dir() or (path.exists() and not force):
            raise ConfigError(f"{path} exists; choose another place, or replace it with --force")
    if result.out.suffix not in (".jsonl", ".ndjson"):
        raise ConfigError(f"--out {result.out}: JSON lines are written; name it *.jsonl")


def _refuse_nothing(result: FilterResult, data: DataFiles) -> NoReturn:
    why = ", ".join(f"{count:,} {reason}" for reason, count in result.counts.items() if count)
    raise DataError(
        f"{', '.join(map(str, data.named))}: none of {result.found:,} records passes"
        f"{f' ({why})' * bool(why)}; nothing was written"
    )


class _Sieve:
    """The filters of a config, with what they remember of the records before."""

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        self._spam = _spam_pattern(config.spam)
        self._count = _words if config.tokenizer is None else _token_counter(config.tokenizer)
        # 128 bits of each caption -> its record's id: among 10 million captions two that differ
        # share 64 bits once in 400,000 times, and 128 never.
        self._seen: dict[int, str] = {}
        self._near = None if config.near is None else NearDuplicates(config.near)
        self._near_ids: list[str] = []

    def judge(self, entries: Sequence[Entry]) -> Iterator[Dropped | None]:
        """Of each entry why it is dropped, or None; a caption that is dropped repeats nothing."""
        captions = [_caption(entry.outcome) for entry in entries]
        lengths = self._count(captions)
        for entry, caption, length in zip(entries, captions, lengths, strict=True):
            record = entry.outcome
            if isinstance(record, Skipped):
                reason = "empty" if record.reason == EMPTY_CAPTION else "unusable"
                yield Dropped(_id_of(entry), reason, record.reason, record.origin)
                continue
            found = self._find(record.id, caption, length)
            yield None if found is None else Dropped(record.id, *found, record.origin)

    def _find(self, identity: str, caption: str, length: int) -> tuple[str, str] | None:
        config = self.config
        if not caption:
            return "empty", EMPTY_CAPTION
        if length < config.min_length:
            return "too short", f"{length} {config.unit}"
        if config.max_length is not None and length > config.max_length:
            return "too long", f"{length} {config.unit}"
        if spam := self._spam and self._spam.search(caption):
            return "spam", " ".join(spam[0].split())
        if not config.duplicates:
            normalised = " ".join(caption.split()).casefold()
            digest = xxhash.xxh3_128_intdigest(normalised.encode())
            earlier = self._seen.get(digest)
            if earlier is not None:
                return "duplicate", earlier
        if self._near is not None:
            number = self._near.find_or_add(caption)
            if number is not None:
                return "near duplicate", self._near_ids[number]
            self._near_ids.append(identity)
        if not config.duplicates:
            self._seen[digest] = identity
        return None


def _id_of(entry: Entry) -> str:
    """What an unusable record calls itself, else its place."""
    named = entry.element.get("id") if isinstance(entry.element, dict) else None
    return entry.outcome.origin if named is None else str(named)


def _caption(outcome: Record | Skipped) -> str:
    if isinstance(outcome, Skipped):
        return ""
    return "\n".join(turn.text for turn in outcome.turns if turn.role == "gpt").strip()


def _spam_pattern(words: Sequence[str]) -> re.Pattern[str] | None:
    r"""Finds any of the texts where letters or digits neither precede nor follow; `\b` would not do
    for one that begins or ends with another character."""
    if not words:
        return None
    each = (r"\s+".join(map(re.escape, text.split())) for text in words)
    return re.compile(rf"(?<!\w)(?:{'|'.join(each)})(?!\w)", re.IGNORECASE)


def _words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def _token_counter(name: str) -> Callable[[Sequence[str]], list[int]]:
    """Raises ConfigError where there is no such tokenizer."""
    from transformers import AutoTokenizer

    from align.errors import ModelError
    from align.llm import find_llm
    from featcache.quiet import quiet

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(find_llm(name))
    except (OSError, ValueError, ModelError) as error:
        why = " ".join(str(error).removeprefix(f"llm.name={name}: ").split())
        raise ConfigError(f"--tokenizer {name}: cannot be loaded: {why}") from error
    return partial(_tokens, tokenizer)


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    # As captions are tokenised for training: special tokens spelled out are plain characters.
    found = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
    return list(map(len, found.input_ids))
