"""`featcache convert`: a store in another form or codec."""

from __future__ import annotations

from dataclasses import asdict

import click

from cli import console
from featcache.object_path import StorePath, require_disk


@console.command(
    "convert",
    interrupted="run the same command again: one to Zarr goes on, one to HDF5 begins again",
)
@click.argument("source", type=console.LOCATION, metavar="SRC")
@click.argument("out", type=console.LOCATION, metavar="DST")
@click.option("--codec", help="fp16, bf16, int8, fp8 or int4 [that of SRC].")
@click.option("--force", is_flag=True, help="Replace DST, once the new store is whole.")
def convert(source: StorePath, out: StorePath, codec: str | None, force: bool) -> console.Result:
    """Write the store SRC to DST: one HDF5 file where DST ends in .h5 or .hdf5, else Zarr.

    With the codec of SRC every stored byte stays the same. Every row is checked on the way.
    """
    from featcache.convert import ConvertProgress
    from featcache.convert import convert as run

    with console.Progress("convert", unit="images") as progress:

        def show(seen: ConvertProgress) -> None:
            if seen.resumed > progress.start:
                progress.start = seen.resumed
            progress.update(seen.done, seen.total, written=console.size(seen.nbytes))

        result = run(
            require_disk(source, "`featcache convert`"),
            require_disk(out, "`featcache convert`"),
            codec,
            force=force,
            on_progress=show,
        )
    if result.resumed:
        console.say(f"{result.resumed:,} images were in place from a run that was stopped")
    console.say(
        f"{result.path}: {result.images:,} images in {result.codec}, "
        f"{console.size(result.nbytes)}, {console.duration(result.seconds)}"
    )
    if result.codec != result.codec_from:
        also = (
            f"{result.codec} does not bring back what that lost"
            if result.finer
            else f"{result.codec} adds its own"
        )
        console.say(f"the features keep the rounding of {result.codec_from}; {also}")
    if not result.ok:
        lost = ", ".join(f"{count:,} {reason}" for reason, count in result.lost.items())
        console.fail(
            f"{lost}: images that {result.codec} cannot store; `featcache failures {result.path}` "
            "lists them"
        )
    document = {**asdict(result), "path": str(result.path)}
    return console.Result(document, 0 if result.ok else 1)
