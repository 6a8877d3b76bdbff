"""Data files -> records: LLaVA JSON, Cambrian JSONL, caption JSONL, a directory of images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation. role: "human", "gpt" or "system"."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """One sample as its data file states it.

    images: keys, i.e. POSIX paths relative to the image root; the k-th `<image>` is images[k].
    turns: the conversation; empty for an image without text.
    origin: file and line or element, e.g. "train.jsonl:12", for messages.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    source: str | None
    origin: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that was left out, and why."""

    origin: str
    reason: str


@dataclass(slots=True)
class Manifest:
    """The records of one or more data files over one image root."""

    records: list[Record]
    image_root: Path
    files: tuple[Path, ...]
    skipped: list[Skipped] = field(default_factory=list)
