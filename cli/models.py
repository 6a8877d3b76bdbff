"""`featcache models`: the encoders known by name."""

from __future__ import annotations

from dataclasses import asdict

from cli import console
from featcache.registry import ENCODERS


@console.command("models")
def models() -> console.Document:
    """The encoders known by name; any SigLIP or SigLIP2 checkpoint works by hub id or folder."""
    console.table(
        ["name", "patches", "width", "pixels", "per image", "TFLOP", "checkpoint"],
        [
            [
                name,
                entry.num_patches,
                entry.width,
                entry.pixels,
                console.size(entry.bytes_per_image),
                f"{entry.tflop:.3g}",
                entry.hub_id or "shipped with featcache",
            ]
            for name, entry in ENCODERS.items()
        ],
        right=(1, 2, 3, 4, 5),
    )
    return {
        "models": {
            name: {**asdict(entry), "bytes_per_image": entry.bytes_per_image}
            for name, entry in ENCODERS.items()
        }
    }
