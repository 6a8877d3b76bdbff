"""How features are stored: as 16-bit floats, or as small codes with scales.

A *scaled* codec keeps, for the value x of channel d in patch p of an image,

    code = quantise((x - offset[d]) / scale[d] / patch_scale[p])

`offset` and `scale` are static: measured once on the store's first images (`Codec.calibrate`) and
kept for its life in the array `channels/<layer>`. `patch_scale` is stored beside the codes in
`scales/<layer>`. A patch with NaN or infinity has a patch scale that is not finite.

`base.py` has the interface, `scaled.py` and `int4.py` the scaled codecs, `stored.py` what the rest
of the package passes around.

Letters: B images, P patches, D encoder width, C codes of a patch (D, or fewer where they are
packed).
"""

from __future__ import annotations

from typing import Any

import torch

from featcache.codecs.base import Codec, FloatCodec
from featcache.codecs.int4 import Int4Codec
from featcache.codecs.scaled import Float8Codec, Int8Codec
from featcache.codecs.stored import LayerCodec, StoredFeatures, storing_problems
from featcache.errors import ConfigError

__all__ = [
    "CALIBRATION_IMAGES",
    "CODECS",
    "Codec",
    "LayerCodec",
    "StoredFeatures",
    "describe_codec",
    "get_codec",
    "load_codec",
    "storing_problems",
]

CALIBRATION_IMAGES = 32
"""Images that a scaled codec's static channel offsets and scales are measured on."""

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        FloatCodec("fp16", torch.float16, "float16"),
        FloatCodec("bf16", torch.bfloat16, "bfloat16"),
        Int8Codec(),
        Float8Codec(),
        Int4Codec(),
    )
}


def get_codec(name: str) -> Codec:
    """The codec of that name. Raises ConfigError for an unknown one."""
    if name not in CODECS:
        raise ConfigError(f"unknown codec {name!r}; choose one of {', '.join(CODECS)}")
    return CODECS[name]


def describe_codec(layer: LayerCodec) -> dict[str, Any]:
    """All that `load_codec` needs, JSON-able."""
    channels = None if layer.channels is None else layer.channels.cpu().tolist()
    return {
        "name": layer.codec.name,
        "num_patches": layer.num_patches,
        "width": layer.width,
        "channels": channels,
    }


def load_codec(described: dict[str, Any]) -> LayerCodec:
    """What `describe_codec` described. Raises ConfigError for an unknown name."""
    channels = described["channels"]
    return LayerCodec(
        get_codec(described["name"]),
        described["num_patches"],
        described["width"],
        None if channels is None else torch.tensor(channels, dtype=torch.float32),
    )
