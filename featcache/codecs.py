"""How features are stored: as 16-bit floats, or as small codes with scales.

A *scaled* codec keeps, for the value x of channel d in patch p of an image,

    code = quantise((x - offset[d]) / scale[d] / patch_scale[p])

`offset` and `scale` are static: measured once on the store's first images (`Codec.calibrate`) and
kept for its life in the array `channels/<layer>`. `patch_scale` is stored beside the codes in
`scales/<layer>`. A patch with NaN or infinity has a patch scale that is not finite.

Letters: B images, P patches, D encoder width, C codes of a patch (D, or fewer where they are
packed), R patches of all images together.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from featcache.errors import ConfigError

CALIBRATION_IMAGES = 32
"""Images that a scaled codec's static channel offsets and scales are measured on."""

_CPU_BLOCK_VALUES = 64 * 1152
"""Values that a scaled codec works on at a time on a CPU: float32 temporaries that stay in L2."""

_SMALLEST_PATCH_SCALE = 2.0**-100
"""Keeps the reciprocal finite; a patch below it is stored as its offsets."""

_LARGEST_PATCH_SCALE = 2.0**115
"""Any code times it, and times a channel scale of at most 1, is finite in float32."""


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

    Error bound: |x| / 2048 (fp16, up to 65504; 3e-8 below 6.1e-5) and |x| / 256 (bf16).
    Encoding what was decoded gives the same codes.
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


class ScaledCodec(Codec):
    """What the codecs with patch scales share: channel values, blocks, and what is refused.

    Values beyond about 5e36 * scale[d] (int4: 1e19) are refused as an overflow.
    """

    fill_value: int = 0
    scaled: bool = True

    def calibrate(self, features: Tensor) -> Tensor:
        """offset: the channel's mean. scale: the square root of its standard deviation, which of
        all static scales gives the least squared error under one scale a patch (the product of
        sum(scale^2), the noise, and sum(variance / scale^2), the range, is least there); divided by
        the largest. A channel that hardly moves gets an quarter of the mean scale, so that it does
        no harm if it moves later. Images with NaN or infinity do not count.
        """
        width = features.shape[-1]
        images = [image.reshape(-1, width) for image in features if image.isfinite().all()]
        count = sum(len(image) for image in images)
        offset = torch.zeros(width, dtype=torch.float64, device=features.device)
        variance = torch.zeros_like(offset)
        for image in images:
            offset += image.double().sum(0) / count
        for image in images:
            variance += (image.double() - offset).square().sum(0) / count
        scale = variance.sqrt().sqrt()
        scale = scale.clamp_min(scale.mean() / 4)
        # Powers of a dead layer's zero: every channel alike.
        scale = torch.where(scale.max() > 0, scale / scale.max(), 1.0)
        return torch.stack([offset, scale]).float()

    def encode(self, features: Tensor, channels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert channels is not None
        batch, patches, width = features.shape
        rows = features.reshape(-1, width)
        offset, inverse = channels[0], channels[1].reciprocal()
        codes = rows.new_empty((len(rows), self.code_width(width)), dtype=self.dtype)
        scales = rows.new_empty(len(rows), dtype=torch.float32)
        for block in _blocks(rows):
            normal = (rows[block].float() - offset).mul_(inverse)
            codes[block], scales[block] = self._quantise(normal)
        return codes.view(batch, patches, codes.shape[1]), scales.view(batch, patches)

    def decode(
        self, codes: Tensor, scales: Tensor | None, channels: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        assert scales is not None and channels is not None
        batch, patches, code_width = codes.shape
        width = channels.shape[1]
        rows, row_scales = codes.reshape(-1, code_width), scales.reshape(-1, 1)
        values = codes.new_empty((len(rows), width), dtype=dtype)
        for block in _blocks(values):
            normal = self._dequantise(rows[block], row_scales[block], width)
            values[block] = torch.addcmul(channels[0], normal, channels[1])
        return values.view(batch, patches, width)

    def is_finite(self, codes: Tensor, scales: Tensor | None) -> Tensor:
        assert scales is not None
        return (scales <= _LARGEST_PATCH_SCALE).all(1)

    @abstractmethod
    def _quantise(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        """float32[R, D] normalised values, which may be overwritten -> codes[R, C], patch scales
        float32[R] > 0, not finite where a value is not.
        """

    @abstractmethod
    def _dequantise(self, codes: Tensor, scales: Tensor, width: int) -> Tensor:
        """codes[R, C], scales float32[R, 1] -> float32[R, D]."""


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of [R, D] that are worked on at a time: small ones on a CPU, else all at once."""
    step = max(1, _CPU_BLOCK_VALUES // rows.shape[1]) if rows.is_cpu else max(1, len(rows))
    for first in range(0, len(rows), step):
        yield slice(first, first + step)


class Int8Codec(ScaledCodec):
    """8-bit integers: code = round(normal / patch_scale), patch_scale = the patch's largest
    |normal| / 127, normal = (x - offset[d]) / scale[d].

    Error bound: 0.5 * scale[d] * patch_scale[p], besides float32's own rounding (here as below).
    Encoding what was decoded gives the same codes.
    """

    name = "int8"
    dtype = torch.int8
    zarr_dtype = "int8"

    def _quantise(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        scales = (normal.abs().amax(1) / 127).clamp_min(_SMALLEST_PATCH_SCALE)
        codes = normal.mul_(scales.reciprocal()[:, None]).round_()
        return codes.to(torch.int8), scales

    def _dequantise(self, codes: Tensor, scales: Tensor, width: int) -> Tensor:
        return codes.float().mul_(scales)


class Float8Codec(ScaledCodec):
    """8-bit floats: code = the bits of float8_e4m3fn(normal / patch_scale), patch_scale = the
    patch's largest |normal| / 448, normal = (x - offset[d]) / scale[d].

    Zarr has no such data type: the bits are stored as uint8 (sign, 4 bits exponent of bias 7,
    3 bits mantissa).
    Error bound: the larger of |x - offset[d]| / 16 and scale[d] * patch_scale[p] / 1024.
    Encoding what was decoded gives the same codes, save that -0 becomes 0.
    """

    name = "fp8"
    dtype = torch.uint8
    zarr_dtype = "uint8"

    def _quantise(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        scales = (normal.abs().amax(1) / 448).clamp_min(_SMALLEST_PATCH_SCALE)
        values = normal.mul_(scales.reciprocal()[:, None])
        return values.to(torch.float8_e4m3fn).view(torch.uint8), scales

    def _dequantise(self, codes: Tensor, scales: Tensor, width: int) -> Tensor:
        # Moved into a half's fields the value is 2**8 too small, subnormals included. torch's own
        # conversion is ten times slower on a CPU.
        wide = codes.view(torch.int8).to(torch.int16)
        half = ((wide & 0x7F) << 7).bitwise_or_(wide & -0x8000).view(torch.float16)
        return half.float().mul_(scales * 256)


class Int4Codec(ScaledCodec):
    """4-bit codes of rotated patches.

    With normal = (x - offset[d]) / scale[d], of width D = a * b, a the largest divisor of D that is
    at most sqrt(D):

    1. normal[d] is negated where the first byte of SHA-256 of d in decimal ASCII digits is odd.
    2. The row-major (a, b) matrix of it becomes A @ matrix @ B.T, where A and B are the orthonormal
       DCT-II of order a and b: A[k, j] = sqrt((2 if k else 1) / a) cos(pi (j + 0.5) k / a).
    3. patch_scale = the larger of the root mean square and largest magnitude / 3.5.
    4. code = the index in `LEVELS` of the level nearest to rotated / patch_scale (rounded to 1/32
       before). Decoding takes the levels times patch_scale and undoes 2 and 1.

    Byte i holds code 2i in its low and code 2i + 1 in its high half; an odd D leaves half a
    byte unused.

    The rotation spreads outliers over the patch, so that values are near a Gaussian, for which the
    levels are the best 16. Error bound: over a patch, the squares of error[d] / scale[d] sum to
    at most 0.2 * D * patch_scale^2, and |error[d]| <= 0.45 * sqrt(D) * scale[d] * patch_scale.
    Encoding what was decoded moves a code by at most one level.
    """

    name = "int4"
    dtype = torch.uint8
    zarr_dtype = "uint8"

    LEVELS = (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326)
    """Codes 8 to 15, of 7 to 0 the negative: Lloyd-Max levels of the unit Gaussian."""

    def code_width(self, width: int) -> int:
        return (width + 1) // 2

    def _quantise(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        rows, width = normal.shape
        rotation = _rotation(width, normal.device)
        rotated = rotation.apply(normal)
        rms = torch.linalg.vector_norm(rotated, dim=1) / math.sqrt(width)
        scales = torch.maximum(rms, rotated.abs().amax(1) / 3.5).clamp_min(_SMALLEST_PATCH_SCALE)
        steps = rotated.mul_(32 * scales.reciprocal()[:, None]).round_().to(torch.int8)
        table = _nearest_level(normal.device)
        codes = table.index_select(0, steps.view(torch.uint8).flatten().int()).view(rows, width)
        if width % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        return codes[:, 0::2] | (codes[:, 1::2] << 4), scales

    def _dequantise(self, codes: Tensor, scales: Tensor, width: int) -> Tensor:
        pairs = _level_pairs(codes.device)
        levels = pairs.index_select(0, codes.flatten().int()).view(torch.float32)
        rotated = levels.view(len(codes), 2 * codes.shape[1])[:, :width]
        return _rotation(width, codes.device).undo(rotated).mul_(scales)


@dataclass(frozen=True, slots=True)
class _Rotation:
    """Steps 1 and 2 of Int4Codec. signs: float32[D]. left: float32[a, a]. right: float32[b, b]."""

    signs: Tensor
    left: Tensor
    right: Tensor

    def apply(self, normal: Tensor) -> Tensor:
        """float32[R, D], overwritten -> float32[R, D]."""
        matrices = normal.mul_(self.signs).view(-1, len(self.left), len(self.right))
        return (self.left @ (matrices @ self.right.T)).flatten(1)

    def undo(self, rotated: Tensor) -> Tensor:
        """float32[R, D] -> float32[R, D]."""
        matrices = rotated.reshape(-1, len(self.left), len(self.right))
        return (self.left.T @ (matrices @ self.right)).flatten(1).mul_(self.signs)


# The tables are ordinary tensors also when first asked for in inference mode.
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _rotation(width: int, device: torch.device) -> _Rotation:
    a = max(k for k in range(1, math.isqrt(width) + 1) if width % k == 0)
    odd = [hashlib.sha256(str(d).encode()).digest()[0] & 1 for d in range(width)]
    signs = torch.tensor([-1.0 if is_odd else 1.0 for is_odd in odd])
    return _Rotation(signs.to(device), _dct(a).to(device), _dct(width // a).to(device))


def _dct(order: int) -> Tensor:
    k, j = torch.meshgrid(*[torch.arange(order, dtype=torch.float64)] * 2, indexing="ij")
    matrix = torch.cos(math.pi * (j + 0.5) * k / order) * math.sqrt(2 / order)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def _levels() -> Tensor:
    upper = torch.tensor(Int4Codec.LEVELS)
    return torch.cat([-upper.flip(0), upper])


@lru_cache
@torch.inference_mode(False)
def _nearest_level(device: torch.device) -> Tensor:
    """uint8[256]: the code of (rotated / patch_scale * 32) rounded, by that int8's bits."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.int8).double() / 32
    nearest = (values[:, None] - _levels().double()).abs().argmin(1)
    return nearest.to(torch.uint8).to(device)


@lru_cache
@torch.inference_mode(False)
def _level_pairs(device: torch.device) -> Tensor:
    """float64[256], each the bits of the two float32 levels of a byte: one look-up for both."""
    byte = torch.arange(256)
    pairs = torch.stack([_levels()[byte & 15], _levels()[byte >> 4]], dim=1)
    return pairs.contiguous().view(torch.float64).flatten().to(device)


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
