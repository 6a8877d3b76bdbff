"""`align show`: samples as the model sees them."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli import console
from featcache.object_path import StorePath

if TYPE_CHECKING:
    from align.data.tokens import SampleView


@console.command("show")
@click.option("--config", metavar="NAME|FILE", help="A recipe of `align configs`, or a YAML file.")
@click.option("--features", required=True, multiple=True, type=console.LOCATION, metavar="STORE")
@click.option("-n", "count", type=click.IntRange(1), default=3, show_default=True)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def show(
    config: str | None, features: tuple[StorePath, ...], count: int, overrides: tuple[str, ...]
) -> console.Document:
    """Samples as the model sees them: text, token ids, image slots, what is supervised."""
    from align.config import load_config
    from align.data.tokens import describe
    from align.errors import TemplateError
    from align.run import assemble

    run = assemble(load_config(config, overrides), list(features), Path())
    samples, views = [], []
    for sample in run.splits.train[:count]:
        slots = [run.model.connector.num_slots(size) for size in run.stores.sizes_of(sample.rows)]
        try:
            view = describe(sample.record, run.encoder, slots)
        except TemplateError as error:
            console.say(f"{sample.record.id}: cannot be trained on: {error}")
            continue
        samples.append(sample)
        views.append(view)
        _draw(view, sample.record.images)
    console.say("[token] is supervised; (image k) stands for slots that image k's features fill")
    if run.splits.left_out.total:
        console.say(f"left out of {run.splits.found:,} records: {run.splits.left_out}")
    return {
        "samples": [
            {
                "id": view.id,
                "images": list(sample.record.images),
                "text": view.text,
                "target": view.target,
                "input_ids": [token.id for token in view.tokens],
                "is_slot": [token.is_slot for token in view.tokens],
                "is_supervised": [token.is_supervised for token in view.tokens],
            }
            for sample, view in zip(samples, views, strict=True)
        ]
    }


def _draw(view: SampleView, images: tuple[str, ...]) -> None:
    """One sample: marks that survive without colour, and colour where there is one."""
    from rich.text import Text

    supervised = sum(token.is_supervised for token in view.tokens)
    slots = sum(token.is_slot for token in view.tokens)
    out = Text()
    out.append(f"{view.id}  {', '.join(images)}", "bold")
    out.append(f"  {len(view.tokens)} tokens: {slots} slots, {supervised} supervised\n")
    # A run of slots of one image is one piece; every other token stands alone.
    for (is_slot, name, _), group in groupby(
        enumerate(view.tokens),
        key=lambda item: (
            item[1].is_slot,
            item[1].token,
            None if item[1].is_slot else item[0],
        ),
    ):
        tokens = [token for _, token in group]
        if is_slot:
            out.append(f"({name.strip('<>')} x {len(tokens)})", "cyan")
        elif tokens[0].is_supervised:
            out.append(f"[{_visible(name)}]", "green")
        else:
            out.append(_visible(name), "dim")
        if name.endswith("\n"):
            out.append("\n")
    out.append("ids  " if out.plain.endswith("\n") else "\nids  ", "bold")
    out.append(_ids(view), "dim")
    console.stderr().print(out, soft_wrap=True)
    console.say()


def _visible(token: str) -> str:
    return token.replace("\n", "\\n")


def _ids(view: SampleView) -> str:
    """Token ids; a run of equal ones is written once with its length."""
    runs = [(key, len(list(group))) for key, group in groupby(token.id for token in view.tokens)]
    return " ".join(f"{key}" if length == 1 else f"{key}x{length}" for key, length in runs)
