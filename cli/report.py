"""`align report`: a run as one static HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from cli import console


@console.command("report")
@click.argument("run", type=Path)
def report(run: Path) -> console.Document:
    """Write RUN/report.html: results, curves, captions beside their images.

    One file that needs no network, readable on a phone, in light and dark.
    """
    from align.report import write_report

    path = write_report(run)
    console.say(f"{path} ({console.size(path.stat().st_size)})")
    return {"report": str(path)}
