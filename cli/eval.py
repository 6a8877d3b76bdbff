"""`align eval`: held-out loss, captions and their scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli import console
from featcache.object_path import StorePath

if TYPE_CHECKING:
    from align.evaluate import EvalResult


@console.command("eval", interrupted="nothing was written; run the same command again")
@click.argument("run", type=Path)
@click.option("--split", default="val", show_default=True, help="val or train.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N samples.")
@click.option(
    "--shuffle-features",
    is_flag=True,
    help="The control: give every sample another one's image features.",
)
@click.option("--checkpoint", default="last", show_default=True, help="last, best or a step.")
@click.option(
    "--features",
    multiple=True,
    type=console.LOCATION,
    metavar="STORE",
    help="The store, where it has moved [the run's].",
)
@click.option("--temperature", type=click.FloatRange(0), help="0 is greedy [the run's setting].")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="For sampling [the run's setting]."
)
@click.option("--max-new-tokens", type=click.IntRange(1), help="[the run's setting]")
@click.option("--batch-size", type=click.IntRange(1), help="Captions at once [the run's setting].")
@click.option("--seed", type=int, help="Of the sampling [the run's setting].")
def evaluate(
    run: Path,
    split: str,
    limit: int | None,
    shuffle_features: bool,
    checkpoint: str,
    features: tuple[StorePath, ...],
    temperature: float | None,
    top_p: float | None,
    max_new_tokens: int | None,
    batch_size: int | None,
    seed: int | None,
) -> console.Document:
    """Held-out loss, token accuracy and generated captions of RUN, with their scores.

    Writes captions.jsonl, metrics.json and report.md to RUN/eval/SPLIT, or SPLIT-shuffled.
    """
    from align.evaluate import evaluate as library
    from align.run import load_run

    loaded = load_run(run, checkpoint, features=features)
    given: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
    }
    decoding = replace(
        loaded.config.eval, **{name: value for name, value in given.items() if value is not None}
    )
    with console.Progress("eval", unit="samples") as progress:
        result = library(
            loaded,
            split,
            limit=limit,
            shuffle_features=shuffle_features,
            decoding=decoding,
            on_progress=progress.update,
        )
    tell(result)
    return {"folder": str(result.folder), **result.document}


def tell(result: EvalResult) -> None:
    """The figures of one evaluation, as a table."""
    shuffled = " with shuffled features" if result.shuffled else ""
    console.table(
        ["metric", "value", "chance", "N"],
        [
            (
                name,
                f"{figure.value:.4f}",
                "" if figure.chance is None else f"{figure.chance:.4f}",
                f"{figure.n:,}",
            )
            for name, figure in result.figures.items()
        ],
        title=f"{result.split}{shuffled}, step {result.step:,}",
        right=[1, 2, 3],
    )
    if result.left_out.total:
        console.say(f"left out: {result.left_out}")
    console.say(f"{result.folder}: captions.jsonl, metrics.json, report.md")
