"""`align caption`: the live path, from an image file to words."""

from __future__ import annotations

from pathlib import Path

import click

from cli import console
from featcache.object_path import StorePath


@console.command("caption")
@click.argument("run", type=Path)
@click.argument("images", nargs=-1, required=True, type=console.LOCATION, metavar="IMAGE...")
@click.option("--checkpoint", default="last", show_default=True, help="last, best or a step.")
@click.option(
    "--encoder",
    "encoders",
    multiple=True,
    metavar="NAME",
    help="Where the encoder is now [the store's name]; with several stores one for each.",
)
@click.option("--temperature", type=click.FloatRange(0), help="0 is greedy [the run's setting].")
def caption(
    run: Path,
    images: tuple[StorePath, ...],
    checkpoint: str,
    encoders: tuple[str, ...],
    temperature: float | None,
) -> console.Document:
    """Caption images on the live path: encode, connect, generate.

    An image is a file, s3://bucket/a.jpg, or lies in a tar or parquet file (00000.tar/0001.jpg).
    The encoder must be the one that RUN's store was made with.
    """
    from align.live import caption_images
    from align.run import load_speaker

    loaded = load_speaker(run, checkpoint)
    said = caption_images(loaded, images, encoders=encoders, temperature=temperature)
    for path, text in zip(images, said, strict=True):
        console.say(f"{path}: {text}")
    return {
        "captions": [
            {"image": str(path), "caption": text} for path, text in zip(images, said, strict=True)
        ]
    }
