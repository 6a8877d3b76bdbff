"""What the registry says of each encoder, computed from its architecture; no weights are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from featcache.encoders import Preprocessing
from featcache.encoders.convnext import MULTI_STAGE, ConvNext, OpenClipConvNext
from featcache.encoders.families import FAMILIES
from featcache.encoders.tower import Tower
from featcache.registry import ENCODERS, same_encoder

DESCRIBED = [name for name, entry in ENCODERS.items() if entry.architecture is not None]


def tower_of(name: str, **changed: Any) -> Tower:
    """The encoder on the meta device, with other config values."""
    entry = ENCODERS[name]
    assert entry.architecture is not None
    family = FAMILIES[entry.model_type]
    processor = family.processor_class(**(entry.processor or {}))
    preprocessing = Preprocessing.from_processor(processor, name)
    if entry.resolution is not None:
        preprocessing = preprocessing.at(entry.resolution)
    config = family.config_class(**{**entry.architecture, **changed})
    with torch.device("meta"):
        if issubclass(family, OpenClipConvNext):
            model = family._build(config)
        else:
            config._attn_implementation = "sdpa"
            model = family.model_class(config)
    layer = MULTI_STAGE if issubclass(family, ConvNext) else "-2"
    return family(name, model.eval(), preprocessing, (layer,), entry)


def flops(tower: Tower) -> int:
    """Of one image, 2 a multiply-add, as torch counts them; the features' shape is looked at."""
    pixels = torch.empty(1, 3, *tower.preprocessing.size, device="meta")
    grids = None
    if tower.varies:
        side = int(tower.num_patches**0.5)
        pixels = torch.empty(1, tower.num_patches, 3 * tower.config.patch_size**2, device="meta")
        grids = torch.tensor([[side, side]])
        inputs = tower.inputs
        # A mask has no values to be looked at on the meta device; it costs no FLOP.
        unmasked = {"pixel_attention_mask": None}
        tower.inputs = lambda p, g: inputs(p, g) | unmasked  # type: ignore[method-assign]
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        encoded = tower.forward(pixels, grids)
    assert encoded.features[tower.layers[0]].shape == (1, tower.num_patches, tower.width)
    return counted.get_total_flops()


@pytest.mark.parametrize("name", DESCRIBED)
def test_each_entry_tells_the_truth(name: str) -> None:
    """Blocks are alike, so those of two depths tell all others'."""
    entry, tower = ENCODERS[name], tower_of(name)
    assert (entry.num_patches, entry.width) == (tower.num_patches, tower.width)
    assert tower.preprocessing.size == (entry.pixels, entry.pixels)
    if isinstance(tower, ConvNext):
        total = flops(tower)
    else:
        one = flops(tower_of(name, num_hidden_layers=1))
        total = one + (tower.depth - 1) * (flops(tower_of(name, num_hidden_layers=2)) - one)
    assert total == pytest.approx(entry.tflop * 1e12, rel=0.01)


def test_two_depths_do_tell_all() -> None:
    one, two = (flops(tower_of("dinov3-vits16", num_hidden_layers=depth)) for depth in (1, 2))
    assert flops(tower_of("dinov3-vits16")) == one + 11 * (two - one)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("siglip2-so400m", 428_225_600),
        ("clip-large-336", 303_507_456),
        ("dinov2-giant", 1_136_480_768),
        ("dinov3-vitl16", 303_129_600),
    ],
)
def test_architectures_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in tower_of(name).model.parameters()) == parameters


def test_what_cambrian_1_stores_is_said_honestly() -> None:
    entry = ENCODERS["clip-convnext-xxl"]
    assert (entry.num_patches, entry.width) == (96 * 96, 384 + 768 + 1536 + 3072)
    assert entry.bytes_per_image == 9216 * 5760 * 2 == 106_168_320


def test_names_that_mean_one_checkpoint() -> None:
    assert same_encoder("siglip2-so400m", "google/siglip2-so400m-patch14-384")
    assert same_encoder("dinov2-giant", "facebook/dinov2-giant")
    assert not same_encoder("siglip2-so400m", "tiny")
    assert not same_encoder("dinov2-giant-378", "dinov2-giant")
    assert not same_encoder("dinov2-giant-378", "facebook/dinov2-giant")
