"""The encoders known by name. Adding one is one entry here; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class EncoderEntry:
    """An encoder by name.

    description: one line for `featcache models`.
    hub_id: Hugging Face repository. asset: folder under featcache/assets, for what we ship.
    num_patches, width: shape of one image's features. pixels: side of the square input.
    tflop: floating-point operations per image, in 1e12 (2 per multiply-add).
    architecture, processor: transformers' config values, for random weights without a hub.
    """

    description: str
    num_patches: int
    width: int
    pixels: int
    tflop: float
    hub_id: str | None = None
    asset: str | None = None
    architecture: dict[str, Any] | None = None
    processor: dict[str, Any] | None = None

    @property
    def bytes_per_image(self) -> int:
        """Stored bytes of one layer in a 16-bit codec."""
        return self.num_patches * self.width * 2


def same_encoder(a: str, b: str) -> bool:
    """Whether two encoder names mean one checkpoint: a registered name equals its hub id."""

    def hub_id(name: str) -> str:
        entry = ENCODERS.get(name)
        return (entry.hub_id if entry else None) or name

    return hub_id(a) == hub_id(b)


ENCODERS = {
    "siglip2-so400m": EncoderEntry(
        description="SigLIP 2 so400m, 384 px in patches of 14",
        hub_id="google/siglip2-so400m-patch14-384",
        num_patches=729,
        width=1152,
        pixels=384,
        tflop=0.665,
        architecture={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        processor={
            "size": {"height": 384, "width": 384},
            "resample": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    ),
    "tiny": EncoderEntry(
        description="the tiny SigLIP shipped for the demo, 64 px in patches of 8",
        asset="siglip-tiny",
        num_patches=64,
        width=96,
        pixels=64,
        tflop=0.00006,
    ),
}
