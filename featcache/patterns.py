"""What `--data` may name: a path, or a pattern of paths such as "shards/{00000..00099}.tar";
on a disk or in a bucket."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from featcache.errors import ManifestError
from featcache.object_path import ObjectPath, StorePath

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_SPECIAL = re.compile(r"[*?\[]|" + _BRACES.pattern)


def expand(value: StorePath) -> list[StorePath]:
    """The paths that a value of --data stands for, in the pattern's order; those of a `*` sorted.

    Braces are expanded as a shell does: `{00000..00099}` with its leading zeros, `{a,b}`; then `*`,
    `?` and `[...]`. A path that exists under that very name is meant as it is. Whether the others
    exist is not asked, but for a `*`, `?` or `[...]` that matches nothing. In a bucket each part
    between slashes that has one takes a listing of what is directly there; `**` is refused.

    Raises ManifestError, ObjectStoreError.
    """
    if not _is_pattern(value):
        return [value]
    found: list[StorePath] = []
    if isinstance(value, ObjectPath):
        for key in _expand_braces(value.key):
            found += _matches(ObjectPath(value.bucket, key))
        return list(dict.fromkeys(found))
    for text in _expand_braces(str(value)):
        if glob.has_magic(text) and not os.path.lexists(text):
            matches = sorted(glob.glob(text, recursive=True))  # noqa: PTH207 - may be absolute
            if not matches:
                raise ManifestError(f"{text} matches nothing; check --data")
            found += map(Path, matches)
        else:
            found.append(Path(text))
    return list(dict.fromkeys(found))


def fixed_folder(value: StorePath) -> StorePath | None:
    """The folder that all paths of a pattern lie below; None for a path that is no pattern."""
    if not _is_pattern(value):
        return None
    if isinstance(value, ObjectPath):
        return ObjectPath(value.bucket, _fixed_key(value.key))
    fixed = Path()
    for part in value.parts[:-1]:
        if _SPECIAL.search(part):
            break
        fixed /= part
    return fixed


def _is_pattern(value: StorePath) -> bool:
    if not isinstance(value, ObjectPath):
        return bool(_SPECIAL.search(str(value))) and not os.path.lexists(value)
    if _SPECIAL.search(value.bucket):
        raise ManifestError(f"{value}: a bucket is named as it is, without a pattern")
    with _asking(value):
        return bool(_SPECIAL.search(value.key)) and not value.is_file()


def _fixed_key(key: str) -> str:
    """The parts of a key before the first that has anything special."""
    fixed = itertools.takewhile(lambda part: not _SPECIAL.search(part), key.split("/")[:-1])
    return "/".join(fixed)


def _matches(pattern: ObjectPath) -> list[ObjectPath]:
    """The objects and prefixes that a pattern without braces matches, sorted; itself where it has
    nothing special."""
    if not glob.has_magic(pattern.key):
        return [pattern]
    parts = pattern.key.split("/")
    if "**" in parts:
        raise ManifestError(f"{pattern}: ** is for disks; name the folder itself, or use *")
    with _asking(pattern):
        if pattern.is_file():
            return [pattern]
        found = [ObjectPath(pattern.bucket)]
        for part in parts:
            if glob.has_magic(part):
                found = [place for at in found for place in at.glob(part)]
            else:
                found = [at / part for at in found]
        there = sorted(place for place in found if place.exists())
    if not there:
        raise ManifestError(f"{pattern} matches nothing; check --data")
    return there


@contextlib.contextmanager
def _asking(pattern: ObjectPath) -> Iterator[None]:
    """Raises ManifestError for an OSError."""
    try:
        yield
    except OSError as error:
        raise ManifestError(f"{pattern}: {error.strerror}; check --data") from None


def _expand_braces(text: str) -> Iterator[str]:
    found = _BRACES.search(text)
    if not found:
        yield text
        return
    inner = found[1]
    numbers = _RANGE.fullmatch(inner)
    if numbers:
        first, last = numbers[1], numbers[2]
        step = 1 if int(first) <= int(last) else -1
        width = max(len(first), len(last)) if first[0] == "0" or last[0] == "0" else 0
        choices = [f"{n:0{width}}" for n in range(int(first), int(last) + step, step)]
    elif "," in inner:
        choices = inner.split(",")
    else:
        raise ManifestError(f"{text}: {{{inner}}} is neither a range of numbers nor a list")
    for choice in choices:
        yield from _expand_braces(text[: found.start()] + choice + text[found.end() :])
