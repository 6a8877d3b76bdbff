"""How features are stored: as 16-bit floats, or as small integers with scales.

A *scaled* codec keeps, for the value x of channel d in patch p of an image,

    code = round((x - offset[d]) / scale[d] / patch_scale[p])

`offset` and `scale` are static: measured once on the store's first images (`Codec.calibrate`) and
kept for its life in the array `channels/<layer>`. `patch_scale` is stored beside the codes in
`scales/<layer>`; it is never clipped against, so the largest code is always in range.

Letters: B images, P patches, D encoder width, C codes of a patch (D, or fewer where they are
packed).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from featcache.errors import ConfigError

CALIBRATION_IMAGES = 32
"""Images that a scaled codec's static channel offsets and scales are measured on."""


class Codec(ABC):
    """A storage format for features.

    name: as given to `--codec`. dtype: torch dtype of the codes. zarr_dtype: its Zarr v3 name.
    fill_value: of the codes array, for rows without features; they decode to NaN.
    scaled: whether there are patch scales and static channel values.
    pooled_dtype: torch dtype that pooled outputs are stored in.
    """

    name: str
    dtype: torch.dtype
    zarr_dtype: str
    fill_value: str | int
    scaled: bool
    pooled_dtype: torch.dtype = torch.float16

    def code_width(self, width: int) -> int:
        """C for an encoder of width D. Raises ConfigError where the codec cannot store it."""
        return width

    @abstractmethod
    def calibrate(self, features: Tensor) -> Tensor | None:
        """features: float[N, P, D] of the first images -> the static float32[2, D] (offset, scale);
        None for a codec without."""

    @abstractmethod
    def encode(self, features: Tensor, channels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """features: float[B, P, D] -> codes dtype[B, P, C], patch scales float32[B, P] or None.

        A value that cannot be stored makes its image not `is_finite`.
        """

    @abstractmethod
    def decode(
        self, codes: Tensor, scales: Tensor | None, channels: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """What `encode` gave -> dtype[B, P, D], on the device where it lies."""

    @abstractmethod
    def is_finite(self, codes: Tensor, scales: Tensor | None) -> Tensor:
        """bool[B]: whether all of an image's stored values decode to finite ones."""


@dataclass(frozen=True, slots=True)
class FloatCodec(Codec):
    """Values cast to a 16-bit float.

    Error bound: |x| / 2048 (fp16, where 6.1e-5 <= |x| <= 65504) and |x| / 256 (bf16).
    """

    name: str
    dtype: torch.dtype
    zarr_dtype: str
    fill_value: str = "NaN"
    scaled: bool = False

    @property
    def pooled_dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.dtype

    def calibrate(self, features: Tensor) -> None:
        return None

    def encode(self, features: Tensor, channels: Tensor | None) -> tuple[Tensor, None]:
        return features.to(self.dtype), None

    def decode(
        self, codes: Tensor, scales: Tensor | None, channels: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return codes.to(dtype)

    def is_finite(self, codes: Tensor, scales: Tensor | None) -> Tensor:
        # The exponent's bits, as integers: several times faster on a CPU than half arithmetic.
        infinity = int(torch.tensor(torch.inf, dtype=self.dtype).view(torch.int16))
        magnitudes = codes.view(torch.int16).flatten(1) & 0x7FFF
        return magnitudes.amax(1) < infinity


@dataclass(frozen=True, slots=True)
class Int8Codec(Codec):
    """8-bit integers with a scale per patch after a static offset and scale per channel.

    Error bound: 0.5 * scale[d] * patch_scale[p], patch_scale being the patch's largest normalised
    magnitude / 127.
    """

    name: str = "int8"
    dtype: torch.dtype = torch.int8
    zarr_dtype: str = "int8"
    fill_value: int = 0
    scaled: bool = True

    def calibrate(self, features: Tensor) -> Tensor:
        flat = features.float().flatten(0, -2)
        offset = flat.mean(0)
        scale = (flat - offset).square().mean(0).sqrt()
        scale = scale.clamp_min(float(scale.max()) * 1e-3)
        scale[scale == 0] = 1
        return torch.stack([offset, scale])

    def encode(self, features: Tensor, channels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert channels is not None
        normal = (features.float() - channels[0]) / channels[1]
        scales = normal.abs().amax(-1) / 127
        codes = (normal / scales.clamp_min(1e-30)[..., None]).round()
        return codes.nan_to_num(0).to(torch.int8), scales

    def decode(
        self, codes: Tensor, scales: Tensor | None, channels: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        assert scales is not None and channels is not None
        return (codes.float() * scales[..., None] * channels[1] + channels[0]).to(dtype)

    def is_finite(self, codes: Tensor, scales: Tensor | None) -> Tensor:
        assert scales is not None
        return scales.isfinite().all(1)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        FloatCodec("fp16", torch.float16, "float16"),
        FloatCodec("bf16", torch.bfloat16, "bfloat16"),
        Int8Codec(),
    )
}


def get_codec(name: str) -> Codec:
    """The codec of that name. Raises ConfigError for an unknown one."""
    if name not in CODECS:
        raise ConfigError(f"unknown codec {name!r}; choose one of {', '.join(CODECS)}")
    return CODECS[name]


@dataclass(frozen=True, slots=True)
class LayerCodec:
    """A codec with what it needs to know of one layer.

    num_patches, width: P and D. channels: the static float32[2, D], None for an unscaled codec.
    """

    codec: Codec
    num_patches: int
    width: int
    channels: Tensor | None = None

    @property
    def code_shape(self) -> tuple[int, int]:
        """(P, C)."""
        return self.num_patches, self.codec.code_width(self.width)

    @property
    def code_bytes(self) -> int:
        """Of one image's codes."""
        patches, codes = self.code_shape
        return patches * codes * self.codec.dtype.itemsize

    @property
    def scale_bytes(self) -> int:
        """Of one image's patch scales."""
        return self.num_patches * 4 if self.codec.scaled else 0

    def to(self, device: torch.device | str) -> LayerCodec:
        """The same, with its channel values on another device."""
        if self.channels is None:
            return self
        return replace(self, channels=self.channels.to(device))

    def encode(self, features: Tensor) -> tuple[StoredFeatures, list[str | None]]:
        """features: float[B, P, D] on the device of `channels`.

        Returns what is stored and, for each image, None or the reason it cannot be stored: the
        encoder gave a non-finite value, or a finite one beyond the stored range.
        """
        codes, scales = self.codec.encode(features, self.channels)
        stored = StoredFeatures(codes, scales, self)
        return stored, storing_problems(features, self.codec.is_finite(codes, scales), self.codec)


def storing_problems(values: Tensor, stored_finite: Tensor, codec: Codec) -> list[str | None]:
    """For each image of values [B, ...], None or why its stored form is not finite."""
    reasons: list[str | None] = [None] * len(values)
    lost = (~stored_finite).nonzero().flatten().tolist()
    for i in lost:
        peak = float(values[i].abs().amax())
        reasons[i] = (
            f"overflow: the largest |feature| is {peak:.4g}, beyond {codec.name}'s range"
            + "; use --codec bf16" * (codec.name != "bf16")
            if peak < float("inf")
            else "non_finite: the encoder gave NaN or infinity"
        )
    return reasons


@dataclass(slots=True)
class StoredFeatures:
    """Features of some images as they lie in a store.

    codes: codec dtype[B, P, C]. scales: float32[B, P], None for an unscaled codec.
    layer: what decodes them.
    """

    codes: Tensor
    scales: Tensor | None
    layer: LayerCodec

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, images: slice) -> StoredFeatures:
        scales = None if self.scales is None else self.scales[images]
        return StoredFeatures(self.codes[images], scales, self.layer)

    def to(self, device: torch.device | str) -> StoredFeatures:
        """The same on another device, still in the stored, small form."""
        scales = None if self.scales is None else self.scales.to(device, non_blocking=True)
        codes = self.codes.to(device, non_blocking=True)
        return StoredFeatures(codes, scales, self.layer.to(device))

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """dtype[B, P, D] where the codes lie. None: the stored dtype of an unscaled codec, else
        float32."""
        if dtype is None:
            dtype = torch.float32 if self.layer.codec.scaled else self.codes.dtype
        return self.layer.codec.decode(self.codes, self.scales, self.layer.channels, dtype)


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
