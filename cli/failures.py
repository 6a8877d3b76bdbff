"""`featcache failures`: the ledger of a store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from cli import console


@console.command("failures")
@click.argument("store", type=Path)
def failures(store: Path) -> console.Document:
    """List the images of STORE's data that have no features, and why."""
    import featcache

    found = featcache.open(store).failures()
    if found:
        console.table(["image", "reason", "detail"], [[f.key, f.reason, f.detail] for f in found])
    console.say(f"{len(found):,} images without features")
    return {"failures": [asdict(failure) for failure in found]}
