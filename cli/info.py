"""`featcache info`: what a store holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from cli import console


@console.command("info")
@click.argument("store", type=Path)
def info(store: Path) -> console.Document:
    """Shape, codec, encoder, rows, failures and bytes of STORE."""
    import featcache
    from featcache.fingerprint import flatten
    from featcache.journal import Journal

    opened = featcache.open(store)
    journal = Journal.load(store)
    planned = journal.num_shards
    done = planned - len(journal.pending)
    failures = Counter(failure.reason for failure in opened.failures())
    nbytes = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    shape = [opened.num_rows, opened.num_patches, opened.width]
    document = {
        "path": str(store),
        "layers": list(opened.layers),
        "shape": shape,
        "codec": opened.info.codec,
        "images": opened.num_images,
        "failures": dict(failures),
        "shards": {"committed": done, "planned": planned},
        "bytes": nbytes,
        "fingerprint": opened.fingerprint,
        "source": opened.source,
    }
    console.fields(
        {
            "store": store,
            "features": f"{' x '.join(map(str, shape))} {opened.info.codec}, layer "
            + ", ".join(opened.layers),
            "images": f"{opened.num_images:,} with features",
            "failures": ", ".join(f"{n:,} {reason}" for reason, n in failures.items()) or "none",
            "shards": f"{done:,} of {planned:,} committed",
            "bytes": console.size(nbytes),
            **{name: value for name, value in flatten(opened.fingerprint) if name != "codec"},
            "data": ", ".join(opened.source["data"]),
            "image root": opened.source["images"],
        }
    )
    return document
