"""The families of encoders by the `model_type` of their checkpoints. Adding one is one line."""

from __future__ import annotations

from featcache.encoders.any import AnyTower
from featcache.encoders.convnext import ConvNext, Dinov3ConvNext, OpenClipConvNext
from featcache.encoders.siglip import Siglip, SiglipNaflex
from featcache.encoders.tower import Tower
from featcache.encoders.vit import Clip, Dinov2, Dinov2WithRegisters, Dinov3

FAMILIES: dict[str, type[Tower]] = {
    model_type: family
    for family in (
        Siglip,
        SiglipNaflex,
        Clip,
        Dinov2,
        Dinov2WithRegisters,
        Dinov3,
        ConvNext,
        Dinov3ConvNext,
        OpenClipConvNext,
    )
    for model_type in family.model_types
}


def family_of(model_type: str) -> type[Tower]:
    """The family of a `model_type`; `AnyTower` where it has none of its own."""
    return FAMILIES.get(model_type, AnyTower)
