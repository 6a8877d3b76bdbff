"""Data files -> records: LLaVA JSON, Cambrian JSONL, caption JSONL, LLaVA-NeXT YAML, WebDataset
tars, parquet, saved Hugging Face datasets, directories of any of these images (docs/inputs.md).

A record that cannot be used is skipped with its reason; a file that cannot be read is an error.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featcache.bucket_data import is_folder
from featcache.entries import Unusable
from featcache.errors import DamagedFileError, ManifestError
from featcache.listing import list_elements
from featcache.mixtures import Sampling, read_mixture
from featcache.object_path import ObjectPath, StorePath, parse_location
from featcache.patterns import expand, fixed_folder
from featcache.saved_datasets import splits_of
from featcache.tiles import is_tile

IMAGE_TOKEN = "<image>"
NO_IMAGE = frozenset(("", "None", "none", "nan"))
"""Texts of an `image` or `video` field that mean there is none (Cambrian-S train_fsdp.py)."""


EMPTY_CAPTION = "the caption is empty"
"""The reason of a `Skipped` that there is nothing to mend about."""


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
    """The records of one or more data files over one image root.

    counts: how many of `records`, which are in the order of `files`, each of these holds.
    """

    records: list[Record]
    image_root: StorePath
    files: tuple[StorePath, ...]
    skipped: list[Skipped] = field(default_factory=list)
    counts: tuple[int, ...] = ()

    def image_keys(self) -> list[str]:
        """Every image key once, in the order of first mention."""
        return list(dict.fromkeys(key for record in self.records for key in record.images))


class _UnusableError(Exception):
    """Why one record is skipped."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One element of a data file, and what it came to.

    file: which of the files as they were named (0-based).
    element: as the file states it: what JSON holds; for other inputs see featcache/entries.py.
    """

    file: int
    element: Any
    outcome: Record | Skipped


@dataclass(frozen=True, slots=True)
class DataFiles:
    """Data files that were found, and not read yet.

    named: as they were given. image_root: what image paths are relative to.
    """

    named: tuple[StorePath, ...]
    image_root: StorePath
    _parts: tuple[tuple[int, StorePath, Sampling], ...]

    @property
    def files(self) -> tuple[StorePath, ...]:
        """What is read, in order: patterns and mixtures are resolved."""
        return tuple(file for _, file, _ in self._parts)

    def entries(self) -> Iterator[Entry]:
        """Every element in the order of the files. JSONL is read line by line, a JSON array whole.

        Raises ManifestError as `read_manifest`; where files are damaged at the end, naming all.
        """
        damaged: list[DamagedFileError] = []
        for number, file, sampling in self._parts:
            try:
                elements: Iterable[tuple[str, Any]] = list_elements(file, self.image_root)
                if sampling.kind != "all":
                    elements = sampling.choose(list(elements))
                for origin, element in elements:
                    outcome: Record | Skipped
                    try:
                        outcome = _record(element, origin, self.image_root)
                    except _UnusableError as reason:
                        outcome = Skipped(origin, str(reason))
                    yield Entry(number, element, outcome)
            except DamagedFileError as error:
                damaged.append(error)
        if damaged:
            # All at once: to fetch them one by one, each after another walk over hundreds, takes
            # hours.
            raise ManifestError("; ".join(map(str, damaged)))


def find_data(
    files: Sequence[StorePath | str], image_root: StorePath | str | None = None
) -> DataFiles:
    """What `files` name, as `read_manifest` takes them. Raises ManifestError as it does."""
    paths = tuple(map(parse_location, files))
    if not paths:
        raise ManifestError("no data files given; name at least one with --data")
    parts = tuple(
        (number, file, sampling)
        for number, path in enumerate(paths)
        for file, sampling in _files_of(path)
    )
    for _, file, _ in parts:
        _require_readable(file)
    root = parse_location(image_root) if image_root else _root_of(paths[0])
    if not root.is_dir():
        raise ManifestError(f"the image root {root} is not a directory; check --images")
    return DataFiles(paths, root, parts)


def read_manifest(
    files: Sequence[StorePath | str], image_root: StorePath | str | None = None
) -> Manifest:
    """Read data files of any mixture of the known formats, told apart by their content.

    files: JSON, JSONL, YAML (featcache/mixtures.py), tars, parquet, folders (featcache/listing.py),
    or patterns of them (featcache/patterns.py); or s3://bucket/... (featcache/bucket_data.py).
    image_root: what image paths are relative to; where None, the first one of `files` if that is a
    folder, else the folder that it lies in.
    Raises ManifestError naming the file, and the line of malformed JSON; FeatcacheError where a
    library is missing that only some formats need.
    """
    found = find_data(files, image_root)
    manifest = Manifest([], found.image_root, found.named)
    counts = [0] * len(found.named)
    for entry in found.entries():
        if isinstance(entry.outcome, Record):
            manifest.records.append(entry.outcome)
            counts[entry.file] += 1
        else:
            manifest.skipped.append(entry.outcome)
    manifest.counts = tuple(counts)
    if not manifest.records:
        why = f"; the first was skipped: {manifest.skipped[0].reason}" if manifest.skipped else ""
        raise ManifestError(f"{', '.join(map(str, found.named))}: no usable records{why}")
    return manifest


def _files_of(path: StorePath) -> Iterator[tuple[StorePath, Sampling]]:
    """What a pattern and a mixture name."""
    for listed in expand(path):
        for named, sampling in _mixture(listed):
            yield from ((file, sampling) for file in expand(named))


def _mixture(path: StorePath) -> Iterable[tuple[StorePath, Sampling]]:
    """The files of a LLaVA-NeXT YAML, or the file itself."""
    if isinstance(path, Path) and path.suffix in (".yaml", ".yml") and path.is_file():
        return read_mixture(path)
    return [(path, Sampling())]


def _root_of(path: StorePath) -> StorePath:
    """The image root that goes without saying."""
    folder = fixed_folder(path)
    if folder is not None:
        return folder
    if isinstance(path, ObjectPath):
        return path if is_folder(path) else path.parent
    return path if path.is_dir() and not splits_of(path) else path.parent


def _require_readable(path: StorePath) -> None:
    if isinstance(path, ObjectPath):
        is_folder(path)
        return
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ManifestError(f"{path} does not exist; check --data") from None
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}; check --data") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ManifestError(f"{path} is neither a file nor a directory; check --data")


def _record(entry: Any, origin: str, root: StorePath) -> Record:
    if isinstance(entry, Unusable):
        raise _UnusableError(entry.reason)
    if not isinstance(entry, dict):
        raise _UnusableError(f"not a JSON object but {_type_name(entry)}")
    names = _image_names(entry)
    if not _is_none(entry.get("video")):
        # Trained on without its video it would be a text that speaks of what is not shown.
        raise _UnusableError(f"has {'both an image and ' * bool(names)}a video")
    images = tuple(_key(name, root) for name in names)
    caption = entry.get("caption")
    # Exports of tables have every column in every record: null is what another one does not have.
    if "caption" in entry and (caption is not None or entry.get("conversations") is None):
        if not isinstance(caption, str):
            raise _UnusableError(f"the caption is {_type_name(caption)}, not text")
        if not caption.strip():
            raise _UnusableError(EMPTY_CAPTION)
        turns: tuple[Turn, ...] = (
            Turn("human", f"{IMAGE_TOKEN}\n" * len(images)),
            Turn("gpt", caption.strip()),
        )
    elif "conversations" in entry:
        turns = _turns(entry["conversations"])
    else:
        raise _UnusableError('has neither "caption" nor "conversations"')
    if not all(_is_utf8(turn.text) for turn in turns):
        raise _UnusableError("its text holds half a surrogate pair")
    identity = entry.get("id")
    if not _is_utf8(str(identity)):
        raise _UnusableError("its id holds half a surrogate pair")
    source = entry.get("source")
    return Record(
        id=str(identity) if identity is not None else origin,
        images=images,
        turns=turns,
        source=str(source) if source is not None else None,
        origin=origin,
    )


def _image_names(entry: dict[str, Any]) -> list[str]:
    """`images` (caption JSONL) or `image`, one or a list; none where the text says so."""
    value = entry.get("images") or entry.get("image")
    names = value if isinstance(value, list) else [value]
    found: list[str] = []
    for name in names:
        if _is_none(name):
            continue
        if not isinstance(name, str):
            raise _UnusableError(f"an image path is {_type_name(name)}, not text: {name!r}")
        found.append(name)
    return found


def _is_none(value: Any) -> bool:
    """Of an `image` or `video` field. Its value is judged by its text, as the original does."""
    return value is None or value == [] or str(value) in NO_IMAGE


def _key(name: str, root: StorePath) -> str:
    """The image's path relative to the root, in one spelling; outside of it it is unusable."""
    path = name
    if isinstance(root, ObjectPath):
        path = name.removeprefix(f"{root}/")
    elif posixpath.isabs(name):
        path = os.path.relpath(os.path.normpath(name), Path(root).absolute())
    key = posixpath.normpath(path)
    if key == ".." or key.startswith("../") or posixpath.isabs(key):
        raise _UnusableError(f"the image path {name!r} leaves the image root {root}")
    if is_tile(key):
        raise _UnusableError(f"the image path {name!r} ends like the key of a tile; rename it")
    if "\0" in key or not _is_utf8(key):
        raise _UnusableError(f"the image path {name!r} holds a character that is no text")
    return key


def _is_utf8(text: str) -> bool:
    """False for lone surrogates: file names in another encoding, or half a \\u escape in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _type_name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _turns(value: Any) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise _UnusableError('"conversations" is not a list')
    turns: list[Turn] = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise _UnusableError('a turn lacks its "value" text')
        role = turn.get("from")
        if role not in ("human", "gpt", "system"):
            raise _UnusableError(f'a turn is from {role!r}; known are "human", "gpt" and "system"')
        turns.append(Turn(role, turn["value"]))
    if turns and turns[0].role == "gpt":
        # As Cambrian-S's train_fsdp.py does: an answer without a question is dropped.
        turns = turns[1:]
    return tuple(turns)
