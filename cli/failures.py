"""`featcache failures`: the ledger of a store."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from cli import console
from featcache.object_path import StorePath

if TYPE_CHECKING:
    from featcache.journal import Failure

WIDEST_IMAGE = 60
"""Letters up to which the images' column grows; longer keys push their line."""


@console.command("failures")
@click.argument("store", type=console.LOCATION)
@click.option("--reason", help="Only failures of this reason.")
def failures(store: StorePath, reason: str | None) -> console.Document:
    """List the images of STORE's data that have no features, and why."""
    import featcache
    from featcache.errors import ConfigError
    from featcache.layout import Status

    found = featcache.open(store).failures()
    counts = Counter(failure.reason for failure in found)
    none = (Status.OK, Status.UNUSED, Status.DROPPED)
    known = dict.fromkeys([*counts, *(each.reason for each in Status if each not in none)])
    if reason is not None and reason not in known:
        raise ConfigError(f"unknown reason {reason!r}{console.did_you_mean(reason, known)}")
    chosen = [failure for failure in found if reason in (None, failure.reason)]
    for name, count in counts.most_common():
        console.say(f"{count:,} {name}")
    if chosen:
        # Not drawn as a table of rich's: it takes minutes for 100,000 rows.
        click.echo("\n" + "\n".join(lines(chosen, sys.stderr.isatty())), err=True)
    of = "" if reason is None else f" of {len(found):,}"
    console.say(f"{len(chosen):,}{of} images without features")
    return {"failures": [asdict(failure) for failure in chosen]}


def lines(found: Sequence[Failure], terminal: bool) -> list[str]:
    """Image, reason and detail in columns; on a terminal, details end where its line does."""
    images = [printable(failure.key) for failure in found]
    widest = min(WIDEST_IMAGE, max(map(len, images)))
    reasons = max(len(failure.reason) for failure in found)
    listed = [
        f"{image:<{widest}}  {failure.reason:<{reasons}}  {printable(failure.detail)}"
        for image, failure in zip(images, found, strict=True)
    ]
    if not terminal:
        return listed
    width = shutil.get_terminal_size().columns
    cut = []
    for image, line in zip(images, listed, strict=True):
        room = max(width, max(widest, len(image)) + reasons + 4)  # image and reason stay whole
        cut.append(line if len(line) <= room else f"{line[: room - 1]}…")
    return cut


def printable(text: str) -> str:
    """On one line, and without what a terminal would obey."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()
