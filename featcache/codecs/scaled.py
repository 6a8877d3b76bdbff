"""The codecs with static channel values and a scale a patch; int8 and fp8 among them.

Letters: B images, P patches, D encoder width, C codes of a patch, R patches of all images together.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from featcache.codecs.base import Codec

CPU_BLOCK_VALUES = 128 * 1152
"""Values that a scaled codec works on at a time on a CPU, so that its float32 temporaries stay in
the cache: int8 encodes 6 times as fast as with all at once."""

SMALLEST_PATCH_SCALE = 2.0**-100
"""Keeps the reciprocal finite; a patch below it is stored as its offsets."""

LARGEST_PATCH_SCALE = 2.0**115
"""Any code times it, and times a channel scale of at most 1, is finite in float32."""


class ScaledCodec(Codec):
    """What the codecs with patch scales share: channel values, blocks, and what is refused.

    Values beyond about 5e36 * scale[d] (int4: 1e19) are refused as an overflow.
    """

    fill_value: int = 0
    scaled: bool = True

    def calibrate(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        """offset: the channel's mean. scale: the square root of its standard deviation, which of
        all static scales gives the least squared error under one scale a patch (the product of
        sum(scale^2), the noise, and sum(variance / scale^2), the range, is least there); divided by
        the largest. A channel that hardly moves gets a quarter of the mean scale, so that it does
        no harm if it moves later. Images with NaN or infinity do not count.
        """
        like = features if isinstance(features, Tensor) else features[0]
        width, device = like.shape[-1], like.device
        images = [image.reshape(-1, width) for image in features if image.isfinite().all()]
        count = sum(len(image) for image in images)
        offset = torch.zeros(width, dtype=torch.float64, device=device)
        variance = torch.zeros_like(offset)
        for image in images:
            offset += image.double().sum(0) / count
        for image in images:
            variance += (image.double() - offset).square().sum(0) / count
        scale = variance.sqrt().sqrt()
        scale = scale.clamp_min(scale.mean() / 4)
        # Where nothing moves, every channel alike.
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
        return (scales <= LARGEST_PATCH_SCALE).all(1)

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
    step = max(1, CPU_BLOCK_VALUES // rows.shape[1]) if rows.is_cpu else max(1, len(rows))
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
        scales = (normal.abs().amax(1) / 127).clamp_min(SMALLEST_PATCH_SCALE)
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
        scales = (normal.abs().amax(1) / 448).clamp_min(SMALLEST_PATCH_SCALE)
        values = normal.mul_(scales.reciprocal()[:, None])
        return values.to(torch.float8_e4m3fn).view(torch.uint8), scales

    def _dequantise(self, codes: Tensor, scales: Tensor, width: int) -> Tensor:
        # Moved into a half's fields the value is 2**8 too small, subnormals included. torch's own
        # conversion is ten times slower on a CPU.
        wide = codes.view(torch.int8).to(torch.int16)
        half = ((wide & 0x7F) << 7).bitwise_or_(wide & -0x8000).view(torch.float16)
        return half.float().mul_(scales * 256)
