"""`featcache gc`: frees what a store no longer needs."""

from __future__ import annotations

import click

from cli import console
from featcache.object_path import StorePath, require_disk


@console.command("gc", interrupted="nothing is lost; run it again to go on")
@click.argument("store", type=console.LOCATION)
@click.option("--dry-run", is_flag=True, help="Only say what would be freed.")
def gc(store: StorePath, dry_run: bool) -> console.Result:
    """Free the features that no image of STORE means any more.

    They are of images whose bytes have changed since. Nothing else changes: rows keep their
    numbers, and whoever reads the store meanwhile reads the same. Stop it at any moment and run it
    again.
    """
    from featcache.gc import collect

    path = require_disk(store, "`featcache gc`")
    with console.Progress("gc", unit="shards") as progress:
        result = collect(path, dry_run=dry_run, on_progress=progress.update)
    verb = "would be freed" if dry_run else "freed"
    console.say(
        f"{store}: {result.rows:,} rows without an image key, {console.size(result.freed_bytes)} "
        f"{verb} in {result.shards:,} shards"
    )
    for shard, rows in result.damaged.items():
        console.fail(
            f"shard {shard} was left alone, {len(rows)} of its rows are damaged (first: row "
            f"{rows[0]}); `featcache verify {store} --repair` mends them, then run gc again"
        )
    document = {
        "path": str(store),
        "dry_run": dry_run,
        "rows": result.rows,
        "shards": result.shards,
        "freed_bytes": result.freed_bytes,
        "damaged": {str(shard): rows for shard, rows in result.damaged.items()},
    }
    return console.Result(document, exit_code=1 if result.damaged else 0)
