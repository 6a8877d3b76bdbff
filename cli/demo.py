"""`align demo`: the whole job on generated data, and whether it worked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli import console

if TYPE_CHECKING:
    from align.demo.run import DemoResult
    from align.tracking import Event
    from featcache.extract import ExtractProgress


@console.command("demo", interrupted="run the same command again to go on")
@click.option("--out", type=Path, default=Path("demo"), show_default=True, metavar="DIR")
@click.option("--fresh", is_flag=True, help="Start over: remove what an earlier demo left in DIR.")
@click.option(
    "--quick", is_flag=True, help="Every stage in seconds; learns nothing, judges nothing."
)
def demo(out: Path, fresh: bool, quick: bool) -> console.Result:
    """The whole job on generated data: extract, train, evaluate, report.

    A tiny SigLIP and a tiny Qwen3 that ship with this package are frozen; the connector between
    them is trained on captioned shapes and evaluated on scenes it has never seen. Exits 1 where
    the captions are not good enough, or good without looking at the image.
    """
    console.say("loading")
    from align.demo.run import QUICK, DemoSettings, Watch, run_demo

    with DemoDisplay() as display:
        watch = Watch(display.stage, display.extracted, display.trained, display.evaluated)
        result = run_demo(out, QUICK if quick else DemoSettings(), fresh=fresh, watch=watch)
    _tell(result, judged=not quick)
    document = {
        **dataclasses.asdict(result),
        "out": str(result.out),
        "report": str(result.report),
        "passed": None if quick else not result.missed,
    }
    return console.Result(document, 1 if result.missed else 0)


class DemoDisplay:
    """Shows the stages one after the other, each with its own progress."""

    def __init__(self) -> None:
        self._stage = ""
        self._open: console.Progress | None = None
        self._shown: object = None

    def stage(self, name: str) -> None:
        self._close()
        self._stage = name
        console.say(f"== {name}", style="bold")

    def extracted(self, progress: ExtractProgress) -> None:
        bar = self._bar(progress.stage, "images", progress.total)
        bar.update(progress.done, progress.total)

    def trained(self, event: Event) -> None:
        from cli.train import TrainDisplay

        if not isinstance(self._shown, TrainDisplay):
            self._shown = TrainDisplay()
        self._shown(event)

    def evaluated(self, done: int, total: int) -> None:
        self._bar(self._stage, "captions", total).update(done, total)

    def _bar(self, label: str, unit: str, total: int) -> console.Progress:
        if self._open is None or self._open.label != label:
            self._close()
            self._open = console.Progress(label, unit, total)
            self._open.__enter__()
        return self._open

    def _close(self) -> None:
        for shown in (self._open, self._shown):
            if shown is not None:
                shown.__exit__(None, None, None)  # type: ignore[attr-defined]
        self._open = self._shown = None

    def __enter__(self) -> DemoDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def _tell(result: DemoResult, judged: bool) -> None:
    from align.demo.run import BAR

    console.table(
        ["held-out scenes", "with features", "shuffled", "chance", "bar"],
        [
            (
                row.name,
                f"{row.value:.3f}",
                f"{row.shuffled:.3f}",
                f"{row.chance:.3f}",
                f"{BAR[row.name]:.2f}" if judged and row.name in BAR else "",
            )
            for row in result.rows
        ],
        title=f"{result.num_val:,} scenes that no training has seen",
        right=[1, 2, 3, 4],
    )
    times = ", ".join(f"{name} {console.duration(s)}" for name, s in result.seconds.items())
    console.say(f"{console.duration(sum(result.seconds.values()))}: {times}")
    console.say(f"report: {result.report}")
    for line in result.missed:
        console.fail(f"below the bar: {line}")
