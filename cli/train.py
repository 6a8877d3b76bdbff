"""`align train`: a feature store and a recipe -> a trained connector."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli import console
from featcache.object_path import StorePath

if TYPE_CHECKING:
    from align.tracking import Event
    from align.trainer import TrainResult


@console.command("train", interrupted="go on from the last checkpoint with --resume")
@click.option(
    "--features",
    required=True,
    multiple=True,
    type=console.LOCATION,
    metavar="STORE",
    help="The store to train on; once for each encoder of an SVA, in their order.",
)
@click.option("--config", metavar="NAME|FILE", help="A recipe of `align configs`, or a YAML file.")
@click.option(
    "--data",
    multiple=True,
    type=console.LOCATION,
    metavar="FILE",
    help="Data files; may be repeated [those the store was extracted from].",
)
@click.option("--images", type=console.LOCATION, metavar="DIR", help="Image root [the store's].")
@click.option("--llm", metavar="NAME", help="The language model: tiny, a hub id, or a folder.")
@click.option("--out", type=Path, default=Path("run"), show_default=True, metavar="RUN")
@click.option(
    "--init-from",
    type=Path,
    metavar="PATH",
    help="Start from the connector of a run, a checkpoint, or of `align import`.",
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in RUN.")
@click.option("--profile", is_flag=True, help="Write a trace of four steps to RUN/profile.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(
    features: tuple[StorePath, ...],
    config: str | None,
    data: tuple[StorePath, ...],
    images: StorePath | None,
    llm: str | None,
    out: Path,
    init_from: Path | None,
    resume: bool,
    profile: bool,
    overrides: tuple[str, ...],
) -> console.Result:
    """Train a connector from a feature store.

    KEY=VALUE changes one setting of the recipe, e.g. optim.lr=2e-4 connector.num_latents=32. Under
    torchrun or srun the same line runs on every rank. SIGTERM and SIGUSR1 end it after the step
    under way, with a checkpoint.
    """
    import os

    from align.config import load_config
    from align.trainer import train as run
    from featcache.executors.ranks import rank_from

    if resume and config is None and (out / "config.yaml").is_file():
        config = str(out / "config.yaml")  # --resume alone means: as it was started
    settings = load_config(config, overrides)
    if data:
        settings.data.files = [str(path) for path in data]
    if images is not None:
        settings.data.images = str(images)
    if llm is not None:
        settings.llm.name = llm
    if init_from is not None:
        settings.train.init_from = str(init_from)
    with TrainDisplay() as display:
        result = run(
            settings, list(features), out, resume=resume, on_event=display, profile=profile
        )
    # As a shell reports a signal, so that nobody takes the run for done.
    exit_code = 0 if result.stopped_by is None else 128 + result.stopped_by
    rank = rank_from(os.environ)
    if rank is not None and rank.index > 0:
        return console.Result(None, exit_code)  # rank 0 speaks for all
    return console.Result(summarise(result), exit_code)


def summarise(result: TrainResult) -> console.Document:
    """Says what training came to; returns the document of `--json`."""
    held_out = "" if result.eval_loss is None else f", held-out loss {result.eval_loss:.4f}"
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    console.say(
        f"{result.path}: {result.step:,} steps{loss}{held_out}, {console.duration(result.seconds)}"
    )
    stopped = None if result.stopped_by is None else result.stopped_by.name
    if stopped is not None:
        console.say(f"stopped by {stopped} with a checkpoint; go on with --resume")
    return {**asdict(result), "path": str(result.path), "stopped_by": stopped}


class TrainDisplay:
    """Shows a training's events: a bar for the steps, a line for everything that stays."""

    def __init__(self) -> None:
        self._bar: console.Progress | None = None

    def __call__(self, event: Event) -> None:
        from align import tracking

        match event:
            case tracking.StepEvent():
                if self._bar is None:
                    self._bar = console.Progress("train", "steps", event.total_steps, event.step)
                    self._bar.__enter__()
                shown: dict[str, Any] = {
                    "loss": f"{event.loss:.4f}",
                    "lr": f"{event.lr:.2e}",
                    "samples/s": f"{event.samples_per_s:,.0f}",
                    "waiting for data": f"{event.data_wait_ratio:.0%}",
                }
                if event.mfu is not None:
                    shown["MFU"] = f"{event.mfu:.0%}"
                self._bar.update(event.step, **shown)
            case tracking.EvalEvent():
                console.say(f"step {event.step:,}: held-out loss {event.loss:.4f}")
            case tracking.SampleEvent():
                for caption in event.captions[:2]:
                    console.say(
                        f"step {event.step:,}: {caption.reference!r} -> {caption.generated!r}"
                    )
            case tracking.NoticeEvent():
                console.say(event.text)
            case tracking.CheckpointEvent():
                pass  # every save would drown the rest; the newest one is named at the end

    def __enter__(self) -> TrainDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)  # type: ignore[arg-type]
