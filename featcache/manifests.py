"""Data files -> records: LLaVA JSON, Cambrian JSONL, caption JSONL, a directory of images.

A record that cannot be used is skipped with its reason; a file that cannot be read is an error.
"""

from __future__ import annotations

import json
import os
import posixpath
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from featcache.errors import ManifestError
from featcache.object_path import ObjectPath, StorePath, parse_location

IMAGE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        "apng avif bmp gif jfif jp2 jpeg jpg png ppm tif tiff webp".split()  # noqa: SIM905
    )
)
IMAGE_TOKEN = "<image>"
NO_IMAGE = frozenset(("", "None", "none", "nan"))
"""Texts of an `image` field that mean there is none (Cambrian-S train_fsdp.py)."""


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
    image_root: StorePath
    files: tuple[StorePath, ...]
    skipped: list[Skipped] = field(default_factory=list)

    def image_keys(self) -> list[str]:
        """Every image key once, in the order of first mention."""
        return list(dict.fromkeys(key for record in self.records for key in record.images))


class _UnusableError(Exception):
    """Why one record is skipped."""


def read_manifest(
    files: Sequence[StorePath | str], image_root: StorePath | str | None = None
) -> Manifest:
    """Read data files of any mixture of the known formats, told apart by their content.

    files: JSON or JSONL files, or directories of images (searched recursively, sorted); all of it
    may lie in a bucket: s3://bucket/train.jsonl, s3://bucket/images.
    image_root: what image paths are relative to; the first file's directory where None.
    Raises ManifestError naming the file, and the line of malformed JSON.
    """
    paths = tuple(map(parse_location, files))
    if not paths:
        raise ManifestError("no data files given; name at least one with --data")
    folders = [_is_directory(path) for path in paths]
    first = paths[0]
    root = parse_location(image_root) if image_root else (first if folders[0] else first.parent)
    if not root.is_dir():
        raise ManifestError(f"the image root {root} is not a directory; check --images")
    manifest = Manifest([], root, paths)
    for path, is_folder in zip(paths, folders, strict=True):
        for origin, entry in _images_below(path, root) if is_folder else _entries(path):
            try:
                manifest.records.append(_record(entry, origin, root))
            except _UnusableError as reason:
                manifest.skipped.append(Skipped(origin, str(reason)))
    if not manifest.records:
        why = f"; the first was skipped: {manifest.skipped[0].reason}" if manifest.skipped else ""
        raise ManifestError(f"{', '.join(map(str, paths))}: no usable records{why}")
    return manifest


def _is_directory(path: StorePath) -> bool:
    """Raises ManifestError for what can be neither listed nor read."""
    if isinstance(path, ObjectPath):
        try:
            if path.key and path.is_file():
                return False
            if path.is_dir():
                return True
        except OSError as error:
            raise ManifestError(f"{path}: {error.strerror}; check --data") from None
        raise ManifestError(f"{path} does not exist; check --data")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ManifestError(f"{path} does not exist; check --data") from None
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}; check --data") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ManifestError(f"{path} is neither a file nor a directory; check --data")
    return stat.S_ISDIR(mode)


def _directory(path: Path, root: StorePath) -> Iterator[tuple[str, Any]]:
    """The image files below a directory, symbolic links followed, each directory visited once."""
    if isinstance(root, ObjectPath):
        raise ManifestError(f"{path} is a folder, and the image root {root} is not; check --images")
    base = os.path.relpath(path, root)
    if base == os.pardir or base.startswith(os.pardir + os.sep):
        raise ManifestError(
            f"{path} lies outside of the image root {root}; name a folder above both with --images"
        )

    def fail(error: OSError) -> None:
        raise ManifestError(f"{error.filename}: {error.strerror}; check its permissions")

    found: list[str] = []
    visited: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(path, followlinks=True, onerror=fail):
        identity = Path(folder).stat()
        if (identity.st_dev, identity.st_ino) in visited:
            folders.clear()
            continue
        visited.add((identity.st_dev, identity.st_ino))
        found += [
            Path(folder, name).relative_to(path).as_posix()
            for name in names
            if Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    if not found:
        raise ManifestError(f"{path} holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))})")
    for name in sorted(found):
        key = Path(base, name).as_posix()
        yield str(path / name), {"id": key, "images": [key], "conversations": []}


def _images_below(path: StorePath, root: StorePath) -> Iterator[tuple[str, Any]]:
    return _listing(path, root) if isinstance(path, ObjectPath) else _directory(path, root)


def _listing(path: ObjectPath, root: StorePath) -> Iterator[tuple[str, Any]]:
    """The image files below a prefix of a bucket; one request for each 1,000 objects."""
    try:
        base = path.relative_to(root)
    except ValueError:
        raise ManifestError(
            f"{path} lies outside of the image root {root}; name a prefix above both with --images"
        ) from None
    names = [
        name for name, _ in path.listing() if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
    ]
    if not names:
        raise ManifestError(f"{path} holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))})")
    for name in sorted(names):
        key = (base / name).as_posix()
        yield f"{path}/{name}", {"id": key, "images": [key], "conversations": []}


def _entries(path: StorePath) -> Iterator[tuple[str, Any]]:
    """Elements of a JSON array, or lines of JSONL: by suffix, else by the first character."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            head = file.read(64).lstrip()
            file.seek(0)
            if head.startswith("[") and path.suffix not in (".jsonl", ".ndjson"):
                for i, entry in enumerate(_parsed(file.read(), str(path))):
                    yield f"{path.name}[{i}]", entry
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path.name}:{number}", _parsed(line.strip(), f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from None


def _parsed(text: str, where: str) -> Any:
    """Raises ManifestError naming `where`, and the line within it where there is more than one."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if "\n" in text else ""
        raise ManifestError(
            f"{where}{line}: malformed JSON: {error.msg} at column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; deep nesting
        raise ManifestError(f"{where}: unreadable JSON: {error}") from None


def _record(entry: Any, origin: str, root: StorePath) -> Record:
    if not isinstance(entry, dict):
        raise _UnusableError(f"not a JSON object but {_type_name(entry)}")
    if entry.get("video") and entry.get("image"):
        raise _UnusableError("has both an image and a video")
    images = tuple(_key(name, root) for name in _image_names(entry))
    if "caption" in entry:
        caption = entry["caption"]
        if not isinstance(caption, str):
            raise _UnusableError(f"the caption is {_type_name(caption)}, not text")
        if not caption.strip():
            raise _UnusableError("the caption is empty")
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
    value = entry.get("images", entry.get("image"))
    names = value if isinstance(value, list) else [value]
    found: list[str] = []
    for name in names:
        if name is None or str(name) in NO_IMAGE:
            continue
        if not isinstance(name, str):
            raise _UnusableError(f"an image path is {_type_name(name)}, not text: {name!r}")
        found.append(name)
    return found


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
