"""`featcache extract`: images -> features -> store."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from cli import console
from featcache.object_path import ObjectPath, StorePath

if TYPE_CHECKING:
    from featcache.executors.ranks import Rank
    from featcache.extract import ExtractProgress, ExtractResult, Preflight
    from featcache.journal import Failure
    from featcache.worker import WorkProgress

SHOWN_REASONS = 5
"""Reasons for skipped records that are named, the commonest first; --json has all."""


@console.command("extract", interrupted="nothing is lost: run the same command again to go on")
@click.option("--model", required=True, help="A name from `featcache models`, a hub id, a folder.")
@click.option(
    "--data",
    required=True,
    multiple=True,
    type=console.LOCATION,
    metavar="FILE",
    help="JSON(L), YAML, tars, parquet or a folder: docs/inputs.md; may be a pattern, or s3://...; "
    "may be repeated.",
)
@click.option(
    "--images",
    type=console.LOCATION,
    metavar="DIR",
    help="What image paths are relative to, also s3://bucket/images [the first file's].",
)
@click.option(
    "--out",
    required=True,
    type=console.LOCATION,
    metavar="STORE",
    help="The store to make or add: a folder, or s3://bucket/store.zarr.",
)
@click.option(
    "--layer",
    "layers",
    multiple=True,
    default=("-2",),
    show_default=True,
    help="As in hidden_states, 'last' (after the final norm), or 'multi-stage' (ConvNeXt); may be "
    "repeated.",
)
@click.option(
    "--fit",
    default="checkpoint",
    show_default=True,
    metavar="HOW",
    help="How images get the encoder's size: as its checkpoint says, squash, crop (the middle), or "
    "pad (to a square of the mean colour, or pad:R,G,B).",
)
@click.option(
    "--codec",
    default="fp16",
    show_default=True,
    help="fp16, bf16, int8, fp8, int4: docs/codecs.md.",
)
@click.option("--batch-size", default="auto", show_default=True, help="Images per forward.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option(
    "--shard-images",
    type=click.IntRange(1),
    help="Rows a shard [the store's; if new 128, or 1 GB].",
)
@click.option("--limit", type=click.IntRange(1), help="Only the first N images.")
@click.option(
    "--tiles", metavar="GRIDS", help="Also cut images into tiles, e.g. 1x2,2x1,2x2 (any-res)."
)
@click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Who encodes: processes of this machine, or Ray actors (docs/scale.md).",
)
@click.option(
    "--workers", type=click.IntRange(1), help="Processes or actors [one for each GPU; 1 on a CPU]."
)
@click.option(
    "--decode-threads", type=click.IntRange(1), help="Of each worker [its share of the cores]."
)
@click.option(
    "--max-failures",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    metavar="RATIO",
    help="Exit 1 when a larger part of the images has no features.",
)
@click.option("--dry-run", is_flag=True, help="Scan, plan and probe; say what it would take.")
@click.option("--force", is_flag=True, help="Begin although the disk seems too small.")
@click.option("--compile", is_flag=True, help="torch.compile the encoder; costs a minute, once.")
@click.option("--random-weights", is_flag=True, help="Seeded random weights, for benchmarks.")
def extract(
    model: str,
    data: tuple[StorePath, ...],
    images: StorePath | None,
    out: StorePath,
    layers: tuple[str, ...],
    fit: str,
    codec: str,
    batch_size: str,
    device: str,
    shard_images: int | None,
    limit: int | None,
    tiles: str | None,
    executor: str,
    workers: int | None,
    decode_threads: int | None,
    max_failures: float,
    dry_run: bool,
    force: bool,
    compile: bool,
    random_weights: bool,
) -> console.Result:
    """Run a frozen vision encoder once over images and store its features.

    Run it again to go on after a stop, or with more data to append. Under torchrun or srun the same
    line runs on every rank.
    """
    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size)):
        raise click.BadParameter(
            f"{batch_size!r} is neither 'auto' nor a whole number above 0",
            param_hint="--batch-size",
        )
    from featcache.tiles import parse_grids

    grids = parse_grids(tiles) if tiles is not None else ()
    console.say(f"loading {model}" + (" with RANDOM weights" if random_weights else ""))
    from featcache.extract import ExtractOptions, assist, launched_as
    from featcache.extract import extract as run

    options = ExtractOptions(
        model=model,
        data=data,
        image_root=images,
        out=out,
        layers=layers,
        codec=codec,
        batch_size=None if batch_size == "auto" else int(batch_size),
        device=device,
        shard_images=shard_images,
        limit=limit,
        tiles=grids,
        executor=executor,
        workers=workers,
        decode_threads=decode_threads,
        max_failures=max_failures,
        random_weights=random_weights,
        dry_run=dry_run,
        force=force,
        fit=fit,
        compile=compile,
    )
    rank = launched_as(options)
    if rank is not None and rank.index > 0:
        if not dry_run:
            with RankLog(rank, out) as log:
                log.end(assist(options, rank, log, log.wait))
        return console.Result(None)  # rank 0 speaks for all
    with ExtractDisplay() as display:
        result = run(options, display)
    _summary(options.dry_run, result)
    document = {**asdict(result), "path": str(result.path)}
    document["preflight"]["seconds"] = result.preflight.seconds
    return console.Result(document, 0 if result.ok else 1)


class ExtractDisplay:
    """Shows an extraction's progress: one bar for the scan, one for the encoding."""

    def __init__(self) -> None:
        self._bar: console.Progress | None = None
        self._stage = ""
        self._began = 0.0
        self._backed_off: tuple[int, int] | None = None

    def __call__(self, progress: ExtractProgress) -> None:
        if progress.stage != self._stage:
            self._close()
            if progress.preflight is not None and progress.total:
                console.say(_expected(progress.preflight))
            self._stage, self._began = progress.stage, time.monotonic()
            self._bar = console.Progress(progress.stage, unit="images", total=progress.total)
            self._bar.__enter__()
        assert self._bar is not None
        work = progress.work
        shown = {}
        if work.failed:
            shown["failed"] = f"{work.failed:,}"
        if work.lost:
            shown["workers lost"] = str(work.lost)
        if work.seconds and work.done:
            shown["ms/image:"] = stages(work, time.monotonic() - self._began)
        self._bar.update(progress.done, progress.total, **shown)
        if work.backed_off is not None and work.backed_off != self._backed_off:
            self._backed_off = work.backed_off
            failed, worked = work.backed_off
            console.say(
                f"the encoder ran out of memory at {failed} images at once; going on with {worked}"
            )

    def __enter__(self) -> ExtractDisplay:
        return self

    def __exit__(self, *error: Any) -> None:
        self._close(*error)

    def _close(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(*(error or (None, None, None)))
            self._bar = None


class RankLog:
    """What a rank other than 0 says: in a file of its own below the store's journal, and where it
    fails on stderr."""

    def __init__(self, rank: Rank, out: StorePath) -> None:
        self._rank = rank
        self._path = out / "journal" / "jobs" / f"{rank.job}-rank{rank.index:05d}.log"
        self._lines = ""
        self._said = self._began = time.monotonic()

    def __call__(self, progress: ExtractProgress) -> None:
        if time.monotonic() - self._said >= console.PLAIN_EVERY_S:
            self._say(f"{progress.done:,} of {progress.total:,} images are done by all ranks")

    def wait(self) -> None:
        """Rank 0 has not spoken yet."""
        if time.monotonic() - self._said >= console.PLAIN_EVERY_S:
            self._said = time.monotonic()
            console.say(f"{self._rank} waits for rank 0 to read and plan the data")

    def end(self, work: WorkProgress) -> None:
        elapsed = time.monotonic() - self._began
        self._say(f"done in {console.duration(elapsed)}; ms/image: {stages(work, elapsed)}")

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._rank}: {text}\n"
        if isinstance(self._path, ObjectPath):  # nothing is appended to an object
            self._lines += line
            self._path.write([self._lines.encode()])
            return
        with contextlib.suppress(OSError), self._path.open("a") as file:  # it is only a log
            file.write(line)

    def __enter__(self) -> RankLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        if error is not None and self._path.parent.is_dir():
            self._say(f"stopped: {type(error).__name__}: {error}")


def stages(work: WorkProgress, elapsed_s: float) -> str:
    """Of each stage, ms an image and its share of the workers' time, e.g. "encode 24.1 (96 %)".
    The stages overlap, and decoding has several threads: the shares need not add up to 100 %."""
    own = max(1, work.own)
    return " ".join(
        f"{stage} {1000 * seconds / own:.1f} ({100 * seconds / elapsed_s / work.workers:.0f} %)"
        for stage, seconds in work.seconds.items()
    )


def _expected(preflight: Preflight) -> str:
    """E.g. "558,128 images to encode: 937.4 GB of 2.1 TB free, about 1 h 05 min"."""
    space = f"{console.size(preflight.nbytes)} "
    if preflight.free_bytes is None:
        space += "into a bucket, whose free space is not known"
    else:
        space += f"of {console.size(preflight.free_bytes)} free"
    text = f"{preflight.images:,} images to encode: {space}"
    if preflight.speed is None or preflight.seconds is None:
        return text
    speed = preflight.speed
    each = f" in each of {preflight.workers} workers" * (preflight.workers > 1)
    return (
        f"{text}, about {console.duration(preflight.seconds)} (a probe took "
        f"{1000 * speed.encode_s:.3g} ms an image to encode, {1000 * speed.decode_s:.3g} ms to "
        f"decode with {console.count(speed.workers, 'thread')}{each})"
    )


def _summary(dry_run: bool, result: ExtractResult) -> None:
    by_count = sorted(result.skipped.items(), key=lambda item: -item[1][0])
    for reason, (count, origin) in by_count[:SHOWN_REASONS]:
        console.say(f"skipped {count:,}: {reason} (first: {origin})")
    if len(by_count) > SHOWN_REASONS:
        rest = sum(count for _, (count, _) in by_count[SHOWN_REASONS:])
        console.say(f"skipped {rest:,} more, for {len(by_count) - SHOWN_REASONS:,} other reasons")
    if dry_run:
        console.say(f"{result.images:,} images; {_expected(result.preflight)}")
        for reason, count in result.failures.items():
            console.say(f"{count:,} cannot be read: {reason}")
        if result.first_failure:
            console.say(f"the first: {_told(result.first_failure)}")
        return
    took = [f"{result.new:,} new", console.duration(result.seconds)]
    if result.new:
        took.append(_peak(result))
    console.say(
        f"{result.path}: {result.features:,} of {result.images:,} images have features "
        f"({', '.join(took)})"
    )
    if result.first_failure:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in result.failures.items())
        console.say(
            f"without features: {reasons} (the first: {_told(result.first_failure)}); "
            f"`featcache failures {result.path}` lists them"
        )
    if not result.ok:
        cure = (
            "store them with --codec bf16 in a new store"
            if "overflow" in result.failures
            else "mend the images and run again, or allow more with --max-failures"
        )
        console.fail(f"more images failed than allowed; {cure}")


def _told(failure: Failure) -> str:
    return f"{failure.key}: {failure.detail or failure.reason}"


def _peak(result: ExtractResult) -> str:
    work = result.work
    each = " for each worker" * (work.workers > 1)
    gpu = f" and {console.size(work.peak_gpu_bytes)} of GPU memory" * bool(work.peak_gpu_bytes)
    lost = f"; {work.lost} workers were lost and replaced" * bool(work.lost)
    return f"at most {console.size(work.peak_ram_bytes)} of RAM{gpu}{each}{lost}"
