"""Whether features are read through the page cache or past it.

Through it where all of them fit into memory: after the first epoch every read is a copy. Past it
where they do not: what the cache held would be gone before it is wanted again, and O_DIRECT reads
a disk at its full rate with little work for the processor (docs/performance.md).
"""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.errors import ConfigError
from featcache.gather import DIRECT_BYTES
from featcache.memory import available_bytes

if TYPE_CHECKING:
    from featcache.tier import Tier

IO_MODES = ("auto", "buffered", "direct")
_CACHE_SHARE = 0.8  # of the memory that is available; the training wants some as well


@dataclass(frozen=True, slots=True)
class ReadMode:
    """direct: with O_DIRECT. fits: the page cache has room for all that may be read. why: in
    words, for who runs it."""

    direct: bool
    fits: bool
    why: str


def choose_mode(io: str, set_bytes: int, example: Path | None) -> ReadMode:
    """io: one of `IO_MODES`. set_bytes: of all that may be read. example: a file of it.

    Raises ConfigError for another `io`, and where "direct" is asked of a file system without it.
    """
    if io not in IO_MODES:
        raise ConfigError(f"io={io!r}: must be one of {', '.join(IO_MODES)}")
    available = available_bytes()
    fits = set_bytes <= _CACHE_SHARE * available
    sizes = f"{_size(set_bytes)} of features, {_size(available)} of memory to be had"
    problem = None
    if example is not None and (io == "direct" or (io == "auto" and not fits)):
        problem = _direct_problem(example)
    if io == "direct" and problem:
        raise ConfigError(f"io=direct: {example} is not read so ({problem}); use io=buffered")
    if io == "direct" or (io == "auto" and not fits and not problem):
        asked = " as asked" if io == "direct" else ""
        return ReadMode(True, fits, f"past the page cache (O_DIRECT){asked}: {sizes}")
    asked = " as asked" if io == "buffered" else ""
    but = f", but no O_DIRECT ({problem})" if problem else ""
    return ReadMode(False, fits, f"through the page cache{asked}: {sizes}{but}")


def choose_tier_mode(io: str, url: str, set_bytes: int, tier: Tier) -> ReadMode:
    """For features of a bucket, which are read through the files of a `Tier`; those are written as
    well, so never past the page cache.

    Raises ConfigError for `io` "direct" and what is none of `IO_MODES`.
    """
    if io not in IO_MODES:
        raise ConfigError(f"io={io!r}: must be one of {', '.join(IO_MODES)}")
    if io == "direct":
        raise ConfigError(f"io=direct: {url} is read through files on a disk; use io=auto")
    stays = min(1.0, tier.nbytes / set_bytes) if set_bytes else 1.0
    what = (
        "all of it stays there"
        if stays == 1
        else f"about {stays:.0%} of it stays there, the rest is fetched again in each epoch"
    )
    fits = min(set_bytes, tier.nbytes) <= _CACHE_SHARE * available_bytes()
    return ReadMode(
        False,
        fits,
        f"from {url} through {tier.folder} ({_size(tier.nbytes)} at the most; "
        f"{_size(set_bytes)} of features: {what})",
    )


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _direct_problem(path: Path) -> str | None:
    """Why the file cannot be read with O_DIRECT; None where it can, or cannot be read at all."""
    if not hasattr(os, "O_DIRECT"):
        return "this system has none"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        try:
            with mmap.mmap(-1, DIRECT_BYTES) as page:
                os.preadv(descriptor, [page], 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        return os.strerror(errno.EINVAL) if error.errno == errno.EINVAL else None
    return None
