"""Preprocessing against transformers' PIL image processors: equal bit for bit, at odd sizes.

Processors of every way to a resolution, on images of one pixel, lines, panoramas, and smaller than
the crop.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from featcache.encoders import Preprocessing, fit_of
from featcache.encoders.preprocessing import present_mask
from featcache.errors import ConfigError, EncoderError, ImageError

SIZES = [(1, 1), (1, 300), (300, 1), (23, 24), (24, 23), (25, 31), (33, 24), (480, 641), (641, 480)]
"""(height, width)."""


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


PROCESSORS: dict[str, Any] = {
    "siglip": SiglipImageProcessorPil(size=square(24)),
    "siglip-wide": SiglipImageProcessorPil(size={"height": 24, "width": 40}),
    "vit": ViTImageProcessorPil(size=square(24), image_mean=[0.1, 0.5, 0.9]),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=square(24)),
    "clip-odd": CLIPImageProcessorPil(size={"shortest_edge": 31}, crop_size=square(24)),
    "clip-smaller-than-its-crop": CLIPImageProcessorPil(
        size={"shortest_edge": 15}, crop_size=square(24)
    ),
    "clip-oblong": CLIPImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 27, "width": 16}
    ),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=square(28)),
    "convnext-224": ConvNextImageProcessorPil(size={"shortest_edge": 224}),
    "convnext-384": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "llava-padding": LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 24}, crop_size=square(24)
    ),
}


def photograph(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng([height, width])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def normalised(preprocessing: Preprocessing, image: Image.Image) -> torch.Tensor:
    """float32[1, 3, height, width], by the table that the encoder looks pixels up in."""
    pixels = preprocessing.collate([preprocessing.resize(image)]).values.int()
    table = preprocessing.normalisation_table()
    return torch.stack([table[c][pixels[..., c]] for c in range(3)], dim=1)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_the_hugging_face_processors(name: str, size: tuple[int, int]) -> None:
    processor, image = PROCESSORS[name], photograph(*size)
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    ours = normalised(Preprocessing.from_processor(processor, name), image)
    assert ours.dtype == expected.dtype and torch.equal(ours, expected)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize(("patch", "most"), [(16, 256), (8, 20), (16, 1)])
def test_patch_grids_are_the_hugging_face_processors(
    size: tuple[int, int], patch: int, most: int
) -> None:
    processor = Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=most)
    image = photograph(*size)
    expected = processor(images=image, return_tensors="pt")
    preprocessing = Preprocessing.from_processor(processor, "naflex")
    batch = preprocessing.collate([preprocessing.resize(image)])
    assert torch.equal(batch.grids, expected["spatial_shapes"])
    table = preprocessing.normalisation_table()
    pixels = batch.values.unflatten(-1, (-1, 3)).int()
    values = torch.stack([table[c][pixels[..., c]] for c in range(3)], dim=-1).flatten(2)
    present = present_mask(batch.grids, most, torch.device("cpu"))
    assert torch.equal(present.int(), expected["pixel_attention_mask"].int())
    assert torch.equal(values * present[..., None], expected["pixel_values"])


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_fit_pad_is_how_cambrian_s_pads(size: tuple[int, int]) -> None:
    """A checkpoint that squashes bilinearly, as SigLIP 2's do, padded with (127, 127, 127)."""
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    own = SiglipImageProcessorPil(size=square(24), resample=2, **half)
    theirs = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 24}, crop_size=square(24), **half
    )
    preprocessing = Preprocessing.from_processor(own, "x").with_fit("pad", "x")
    assert preprocessing.describe()["pad"] == [127, 127, 127]
    assert preprocessing.describe()["resample"] == "bicubic"
    image = photograph(*size)
    expected = theirs(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(normalised(preprocessing, image), expected)


def test_fit_pad_is_how_cambrian_1_pads() -> None:
    """Its `expand2square(...).resize(...)`, here by hand, with the mean colour of CLIP's settings:
    that of its SigLIP tower, too, whose own mean is another."""
    image = photograph(60, 100)
    clip = Preprocessing.from_processor(PROCESSORS["clip"], "x").with_fit("pad", "x")
    expected = Image.new("RGB", (100, 100), (122, 116, 104))
    expected.paste(image, (0, 20))
    assert np.array_equal(clip.resize(image), np.array(expected.resize((24, 24))))
    siglip = Preprocessing.from_processor(PROCESSORS["siglip"], "x")
    coloured = siglip.with_fit("pad:122,116,104", "x")
    assert np.array_equal(coloured.resize(image), clip.resize(image))
    assert coloured.describe()["pad"] == [122, 116, 104]


def test_the_other_fits() -> None:
    """ "squash" and "crop" are what the other kind of checkpoint does by itself."""
    image = photograph(50, 90)
    squash, crop = PROCESSORS["siglip"], PROCESSORS["clip"]
    crop_of_squash = Preprocessing.from_processor(squash, "x").with_fit("crop", "x")
    as_clip = CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size=square(24), image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    expected = as_clip(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(normalised(crop_of_squash, image), expected)
    squash_of_crop = Preprocessing.from_processor(crop, "x").with_fit("squash", "x")
    as_siglip = SiglipImageProcessorPil(
        size=square(24), image_mean=crop.image_mean, image_std=crop.image_std
    )
    expected = as_siglip(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(normalised(squash_of_crop, image), expected)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("fit", ["checkpoint", "squash", "crop", "pad", "pad:1,2,3"])
def test_a_fingerprint_gives_the_same_pixels_again(name: str, fit: str) -> None:
    own = Preprocessing.from_processor(PROCESSORS[name], name)
    made = own.with_fit(fit, name)
    again = own.with_fit(fit_of({"preprocessing": made.describe()}), name)
    assert again == made and again.describe() == made.describe()
    if fit == "checkpoint":
        assert made == own


def test_naflex_keeps_its_own_fit() -> None:
    naflex = Preprocessing.from_processor(Siglip2ImageProcessorPil(), "naflex")
    assert naflex.with_fit(fit_of({"preprocessing": naflex.describe()}), "naflex") == naflex
    for fit in ("squash", "crop", "pad"):
        with pytest.raises(EncoderError, match=f"--fit {fit} is for encoders of a fixed"):
            naflex.with_fit(fit, "naflex")


@pytest.mark.parametrize(
    "fit", ["", "stretch", "crop:1,2,3", "pad:", "pad:1,2", "pad:red", "pad:1,2,256", "Pad"]
)
def test_fits_that_do_not_exist(fit: str) -> None:
    own = Preprocessing.from_processor(PROCESSORS["clip"], "x")
    with pytest.raises(ConfigError, match="--fit"):
        own.with_fit(fit, "x")


@pytest.mark.parametrize("name", ["clip", "llava-padding"])
def test_lines_that_would_become_huge_are_refused(name: str) -> None:
    """1 x 400,000 pixels: 230 million before a crop at 24, more in a square of padding."""
    preprocessing = Preprocessing.from_processor(PROCESSORS[name], name)
    with pytest.raises(
        ImageError, match=r"^too_large: 400000 x 1 pixels would be [\d,]+ "
    ) as caught:
        preprocessing.resize(Image.new("RGB", (400_000, 1)))
    assert caught.value.reason == "too_large"


def test_processors_of_a_variable_size_are_refused() -> None:
    for processor in (
        CLIPImageProcessorPil(size={"shortest_edge": 24}, do_center_crop=False),
        CLIPImageProcessorPil(do_resize=False),
        SiglipImageProcessorPil(do_rescale=False),
    ):
        with pytest.raises(EncoderError, match="does not resize to a fixed height and width"):
            Preprocessing.from_processor(processor, "x")


def test_dinov3_differs_by_the_rounding_to_8_bits() -> None:
    """transformers resizes DINOv3's images as floats (torchvision, which is torch's antialiased
    bilinear interpolation), this project as 8-bit pixels. Largest difference measured: 0.97 levels
    of 255, on average 0.31; stated in docs/encoders.md."""
    preprocessing = Preprocessing.from_processor(
        ViTImageProcessorPil(size=square(24)), "x", called="DINOv3ViTImageProcessor"
    )
    assert preprocessing.describe()["processor"] == "DINOv3ViTImageProcessor"
    for height, width in SIZES:
        image = photograph(height, width)
        floats = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        expected = functional.interpolate(
            floats, size=(24, 24), mode="bilinear", antialias=True, align_corners=False
        )
        ours = torch.from_numpy(preprocessing.resize(image)).permute(2, 0, 1)[None].float()
        assert (ours - expected).abs().max() < 1.1
        assert (ours - expected).abs().mean() < 0.35


def test_settings_as_old_checkpoints_have_them() -> None:
    """openai's CLIP: plain numbers for both sizes."""
    processor = CLIPImageProcessorPil(size=24, crop_size=24)
    old = Preprocessing.from_processor(processor, "x")
    assert old == Preprocessing.from_processor(PROCESSORS["clip"], "x")
    image = photograph(50, 33)
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(normalised(old, image), expected)
