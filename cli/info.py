"""`featcache info`: what a store holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from cli import console


@console.command("info")
@click.argument("store", type=Path)
def info(store: Path) -> console.Document:
    """Shape, codec, encoder, rows, failures and bytes of STORE."""
    import featcache
    from featcache.fingerprint import flatten

    opened = featcache.open(store)
    done, planned = opened.form.committed_shards()
    failures = Counter(failure.reason for failure in opened.failures())
    nbytes = opened.form.nbytes
    converted_from = codecs_before(opened.source)
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
            **({"converted from": ", ".join(converted_from)} if converted_from else {}),
        }
    )
    return document


def codecs_before(source: dict[str, Any]) -> list[str]:
    """The codecs whose rounding a converted store's features carry, the latest first."""
    found = []
    while made_of := source.get("converted_from"):
        found.append(made_of["codec"])
        source = made_of
    return found
