"""`featcache models`: the encoders known by name."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby

from cli import console
from featcache.registry import ENCODERS, EncoderEntry

SHIPPED = "shipped with featcache"


@console.command("models")
def models() -> console.Document:
    """The encoders known by name; others work by hub id or folder, see docs/encoders.md."""
    for owner, group in groupby(ENCODERS.items(), key=lambda item: _checkpoint(item[1])[0]):
        console.table(
            ["name", "features", "pixels", "per image", "TFLOP", "checkpoint"],
            [
                [
                    name,
                    f"{entry.num_patches} x {entry.width}",
                    entry.pixels,
                    console.size(entry.bytes_per_image),
                    f"{entry.tflop:.3g}",
                    _checkpoint(entry)[1],
                ]
                for name, entry in group
            ],
            title=owner,
            right=(1, 2, 3, 4),
        )
    console.say("features: patches x width of one layer; per image: its bytes in a 16-bit codec")
    return {
        "models": {
            name: {**asdict(entry), "bytes_per_image": entry.bytes_per_image}
            for name, entry in ENCODERS.items()
        }
    }


def _checkpoint(entry: EncoderEntry) -> tuple[str, str]:
    """Who publishes it on the Hugging Face hub, and its name there."""
    if entry.hub_id is None:
        return SHIPPED, entry.asset or ""
    owner, name = entry.hub_id.split("/")
    return f"{owner}/", name
