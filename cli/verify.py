"""`featcache verify`: whether a store is what was written, and mending what is not."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from cli import console
from featcache.errors import FeatcacheError
from featcache.object_path import StorePath, require_disk

if TYPE_CHECKING:
    from featcache.live import LiveReport
    from featcache.verify import VerifyProgress, VerifyReport

SHOWN_PROBLEMS = 50
"""Lines for people; --json has all."""


@console.command("verify", interrupted="nothing is lost: run the same command again")
@click.argument("store", type=console.LOCATION)
@click.option("--repair", is_flag=True, help="Mend what can be mended; good rows never change.")
@click.option(
    "--live",
    type=click.IntRange(1),
    metavar="N",
    help="Encode N random images again and compare what is stored.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the choice of --live.",
)
@click.option("--model", help="The store's encoder by another name or folder, if it has moved.")
@click.option(
    "--images",
    type=console.LOCATION,
    metavar="DIR",
    help="Where the images lie now, if they have moved; also s3://bucket/images.",
)
@click.option("--device", help="Of --live: cpu, cuda, cuda:1 [as the store was made].")
@click.option(
    "--workers", type=click.IntRange(1), default=2, show_default=True, help="Reading threads."
)
def verify(
    store: StorePath,
    repair: bool,
    live: int | None,
    seed: int,
    model: str | None,
    images: StorePath | None,
    device: str | None,
    workers: int,
) -> console.Result:
    """Check every byte of STORE against what was written; exit 1 where something is wrong."""
    from featcache.verify import verify as check

    path = require_disk(store, "`featcache verify`")
    if images is not None:
        _require_folder(images)
    with _Display() as display:
        if repair:
            from featcache.repair import repair as mend

            report = mend(path, workers=workers, model=model, images=images, on_progress=display)
        else:
            report = check(path, workers=workers, on_progress=display)
    _show(report, repair)
    document = _document(report)
    compared = True
    if live:
        from featcache.live import compare_live

        try:
            outcome = compare_live(path, live, seed=seed, model=model, images=images, device=device)
        except FeatcacheError as error:
            console.fail(str(error))
            document["live"] = {"error": str(error)}
            return console.Result(document, error.exit_code)
        compared = _show_live(outcome)
        document["live"] = asdict(outcome)
    return console.Result(document, 0 if report.ok and compared else 1)


def _require_folder(images: StorePath) -> None:
    try:
        is_there = images.is_dir()
    except OSError as error:
        raise click.BadParameter(f"{images}: {error.strerror}", param_hint="--images") from None
    if not is_there:
        raise click.BadParameter(f"{images} is not a directory", param_hint="--images")


def _document(report: VerifyReport) -> dict[str, Any]:
    return {**asdict(report), "path": str(report.path), "ok": report.ok}


def _show(report: VerifyReport, repair: bool) -> None:
    for note in report.notes[:SHOWN_PROBLEMS]:
        console.say(f"note: {note}")
    for problem in report.mended[:SHOWN_PROBLEMS]:
        console.say(f"mended: {problem}")
    for line in report.lost[:SHOWN_PROBLEMS]:
        console.say(f"lost: {line}")
    for problem in report.problems[:SHOWN_PROBLEMS]:
        cure = f"; --repair {problem.cure}" if problem.cure and not repair else ""
        console.say(f"problem: {problem}{cure}")
    for name, listed in (
        ("notes", report.notes), ("mended", report.mended),
        ("lost", report.lost), ("problems", report.problems),
    ):  # fmt: skip
        if len(listed) > SHOWN_PROBLEMS:
            console.say(f"{len(listed) - SHOWN_PROBLEMS:,} more {name}; --json lists them")
    rate = report.nbytes / report.seconds if report.seconds else 0
    console.say(
        f"{report.path}: {console.count(report.images, 'image')} in "
        f"{console.count(report.shards, 'shard')} of "
        f"{console.count(report.generations, 'generation')}, {console.size(report.nbytes)} read in "
        f"{console.duration(report.seconds)} ({console.size(rate)}/s)"
    )
    if report.ok:
        mended = f"; {console.count(len(report.mended), 'problem')} mended" if report.mended else ""
        console.say(f"whole{mended}")
        return
    if report.lost:
        lost = console.count(len(report.lost), "image")
        console.fail(
            f"the features of {lost} are lost (`featcache failures {report.path}` lists them); "
            "bring the files back and run `featcache extract` again"
        )
    if repair and report.problems:
        console.fail(f"{console.count(len(report.problems), 'problem')} could not be mended")
    if repair:
        return
    curable = sum(bool(problem.cure) for problem in report.problems)
    if curable:
        how_many = "all" if curable == len(report.problems) else "some"
        cure = f"`featcache verify {report.path} --repair` mends {how_many}"
    else:
        cure = "nothing can mend that; take another copy, or make it again"
    console.fail(f"{console.count(len(report.problems), 'problem')}; {cure}")


def _show_live(outcome: LiveReport) -> bool:
    """Returns whether what was compared agrees, and something was."""
    for line in outcome.not_compared[:SHOWN_PROBLEMS]:
        console.say(f"note: not compared: {line}")
    for line in outcome.wrong[:SHOWN_PROBLEMS]:
        console.say(f"problem: {line}")
    if not outcome.compared:
        console.fail("no image could be encoded again, so nothing was compared with a live encoder")
        return False
    worst = ", ".join(
        f"{'' if name == 'pooled' else 'layer '}{name}: {error:.2g} (allowed "
        f"{outcome.tolerance[name]:.2g})"
        for name, error in outcome.worst.items()
    )
    console.say(f"live: {outcome.compared:,} images encoded again; largest relative error: {worst}")
    if outcome.wrong:
        console.fail(
            f"{len(outcome.wrong):,} outputs are not what the encoder gives: the store was made by "
            "other means than its fingerprint says"
        )
    return not outcome.wrong


class _Display:
    """One bar for the reading, one for the repair."""

    def __init__(self) -> None:
        self._bar: console.Progress | None = None
        self._stage = ""

    def __call__(self, progress: VerifyProgress) -> None:
        in_bytes = progress.stage == "verify"
        if progress.stage != self._stage:
            self._close()
            self._stage = progress.stage
            self._bar = console.Progress(progress.stage, unit="MB" if in_bytes else "shards")
            self._bar.__enter__()
        assert self._bar is not None
        unit = 1_000_000 if in_bytes else 1
        self._bar.update(progress.done // unit, progress.total // unit)

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *error: Any) -> None:
        self._close(*error)

    def _close(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(*(error or (None, None, None)))
            self._bar = None
