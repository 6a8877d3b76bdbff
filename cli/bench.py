"""`align bench`: how fast stored features are read, beside other formats and memcpy; how near an
extraction comes to the bare encoder; what a training step gains by stored features."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli import console

if TYPE_CHECKING:
    from align.bench.extract import ExtractPlan
    from align.bench.step import StepPlan
    from align.bench.store import Plan

PERCENTILES = ("p20", "p50", "p80")


@console.command("bench", interrupted="what was written is removed")
@click.argument("what", type=click.Choice(["store", "extract", "step", "all"]), default="store")
@click.option("--quick", is_flag=True, help="64 images, fewer rounds, warm and cold only.")
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where the formats are written, on the disk to measure.  [default: the temporary folder]",
)
@click.option(
    "--images",
    type=click.IntRange(1),
    help="[default: 512, quick 64; extract: 4096 on CUDA, else 16; step: 512 on CUDA, else 8]",
)
@click.option("--shape", default="729x1152", show_default=True, help="Patches x width of an image.")
@click.option("--providers", default="", metavar="A,B", help="Those whose names contain a word.")
@click.option(
    "--cache", "caches", metavar="A,B", help="Of warm, cold, small-ram.  [default: all of them]"
)
@click.option(
    "--model", default="siglip2-so400m", show_default=True, help="extract, step: the encoder."
)
@click.option(
    "--batch-size",
    "batch_sizes",
    default="",
    metavar="N,N",
    help="extract: images a forward. step: samples; of several each loop takes its fastest.  "
    "[default: 64 on CUDA, else 4]",
)
@click.option("--device", default="auto", help="extract, step: auto, cpu, cuda.")
@click.option("--rounds", type=click.IntRange(1), help="extract, step  [default: 3, quick 1]")
@click.option("--workers", type=click.IntRange(0), default=0, help="extract: against one core.")
@click.option(
    "--compile", "compiled", is_flag=True, help="extract, step: torch.compile the encoder."
)
@click.option(
    "--llm",
    "llms",
    multiple=True,
    metavar="A,B",
    help="step: tiny, mid (48 M, random weights), a folder or a hub id; with --random-weights any "
    "size that `align plan` knows.  [default: tiny,mid; on CUDA Qwen3-0.6B]",
)
@click.option("--random-weights", is_flag=True, help="step: of the LLMs; the encoder's always are.")
@click.option(
    "--tokens", default="64", show_default=True, metavar="N,N",
    help="step: visual tokens of an image: the resampler's, or the encoder's patches for the MLP.",
)  # fmt: skip
@click.option(
    "--loops", default="cached,live,plain", show_default=True, help="step: which of them."
)
@click.option(
    "--steps", type=click.IntRange(1), default=1, show_default=True,
    help="step: timed in a pass, at least.",
)  # fmt: skip
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto")
@click.option("--minutes", type=click.FloatRange(0), help="step: no further round begins later.")
@click.option("--one-process", is_flag=True, help="step: for a debugger; memory is then of all.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Rows go here, as JSON lines."
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def bench(
    what: str,
    quick: bool,
    folder: Path | None,
    images: int | None,
    shape: str,
    providers: str,
    caches: str | None,
    model: str,
    batch_sizes: str,
    device: str,
    rounds: int | None,
    workers: int,
    compiled: bool,
    llms: tuple[str, ...],
    random_weights: bool,
    tokens: str,
    loops: str,
    steps: int,
    precision: str,
    minutes: float | None,
    one_process: bool,
    out: Path | None,
    overrides: tuple[str, ...],
) -> console.Result:
    """store: random and sequential batches of stored features, from every format, beside memcpy.

    What peers are not installed is left out, with the command that installs them. Every value is
    compared before anything is timed; exits 1 where a provider fails. docs/performance.md says what
    the columns mean.

    extract: the real command with random weights on images of a disk, beside the encoder alone;
    with --workers also beside one worker on one core.

    step: the same samples trained on from stored features (cached), with the encoder in the step
    (live), and by a plain loop of Hugging Face's parts; refused where they do not agree. KEY=VALUE
    changes a setting of the run, as for `align train`. Break-even for every Qwen3 follows.

    all: store, extract and step, one after the other.
    """
    from featcache.device import resolve_device

    if overrides and what in ("store", "extract"):
        raise click.UsageError(f"{overrides[0]}: KEY=VALUE is for `align bench step`")
    on_cuda = resolve_device(device).type == "cuda"
    sizes = _numbers("--batch-size", batch_sizes or ("64" if on_cuda else "4"))
    repeats = rounds or (1 if quick else 3)

    def of_store() -> console.Result:
        return _store(_plan(quick, images, shape, caches), providers, folder, out)

    def of_extract() -> console.Result:
        from align.bench.extract import ExtractPlan

        extraction = ExtractPlan(
            model,
            images=images or (4096 if on_cuda and not quick else 16),
            batch_size=sizes[0],
            rounds=repeats,
            device=device,
            workers=workers,
            compile=compiled,
        )
        return _extract(extraction, folder, out)

    def of_step() -> console.Result:
        from align.bench.loops import LOOPS
        from align.bench.step import StepPlan

        default = "Qwen3-0.6B" if on_cuda else "tiny" if quick else "tiny,mid"
        chosen = _words("--loops", loops, tuple(LOOPS))
        named = [name for given in llms for name in given.split(",") if name]
        plan = StepPlan(
            model=model,
            llms=tuple(named or default.split(",")),
            tokens=_numbers("--tokens", tokens),
            images=images or (512 if on_cuda else 8),
            batch_sizes=sizes,
            steps=steps,
            pass_s=5.0 if on_cuda else 2.0,
            warm_s=3.0 if on_cuda else 0.5,
            rounds=repeats,
            device=str(resolve_device(device)),
            precision=("bf16" if on_cuda else "fp32") if precision == "auto" else precision,
            random_weights=random_weights or (on_cuda and not named),
            compile=compiled,
            overrides=overrides,
            loops={name: LOOPS[name] for name in chosen},
            apart=not one_process,
            limit_s=math.inf if minutes is None else 60 * minutes,
        )
        return _step(plan, folder, out)

    each = {"store": of_store, "extract": of_extract, "step": of_step}
    if what != "all":
        return each[what]()
    if out is not None:
        raise click.UsageError("--out: give it to store, extract and step, one by one")
    documents = {name: measured() for name, measured in each.items()}
    return console.Result(
        {"benchmark": "all", **{name: done.document for name, done in documents.items()}},
        exit_code=max(done.exit_code for done in documents.values()),
    )


def _store(plan: Plan, providers: str, folder: Path | None, out: Path | None) -> console.Result:
    import tempfile

    from align.bench import results
    from align.bench.providers import choose
    from align.bench.store import Watch, measure
    from align.bench.tables import RIGHT, tables

    chosen = choose([word.strip() for word in providers.split(",") if word.strip()])
    with (
        tempfile.TemporaryDirectory(prefix="align-bench-", dir=folder) as work,
        console.Progress("bench", unit="steps") as progress,
    ):
        found = measure(Path(work), plan, chosen, Watch(progress.note, progress.update))
    for table in tables(found.rows):
        console.table(table.columns, table.rows, title=table.title, right=RIGHT)
    if out is not None:
        results.write(out, found.rows)
        console.say(f"rows: {out}")
    document = {
        "benchmark": "store",
        "results": found.rows,
        "left_out": found.left_out,
        "failed": found.failed,
    }
    return console.Result(document, exit_code=1 if found.failed else 0)


def _step(plan: StepPlan, folder: Path | None, out: Path | None) -> console.Result:
    import tempfile
    from dataclasses import asdict

    from align.bench import break_even, results
    from align.bench.step import measure
    from align.bench.step_tables import RIGHT, break_even_tables, tables

    def keep(rows: list[dict[str, Any]]) -> None:
        if out is not None:
            results.write(out, rows)

    with tempfile.TemporaryDirectory(prefix="align-bench-", dir=folder) as work:
        found = measure(Path(work), plan, console.say, keep)
    measured, planned = break_even.measured(found.rows), break_even.planned(found.rows)
    for table in [*tables(found.rows), *break_even_tables(measured, planned)]:
        right = tuple(place for place in RIGHT if place < len(table.columns))
        console.table(table.columns, table.rows, title=table.title, right=right)
    if out is not None:
        console.say(f"rows: {out}")
    document = {
        "benchmark": "step",
        "results": found.rows,
        "failed": found.failed,
        "break_even": [asdict(each) for each in measured],
        "planned": [asdict(each) for each in planned],
    }
    return console.Result(document, exit_code=1 if found.failed else 0)


def _extract(plan: ExtractPlan, folder: Path | None, out: Path | None) -> console.Result:
    import tempfile

    from align.bench import results
    from align.bench.extract import measure

    with tempfile.TemporaryDirectory(prefix="align-bench-", dir=folder) as work:
        rows = measure(Path(work), plan, console.say)
    console.table(
        ["", "metric", "unit", "p20", "p50", "p80"],
        [
            [row["provider"], row["metric"], row["unit"], *(f"{row[p]:.4g}" for p in PERCENTILES)]
            for row in rows
        ],
        title=f"{plan.model}, batches of {plan.batch_size}, {plan.images} images",
        right=(3, 4, 5),
    )
    if out is not None:
        results.write(out, rows)
        console.say(f"rows: {out}")
    return console.Result({"benchmark": "extract", "results": rows})


def _plan(quick: bool, images: int | None, shape: str, caches: str | None) -> Plan:
    """Raises ConfigError for a wrong --shape or --cache."""
    from align.bench.providers import CACHES
    from align.bench.providers.base import Data
    from align.bench.store import full_plan, quick_plan
    from featcache.errors import ConfigError

    try:
        num_patches, width = map(int, shape.split("x"))
        if min(num_patches, width) < 1:
            raise ValueError
    except ValueError:
        raise ConfigError(f"--shape {shape}: must be like 729x1152, patches x width") from None
    default = "warm,cold" if quick else ",".join(CACHES)
    wanted = (default if caches is None else caches).split(",")
    for cache in wanted:
        if cache not in CACHES:
            raise ConfigError(f"--cache: no state {cache!r}{console.did_you_mean(cache, CACHES)}")
    data = Data(images or (64 if quick else 512), num_patches, width)
    make = quick_plan if quick else full_plan
    return make(data, tuple(cache for cache in CACHES if cache in wanted))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Of "64,144". Raises ConfigError for what is no number above 0."""
    from featcache.errors import ConfigError

    try:
        found = tuple(int(word) for word in text.split(","))
        if min(found) < 1:
            raise ValueError
    except ValueError:
        raise ConfigError(f"{option} {text}: must be numbers above 0, e.g. 64,144") from None
    return found


def _words(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    """Of "a,b". Raises ConfigError for one that is not known."""
    from featcache.errors import ConfigError

    for word in text.split(","):
        if word not in known:
            raise ConfigError(f"{option}: no {word!r}{console.did_you_mean(word, known)}")
    return text.split(",")
