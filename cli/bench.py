"""`align bench`: how fast stored features are read, beside other formats and memcpy; how near an
extraction comes to the bare encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli import console

if TYPE_CHECKING:
    from align.bench.extract import ExtractPlan
    from align.bench.store import Plan

PERCENTILES = ("p20", "p50", "p80")


@console.command("bench", interrupted="what was written is removed")
@click.argument("what", type=click.Choice(["store", "extract"]), default="store")
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
    help="[default: 512, quick 64; extract: 4096 on CUDA, else 16]",
)
@click.option("--shape", default="729x1152", show_default=True, help="Patches x width of an image.")
@click.option("--providers", default="", metavar="A,B", help="Those whose names contain a word.")
@click.option(
    "--cache", "caches", metavar="A,B", help="Of warm, cold, small-ram.  [default: all of them]"
)
@click.option("--model", default="siglip2-so400m", show_default=True, help="extract: the encoder.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="extract: images a forward.  [default: 64 on CUDA, else 4]",
)
@click.option("--device", default="auto", help="extract: auto, cpu, cuda.")
@click.option("--rounds", type=click.IntRange(1), help="extract  [default: 3, quick 1]")
@click.option("--workers", type=click.IntRange(0), default=0, help="extract: against one core.")
@click.option("--compile", "compiled", is_flag=True, help="extract: torch.compile the encoder.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Rows go here, as JSON lines."
)
def bench(
    what: str,
    quick: bool,
    folder: Path | None,
    images: int | None,
    shape: str,
    providers: str,
    caches: str | None,
    model: str,
    batch_size: int | None,
    device: str,
    rounds: int | None,
    workers: int,
    compiled: bool,
    out: Path | None,
) -> console.Result:
    """store: random and sequential batches of stored features, from every format, beside memcpy.

    What peers are not installed is left out, with the command that installs them. Every value is
    compared before anything is timed; exits 1 where a provider fails. docs/performance.md says what
    the columns mean.

    extract: the real command with random weights on images of a disk, beside the encoder alone;
    with --workers also beside one worker on one core.
    """
    import tempfile

    if what == "extract":
        from align.bench.extract import ExtractPlan
        from featcache.device import resolve_device

        on_cuda = resolve_device(device).type == "cuda"
        extraction = ExtractPlan(
            model,
            images=images or (4096 if on_cuda and not quick else 16),
            batch_size=batch_size or (64 if on_cuda else 4),
            rounds=rounds or (1 if quick else 3),
            device=device,
            workers=workers,
            compile=compiled,
        )
        return _extract(extraction, folder, out)

    from align.bench import results
    from align.bench.providers import choose
    from align.bench.store import Watch, measure
    from align.bench.tables import RIGHT, tables

    plan = _plan(quick, images, shape, caches)
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
        "benchmark": what,
        "results": found.rows,
        "left_out": found.left_out,
        "failed": found.failed,
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
