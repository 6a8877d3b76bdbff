"""`featcache info`: what a store holds."""

from __future__ import annotations

import click

from cli import console
from featcache.object_path import StorePath


@console.command("info")
@click.argument("store", type=console.LOCATION)
def info(store: StorePath) -> console.Document:
    """Shape, codec, encoder, rows, failures and bytes of STORE, also of an unfinished one."""
    from featcache.fingerprint import flatten
    from featcache.store import codecs_before
    from featcache.summary import summarize

    found = summarize(store)
    described = found.info
    shape = [found.rows, described.num_patches, described.width]
    lineage = codecs_before(described.source)
    document = {
        "path": str(store),
        "finished": found.finished,
        "layers": list(described.layers),
        "shape": shape,
        "codec": described.codec,
        "bits": found.bits,
        "bytes_per_image": found.image_bytes,
        "images": found.images,
        "pending": found.pending,
        "failures": found.failures,
        "dropped_rows": found.dropped,
        "unreferenced": {"rows": found.unreferenced, "bytes": found.unreferenced_bytes},
        "generations": found.generations,
        "shards": {"committed": found.committed, "planned": found.planned},
        "bytes": found.nbytes,
        "bytes_by_part": found.parts,
        "fingerprint": found.fingerprint,
        "source": described.source,
        "converted_from": lineage,
    }
    encoder = described.fingerprint.get("encoder", {})
    known = (encoder.get("name"), encoder.get("architecture"), encoder.get("revision"))
    lines: dict[str, object] = {
        "store": store,
        "features": f"{' x '.join(map(str, shape))} {described.codec}, layer "
        + ", ".join(described.layers),
        "codec": f"{described.codec}, {found.bits:.4g} bits a value, "
        f"{console.size(found.image_bytes)} an image",
        "encoder": ", ".join(str(each) for each in known if each),
        "images": f"{found.images:,} with features"
        + ", tiles included" * ("tiles" in described.fingerprint),
        "failures": ", ".join(f"{n:,} {reason}" for reason, n in found.failures.items()) or "none",
    }
    if not found.finished or found.pending:
        lines["unfinished"] = (
            f"{found.pending:,} images to be encoded; run the same `featcache extract` command "
            "again"
        )
    if found.dropped:
        lines["dropped"] = f"{found.dropped:,} rows"
    if found.unreferenced:
        lines["to be freed"] = (
            f"{found.unreferenced:,} rows without an image key, "
            f"{console.size(found.unreferenced_bytes)}; `featcache gc {store}` frees them"
        )
    lines["shards"] = (
        f"{found.committed:,} of {found.planned:,} committed, "
        f"{console.count(found.generations, 'generation')}"
    )
    parts = ", ".join(f"{part} {console.size(n)}" for part, n in found.parts.items())
    lines["bytes"] = f"{console.size(found.nbytes)}: {parts}"
    lines |= {name: value for name, value in flatten(found.fingerprint) if name != "codec"}
    if "data" in described.source:
        lines["data"] = ", ".join(described.source["data"])
    if "images" in described.source:
        lines["image root"] = described.source["images"]
    if lineage:
        lines["converted from"] = ", ".join(lineage)
    console.fields(lines)
    return document
