"""`align filter`: data files -> JSON lines of the captions that are worth training on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli import console
from featcache.object_path import StorePath

if TYPE_CHECKING:
    from align.data.filters import FilterResult


@console.command("filter", interrupted="nothing was written; run the same command again")
@click.option(
    "--data",
    required=True,
    multiple=True,
    type=console.LOCATION,
    metavar="FILE",
    help="What `featcache extract --data` takes; may be repeated.",
)
@click.option("--images", type=console.LOCATION, metavar="DIR", help="Image root [as in extract].")
@click.option("--out", required=True, type=Path, metavar="FILE.jsonl", help="What passes.")
@click.option(
    "--min-length",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Fewest words; 0 sets no limit.",
)
@click.option(
    "--max-length",
    type=click.IntRange(0),
    default=60,
    show_default=True,
    help="Most words; 0 sets no limit.",
)
@click.option(
    "--tokenizer", metavar="NAME", help="Lengths are in tokens of this language model, not words."
)
@click.option("--spam", multiple=True, metavar="TEXT", help="Drop captions with this text as well.")
@click.option("--keep-spam", is_flag=True, help="Only what --spam names is spam.")
@click.option("--keep-duplicates", is_flag=True, help="Keep captions that came before.")
@click.option(
    "--near",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Drop captions that share so much of their words with an earlier one, e.g. 0.8.",
)
@click.option("--force", is_flag=True, help="Replace --out, once the new file is whole.")
def filter_captions(
    data: tuple[StorePath, ...],
    images: StorePath | None,
    out: Path,
    min_length: int,
    max_length: int,
    tokenizer: str | None,
    spam: tuple[str, ...],
    keep_spam: bool,
    keep_duplicates: bool,
    near: float | None,
    force: bool,
) -> console.Document:
    """Write the records whose captions are worth training on to --out, as they are in --data.

    Dropped are unusable records and, in this order, captions that are empty, too short, too long,
    spam (watermark, stock photo, download, click), or repeat an earlier one. Beside --out,
    FILE.dropped.jsonl names each with its reason.
    """
    from align.data.filters import SPAM, FilterConfig, filter_records

    config = FilterConfig(
        min_length=min_length,
        max_length=max_length or None,
        tokenizer=tokenizer,
        spam=(*(() if keep_spam else SPAM), *spam),
        duplicates=keep_duplicates,
        near=near,
    )
    with console.Progress("filter", unit="records") as progress:
        result = filter_records(data, images, out, config, force=force, on_progress=progress.update)
    _tell(result)
    return {
        **asdict(result),
        "out": str(result.out),
        "dropped": str(result.dropped),
        "image_root": str(result.image_root),
    }


def _tell(result: FilterResult) -> None:
    """What was dropped, as a table, and how the rest is used."""
    console.table(
        ["dropped", "records", "share", "first"],
        [
            (
                reason,
                f"{count:,}",
                f"{count / result.found:.2%}",
                ", ".join(result.first[reason]) + ", ..." * (count > len(result.first[reason])),
            )
            for reason, count in result.counts.items()
            if count
        ],
        right=[1, 2],
    )
    console.say(
        f"{result.out}: {result.kept:,} of {result.found:,} records; the others in {result.dropped}"
    )
    console.say(f"use it with --data {result.out} --images {result.image_root}")
