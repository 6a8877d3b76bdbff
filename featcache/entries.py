"""Elements of data files, before they are checked: what JSON and JSONL hold as they are, and what
the other inputs (containers, folders) are turned into."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from featcache.errors import ManifestError
from featcache.object_path import StorePath


@dataclass(frozen=True, slots=True)
class Unusable:
    """In the place of an element: why there is none."""

    reason: str


Element = dict[str, Any] | Unusable
"""{"id", "source", "images": [keys], and "caption" or "conversations"}."""


def with_text(element: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The element with what `found` has to say: "conversations", else "caption", else "text"; with
    an empty conversation where that is nothing."""
    if found.get("conversations") is not None:
        return {**element, "conversations": found["conversations"]}
    for name in ("caption", "text"):
        text = found.get(name)
        if text is not None and not (isinstance(text, str) and not text.strip()):
            return {**element, "caption": text}
    return {**element, "conversations": []}


def text_entries(path: StorePath) -> Iterator[tuple[str, Any]]:
    """(place, element) of a JSON array, or of the lines of JSONL: by suffix, else by the first
    character. Raises ManifestError naming the file, and the line of malformed JSON."""
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
