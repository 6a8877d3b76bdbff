"""The whole job on generated data, as `align demo` runs it: every part is the real one.

    OUT/demo.json      the settings that everything below was made with
    OUT/data/          captioned shapes: train.jsonl, val.jsonl (held-out scenes), images/
    OUT/store.zarr     features of all images, by the tiny SigLIP
    OUT/run/           the connector's training run, its evaluations, report.html

Run it again after a stop: finished parts are kept, the others go on where they were.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from align.config import diff_fields, find_config, load_config
from align.demo.shapes import ATTRIBUTES, write_dataset
from align.errors import RunError
from align.evaluate import EvalResult, evaluate
from align.report import require_packages, write_report
from align.run import load_run
from align.tracking import Event
from align.trainer import train
from featcache.extract import ExtractOptions, ExtractProgress, extract
from featcache.files import publish_json, read_json

BAR = {"attributes": 0.90, "exact_match": 0.50}
"""What a demo must reach on held-out scenes."""
CHANCE_MARGIN = 0.10
"""How far above chance it may be with shuffled features; the spread at 500 scenes is about 0.01."""
SHOWN = (*ATTRIBUTES, "attributes", "exact_match")


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """How large a demo is.

    num_train, num_val: scenes; those of val are of combinations that training never sees.
    seed: of the scenes. config: recipe of the training. overrides: KEY=VALUE on top of it.
    judged: whether the bar applies.
    """

    num_train: int = 6000
    num_val: int = 500
    seed: int = 0
    config: str = "demo"
    overrides: tuple[str, ...] = ()
    judged: bool = True


QUICK = DemoSettings(
    num_train=96,
    num_val=24,
    overrides=("train.steps=4", "train.batch_size=16", "train.eval_every=2", "train.log_every=1"),
    judged=False,
)
"""Every stage in seconds, for tests and for a first look; nothing is learned in four steps."""


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One figure on the held-out scenes."""

    name: str
    value: float
    shuffled: float
    chance: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a demo came to. seconds: by stage. missed: what fell short of the bar, one line each."""

    out: Path
    report: Path
    num_val: int
    rows: list[DemoRow]
    seconds: dict[str, float]
    missed: list[str]


def _ignore(*_: object) -> None:
    """The default of every callback."""


@dataclass(slots=True)
class Watch:
    """What a demo tells while it runs. evaluated: samples done, samples in all."""

    stage: Callable[[str], None] = _ignore
    extracted: Callable[[ExtractProgress], None] = _ignore
    trained: Callable[[Event], None] = _ignore
    evaluated: Callable[[int, int], None] = _ignore
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """One stage: told at its start, its seconds kept at its end."""
        self.stage(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def run_demo(
    out: Path, settings: DemoSettings, *, fresh: bool = False, watch: Watch | None = None
) -> DemoResult:
    """Makes data, extracts features, trains, evaluates with right and with shuffled features, and
    writes the report.

    fresh: first removes what an earlier demo left in `out`, and nothing else.

    Raises RunError where `out` holds something else than a demo, or one of other settings.
    """
    watch = watch or Watch()
    # What can be wrong is found before minutes are spent, not after.
    require_packages()
    config = load_config(settings.config, settings.overrides)
    _prepare(out, settings, fresh)
    data, store, run_dir = out / "data", out / "store.zarr", out / "run"

    with watch.timed("data"):
        files = write_data(data, settings)
    with watch.timed("extract"):
        options = ExtractOptions(model="tiny", data=files, image_root=data, out=store)
        extract(options, watch.extracted)
    with watch.timed("train"):
        config.data.files = [str(files[0].absolute())]
        config.data.val_files = [str(files[1].absolute())]
        config.data.images = str(data.absolute())
        train(config, [store], run_dir, resume=True, on_event=watch.trained)
    run = load_run(run_dir)
    with watch.timed("eval"):
        own = evaluate(run, on_progress=watch.evaluated)
    with watch.timed("eval, shuffled"):
        shuffled = evaluate(run, shuffle_features=True, on_progress=watch.evaluated)
    with watch.timed("report"):
        report = write_report(run_dir)

    rows = _rows(own, shuffled)
    return DemoResult(
        out=out,
        report=report,
        num_val=len(own.captions),
        rows=rows,
        seconds=watch.seconds,
        missed=_missed(rows) if settings.judged else [],
    )


def _prepare(out: Path, settings: DemoSettings, fresh: bool) -> None:
    """Leaves `out` either empty or holding a demo of these settings."""
    stamp = out / "demo.json"
    # By way of JSON, so that tuples compare equal to the lists that they become on disk.
    wanted = json.loads(json.dumps(dataclasses.asdict(settings)))
    wanted["recipe"] = find_config(settings.config).read_text(encoding="utf-8")
    if stamp.is_file():
        if fresh:
            for name in ("data", "store.zarr", "run"):
                shutil.rmtree(out / name, ignore_errors=True)
            stamp.unlink()
        elif changed := diff_fields(read_json(stamp), wanted):
            names = ", ".join(line.split(":")[0] for line in changed)
            raise RunError(
                f"{out}: holds a demo of other settings ({names}); add --fresh to start over, or "
                "choose another --out"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: exists and is no demo's folder; choose another --out")
    publish_json(stamp, wanted)


def write_data(folder: Path, settings: DemoSettings) -> tuple[Path, Path]:
    """train.jsonl and val.jsonl; written anew unless an earlier call came to its end."""
    complete = folder / "complete.json"
    if not complete.is_file():
        write_dataset(folder, settings.num_train, settings.num_val, settings.seed)
        publish_json(complete, {"train": settings.num_train, "val": settings.num_val})
    return folder / "train.jsonl", folder / "val.jsonl"


def _rows(own: EvalResult, shuffled: EvalResult) -> list[DemoRow]:
    rows = []
    for name in SHOWN:
        figure = own.figures[name]
        assert figure.chance is not None  # every record of the demo is of the shapes set
        rows.append(DemoRow(name, figure.value, shuffled.figures[name].value, figure.chance))
    return rows


def _missed(rows: list[DemoRow]) -> list[str]:
    by_name = {row.name: row for row in rows}
    missed = []
    for name, least in BAR.items():
        row = by_name[name]
        if row.value < least:
            missed.append(f"{name} is {row.value:.3f}, must be at least {least:.2f}")
        if row.shuffled > row.chance + CHANCE_MARGIN:
            missed.append(
                f"{name} with shuffled features is {row.shuffled:.3f}, chance is {row.chance:.3f}"
            )
    return missed
