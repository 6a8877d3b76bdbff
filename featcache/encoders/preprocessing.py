"""An image as the encoder takes it: the arithmetic of the checkpoint's image processor, split in
two. Resizing on the CPU gives uint8, normalising happens on the device.

Letters: B images, N patches of the largest grid, C values of a patch's pixels.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    get_image_size_for_max_num_patches,
)

from featcache.errors import ConfigError, EncoderError, ImageError

FITS = ("checkpoint", "squash", "crop", "pad")
"""How an image is brought to the encoder's resolution; see `Preprocessing.with_fit`."""

CONVNEXT_SQUASHED_FROM = 384
"""Pixels from which transformers' ConvNeXt processor squashes instead of cropping."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """A batch as an encoder takes it.

    values: uint8[B, height, width, 3]; where each image has its own patch grid uint8[B, N, C], a
    patch's pixels row by row, zeros after an image's last patch.
    grids: int64[B, 2] on the CPU, each image's (height, width) in patches; None where all have the
    same.
    """

    values: Tensor
    grids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, images: slice) -> Pixels:
        return Pixels(self.values[images], None if self.grids is None else self.grids[images])

    def pin_memory(self) -> Pixels:
        """The same in page-locked memory, for asynchronous copies to CUDA."""
        return Pixels(self.values.pin_memory(), self.grids)

    def to(self, device: torch.device) -> Pixels:
        """The same on another device; from page-locked memory while the caller goes on. The grids
        stay, as they are few and asked for on the CPU."""
        return Pixels(self.values.to(device, non_blocking=True), self.grids)


class Fit(ABC):
    """How an image of any size is brought to one that the encoder takes."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """(height, width) of the result in pixels; of the largest square one where it varies."""

    @abstractmethod
    def resize(self, image: Image.Image, resample: Image.Resampling) -> np.ndarray[Any, Any]:
        """RGB image -> uint8[height, width, 3]. Raises ImageError."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """As it stands in a store's fingerprint."""


@dataclass(frozen=True, slots=True)
class Squash(Fit):
    """To a fixed height and width, whatever becomes of the proportions."""

    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def resize(self, image: Image.Image, resample: Image.Resampling) -> np.ndarray[Any, Any]:
        return np.array(image.resize((self.width, self.height), resample))

    def describe(self) -> dict[str, Any]:
        return {"height": self.height, "width": self.width, "aspect": "squash", "pad": "none"}


@dataclass(frozen=True, slots=True)
class Crop(Fit):
    """The shorter edge to `shortest_edge`, then the middle; black around it where that is larger.

    Source of the rounding: transformers' `get_resize_output_image_size` (the longer edge is cut to
    an integer) and `center_crop` (the offset is rounded down, that of a black border up).
    """

    shortest_edge: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def resize(self, image: Image.Image, resample: Image.Resampling) -> np.ndarray[Any, Any]:
        short, long = sorted(image.size)
        longest_edge = int(self.shortest_edge * long / short)
        _require_pixels(image, self.shortest_edge * longest_edge, "before the crop")
        upright = image.width <= image.height
        width, height = (
            (self.shortest_edge, longest_edge) if upright else (longest_edge, self.shortest_edge)
        )
        return self._crop(np.array(image.resize((width, height), resample)))

    def _crop(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        height, width = pixels.shape[:2]
        top, left = (height - self.height) // 2, (width - self.width) // 2
        if top >= 0 and left >= 0:
            return np.ascontiguousarray(pixels[top : top + self.height, left : left + self.width])
        framed = np.zeros((max(self.height, height), max(self.width, width), 3), np.uint8)
        above, before = (len(framed) - height + 1) // 2, (framed.shape[1] - width + 1) // 2
        framed[above : above + height, before : before + width] = pixels
        top, left = max(0, top + above), max(0, left + before)
        return np.ascontiguousarray(framed[top : top + self.height, left : left + self.width])

    def describe(self) -> dict[str, Any]:
        return {
            "height": self.height,
            "width": self.width,
            "aspect": "crop",
            "pad": "none",
            "shortest_edge": self.shortest_edge,
        }


@dataclass(frozen=True, slots=True)
class Pad(Fit):
    """A square of one colour around the whole image, then to the encoder's height and width.

    Source: `expand2square` of LLaVA, Cambrian-1 and Cambrian-S.
    """

    height: int
    width: int
    colour: tuple[int, int, int]

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def resize(self, image: Image.Image, resample: Image.Resampling) -> np.ndarray[Any, Any]:
        side = max(image.size)
        if image.width != image.height:
            _require_pixels(image, side * side, "padded to a square")
            square = Image.new("RGB", (side, side), self.colour)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        return np.array(image.resize((self.width, self.height), resample))

    def describe(self) -> dict[str, Any]:
        return {
            "height": self.height,
            "width": self.width,
            "aspect": "pad",
            "pad": list(self.colour),
        }


@dataclass(frozen=True, slots=True)
class PatchGrid(Fit):
    """To the largest size of about the same proportions that `max_num_patches` patches cover.

    Source: transformers' `Siglip2ImageProcessor` (NaFlex).
    """

    patch_size: int
    max_num_patches: int

    @property
    def size(self) -> tuple[int, int]:
        side = int(self.max_num_patches**0.5) * self.patch_size
        return side, side

    def resize(self, image: Image.Image, resample: Image.Resampling) -> np.ndarray[Any, Any]:
        height, width = get_image_size_for_max_num_patches(
            image.height, image.width, self.patch_size, self.max_num_patches
        )
        return np.array(image.resize((width, height), resample))

    def describe(self) -> dict[str, Any]:
        return {
            "patch_size": self.patch_size,
            "max_num_patches": self.max_num_patches,
            "aspect": "grid",
            "pad": "none",
        }


def _require_pixels(image: Image.Image, pixels: int, what: str) -> None:
    """Raise ImageError where an image would take more than Pillow decodes."""
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    if limit and pixels > limit:
        raise ImageError(
            "too_large",
            f"{image.width} x {image.height} pixels would be {pixels:,} {what}, above {limit:,}",
        )


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The settings of an image processor.

    processor: its class. fit: how an image gets its size. resample: PIL filter.
    mean, std: per channel, of [0, 1] values.
    """

    processor: str
    fit: Fit
    resample: Image.Resampling
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_processor(cls, processor: Any, name: str, *, called: str = "") -> Preprocessing:
        """processor: of transformers' PIL backend. called: its class name, if not its own.

        Raises EncoderError for settings this class does not reproduce.
        """
        steps = ("do_resize", "do_rescale", "do_normalize")
        does_all = all(getattr(processor, step, False) for step in steps)
        fit = _fit_of_processor(processor, name) if does_all else None
        if fit is None:
            size = _given(getattr(processor, "size", None))
            raise EncoderError(
                f"the image processor of {name} does not resize to a fixed height and width and "
                f"normalise (size {size}); only such processors are supported"
            )
        return cls(
            processor=called or type(processor).__name__,
            fit=fit,
            resample=Image.Resampling(int(processor.resample)),
            rescale_factor=float(processor.rescale_factor),
            mean=tuple(map(float, processor.image_mean)),
            std=tuple(map(float, processor.image_std)),
        )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.fit.size

    def at(self, side: int) -> Preprocessing:
        """The same at another resolution: a square of `side` pixels, nothing cut off beyond it."""
        if isinstance(self.fit, Crop):
            return replace(self, fit=Crop(side, side, side))
        return replace(self, fit=Squash(side, side))

    def with_fit(self, asked: str, name: str) -> Preprocessing:
        """The same with another way to the encoder's resolution, one of FITS.

        "checkpoint" leaves the processor's own; "squash" changes the proportions; "crop" takes the
        middle of the image; "pad" makes it a square first, of the mean colour (`int(mean * 255)`)
        or that of "pad:R,G,B", and then always resizes bicubically, as LLaVA and Cambrian do.

        Raises ConfigError for another word, EncoderError where the encoder's grid varies.
        """
        kind, _, colour = asked.partition(":")
        given = re.fullmatch(r"(\d+),(\d+),(\d+)", colour)
        if kind not in FITS or (colour and not (kind == "pad" and given)) or asked.endswith(":"):
            raise ConfigError(
                f"--fit {asked!r} is none of {', '.join(FITS)}, or pad:R,G,B for a colour"
            )
        if kind == "checkpoint":
            return self
        if isinstance(self.fit, PatchGrid):
            raise EncoderError(
                f"{name} keeps each image's proportions; --fit {asked} is for encoders of a fixed "
                "resolution: leave it out"
            )
        height, width = self.size
        if kind == "squash":
            return replace(self, fit=Squash(height, width))
        if kind == "crop":
            own = self.fit if isinstance(self.fit, Crop) else Crop(max(self.size), height, width)
            return replace(self, fit=own)
        values = [int(value * 255) for value in self.mean]
        if given:
            values = [int(value) for value in given.groups()]
            if max(values) > 255:
                raise ConfigError(f"--fit {asked!r}: a colour is three numbers from 0 to 255")
        red, green, blue = values
        padded = Pad(height, width, (red, green, blue))
        return replace(self, fit=padded, resample=Image.Resampling.BICUBIC)

    def resize(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """RGB image -> uint8[height, width, 3]. Raises ImageError."""
        return self.fit.resize(image, self.resample)

    def collate(self, images: list[np.ndarray[Any, Any]]) -> Pixels:
        """What `resize` gave for some images, as a batch."""
        if not isinstance(self.fit, PatchGrid):
            return Pixels(torch.from_numpy(np.stack(images)))
        side, most = self.fit.patch_size, self.fit.max_num_patches
        values = np.zeros((len(images), most, side * side * 3), np.uint8)
        grids = torch.empty(len(images), 2, dtype=torch.int64)
        for i, image in enumerate(images):
            rows, columns = image.shape[0] // side, image.shape[1] // side
            patches = image.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
            values[i, : rows * columns] = patches.reshape(rows * columns, -1)
            grids[i] = torch.tensor([rows, columns])
        return Pixels(torch.from_numpy(values), grids)

    def normalisation_table(self) -> Tensor:
        """float32[3, 256]: the normalised value of each channel's 256 pixel values.

        Computed with the operations, order and precisions of transformers' `rescale` (float64
        product, cast to float32) and `normalize` (float32), so that looking a pixel up equals the
        processor's output bit for bit on any device.
        """
        levels = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean = np.array(self.mean, np.float32)[:, None]
        std = np.array(self.std, np.float32)[:, None]
        return torch.from_numpy((levels[None] - mean) / std)

    def describe(self) -> dict[str, Any]:
        """The settings as they stand in a store's fingerprint."""
        return {
            "processor": self.processor,
            **self.fit.describe(),
            "resample": self.resample.name.lower(),
            "rescale_factor": self.rescale_factor,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def fit_of(fingerprint: dict[str, Any]) -> str:
    """What `load_encoder(fit=...)` needs to make the pixels of a store's fingerprint again."""
    described = fingerprint.get("preprocessing", {})
    aspect = described.get("aspect")
    if aspect == "pad":
        return "pad:" + ",".join(map(str, described["pad"]))
    return aspect if aspect in ("squash", "crop") else "checkpoint"


def present_mask(grids: Tensor, most: int, device: torch.device) -> Tensor:
    """bool[B, N]: true where an image of these grids has a patch. grids: int64[B, 2]."""
    lengths = grids.prod(1).to(device, non_blocking=True)
    return torch.arange(most, device=device) < lengths[:, None]


def _fit_of_processor(processor: Any, name: str) -> Fit | None:
    """None for what is none of them. Raises EncoderError for a step that none of them has."""
    size = processor.size
    if hasattr(processor, "max_num_patches"):
        return PatchGrid(int(processor.patch_size), int(processor.max_num_patches))
    refused = {"do_pad": getattr(processor, "do_pad", None)}
    crops = getattr(processor, "do_center_crop", None)
    edge = size.shortest_edge if size is not None else None
    fixed = size is not None and bool(size.height and size.width)
    pads = refused["do_pad"] and type(processor).__name__.startswith("LlavaImageProcessor")
    if pads:
        refused["do_pad"] = None
    if fixed:
        refused["do_center_crop"] = crops
    for step, is_set in refused.items():
        if is_set:
            raise EncoderError(
                f"the image processor of {name} has {step} set; only processors that resize "
                "to a fixed height and width, or crop to one, and normalise are supported"
            )
    if fixed:
        return Squash(size.height, size.width)
    if edge and hasattr(processor, "crop_pct"):
        if edge >= CONVNEXT_SQUASHED_FROM:
            return Squash(edge, edge)
        return Crop(int(edge / processor.crop_pct), edge, edge)
    if not (edge and crops) or size.longest_edge:
        return None
    height, width = processor.crop_size.height, processor.crop_size.width
    if pads:
        red, green, blue = (int(value * 255) for value in processor.image_mean)
        return Pad(height, width, (red, green, blue)) if height == width == edge else None
    return Crop(edge, height, width)


def _given(size: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(size or {}).items() if value is not None}
