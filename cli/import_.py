"""`align import`: a projector of LLaVA or Cambrian, for `align train --init-from`."""

from __future__ import annotations

from pathlib import Path

import click

from cli import console


@console.command("import")
@click.argument("file", type=Path)
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(["llava", "cambrian"]),
    help="Whose file it is: mm_projector.bin, or mm_projector.pth.",
)
@click.option(
    "--out",
    required=True,
    type=Path,
    metavar="DIR|FILE",
    help="A folder, or a .safetensors file.",
)
def import_file(file: Path, form: str, out: Path) -> console.Document:
    """Write the projector in FILE as weights that `align train --init-from` starts from."""
    from align.interop import import_projector

    imported = import_projector(file, form, out)
    console.say(
        f"{imported.file}: {imported.parameters:,} parameters; start from it with\n"
        f"align train --init-from {imported.file} {imported.settings} ..."
    )
    return {
        "file": str(imported.file),
        "settings": imported.settings,
        "parameters": imported.parameters,
    }
