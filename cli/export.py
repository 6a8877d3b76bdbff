"""`align export`: a trained run in the files that other tools load."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from cli import console


@console.command("export", interrupted="nothing was written")
@click.argument("run", type=Path)
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(["llava", "cambrian", "hf"]),
    help="llava, cambrian: the projector's file; hf: the whole model for transformers.",
)
@click.option("--out", required=True, type=Path, metavar="DIR", help="A new folder.")
@click.option("--checkpoint", default="last", show_default=True, help="last, best or a step.")
@click.option(
    "--encoder",
    "encoders",
    multiple=True,
    metavar="NAME",
    help="hf: where the encoder is now [the name in the checkpoint].",
)
@click.option("--force", is_flag=True, help="Replace an earlier export in DIR.")
def export(
    run: Path, form: str, out: Path, checkpoint: str, encoders: tuple[str, ...], force: bool
) -> console.Document:
    """Write RUN's connector for LLaVA or Cambrian, or all of its model for transformers.

    What a format cannot express is refused, and the one that can is named.
    """
    from align.interop import export_run

    written = export_run(run, form, out, checkpoint=checkpoint, encoders=encoders, force=force)
    for notice in written.notices:
        console.say(notice)
    console.say(f"{written.path}: step {written.step:,}, {console.size(written.nbytes)}")
    return {**asdict(written), "path": str(written.path)}
