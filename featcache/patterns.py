"""What `--data` may name: a path, or a pattern of paths such as "shards/{00000..00099}.tar"."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from featcache.errors import ManifestError

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_SPECIAL = re.compile(r"[*?\[]|" + _BRACES.pattern)


def expand(value: Path) -> list[Path]:
    """The paths that a value of --data stands for, in the pattern's order; those of a `*` sorted.

    Braces are expanded as a shell does: `{00000..00099}` with its leading zeros, `{a,b}`; then `*`,
    `?` and `[...]`. A path that exists under that very name is meant as it is. Whether the others
    exist is not asked, but for a `*`, `?` or `[...]` that matches nothing.

    Raises ManifestError.
    """
    if os.path.lexists(value) or not _SPECIAL.search(str(value)):
        return [value]
    found: list[Path] = []
    for text in _expand_braces(str(value)):
        if glob.has_magic(text) and not os.path.lexists(text):
            matches = sorted(glob.glob(text, recursive=True))  # noqa: PTH207 - may be absolute
            if not matches:
                raise ManifestError(f"{text} matches nothing; check --data")
            found += map(Path, matches)
        else:
            found.append(Path(text))
    return list(dict.fromkeys(found))


def fixed_folder(value: Path) -> Path | None:
    """The folder that all paths of a pattern lie below; None for a path that is no pattern."""
    if os.path.lexists(value) or not _SPECIAL.search(str(value)):
        return None
    fixed = Path()
    for part in value.parts[:-1]:
        if _SPECIAL.search(part):
            break
        fixed /= part
    return fixed


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
