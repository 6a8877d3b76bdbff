"""`align parity`: cached against live."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli import console
from featcache.object_path import StorePath

if TYPE_CHECKING:
    from align.parity import ParityReport


@console.command("parity", interrupted="nothing was written; run the same command again")
@click.option(
    "--features",
    multiple=True,
    type=console.LOCATION,
    metavar="STORE",
    help="The store; several for a connector that takes several [with --run: the run's].",
)
@click.option("-n", "count", type=click.IntRange(1), default=8, show_default=True, help="Samples.")
@click.option("--config", metavar="NAME|FILE", help="A recipe of `align configs`, or a YAML file.")
@click.option("--run", type=Path, metavar="RUN", help="Take the connector and config of a run.")
@click.option(
    "--checkpoint", default="last", show_default=True, help="Of --run: last, best or a step."
)
@click.option(
    "--encoder",
    "encoders",
    multiple=True,
    metavar="NAME",
    help="Where the encoder is now [the store's name]; with several stores one for each.",
)
@click.option("--images", type=console.LOCATION, metavar="DIR", help="Image root [the store's].")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def parity(
    features: tuple[StorePath, ...],
    count: int,
    config: str | None,
    run: Path | None,
    checkpoint: str,
    encoders: tuple[str, ...],
    images: StorePath | None,
    overrides: tuple[str, ...],
) -> console.Result:
    """Cached against live: features, loss and gradients of N samples, from STORE and from their
    images; exit 1 where they differ by more than the codec and the compute explain.

    The connector is untrained (seeded), or that of --run; the language model is the config's.
    """
    from align.config import load_config
    from align.parity import compare
    from align.run import assemble, load_run

    if run is not None and config is not None:
        raise click.UsageError("--run has a config of its own; leave --config out")
    if run is None and not features:
        raise click.UsageError("give --features STORE, or --run RUN")
    if images is not None:  # the data files' paths are relative to it as well
        overrides = (*overrides, f"data.images={images}")
    if run is not None:
        loaded = load_run(run, checkpoint, features=features, overrides=overrides)
    else:
        loaded = assemble(load_config(config, overrides), features, Path())
    try:
        with console.Progress("parity", unit="samples") as progress:
            report = compare(
                loaded, count, encoders=encoders, images=images, on_progress=progress.update
            )
    finally:
        loaded.close()
    tell(report)
    comparisons = [{**asdict(each), "agrees": each.agrees} for each in report.comparisons]
    document = {**asdict(report), "comparisons": comparisons, "agrees": report.agrees}
    return console.Result(document, 0 if report.agrees else 1)


def tell(report: ParityReport) -> None:
    """The comparison as a table, and in one line what is wrong."""
    for line in report.not_compared:
        console.say(f"note: not compared: {line}")
    if not report.comparisons:
        console.fail(
            f"none of {console.count(report.asked, 'sample')} could be computed from its images, "
            "so nothing was compared; if they have moved, give --images DIR"
        )
        return
    console.table(
        ["", "worst", "allowed", "median", "where"],
        [
            (
                f"{each.what} of {each.of}" if each.of else each.what,
                f"{each.worst:.2g}",
                f"{each.allowed:.2g}",
                f"{each.median:.2g}",
                each.where,
            )
            for each in report.comparisons
        ],
        title=f"cached against live: {console.count(report.compared, 'sample')}, "
        f"{console.count(report.images, 'image')}, {report.precision}; relative errors",
        right=[1, 2, 3],
    )
    for each in report.roundings:
        console.say(
            f"{each.store}: {each.codec} costs {each.error:.2g} of the features, at most "
            f"{each.largest:.2g} in one value"
        )
    if report.agrees:
        console.say("they agree: what differs, the codec and the compute explain")
        return
    wrong = [each for each in report.comparisons if not each.agrees]
    first = wrong[0]
    if first.what == "features":
        why = (
            f"the features of {first.of} are not what its encoder gives: the store was made by "
            "other means than its fingerprint says"
        )
    else:
        what = " and ".join(each.what for each in wrong)
        why = f"the features agree, and yet {what} differ by more than they explain"
    console.fail(f"{why} ({first.where}: {first.worst:.2g}, allowed {first.allowed:.2g})")
