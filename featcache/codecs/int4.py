"""Four bits a value: rotated patches, 16 levels.

Letters: R patches, D encoder width = a * b, C codes of a patch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from featcache.codecs.scaled import SMALLEST_PATCH_SCALE, ScaledCodec


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
        rotated = rotation_of(width, normal.device).apply(normal)
        rms = torch.linalg.vector_norm(rotated, dim=1) / math.sqrt(width)
        scales = torch.maximum(rms, rotated.abs().amax(1) / 3.5).clamp_min(SMALLEST_PATCH_SCALE)
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
        return rotation_of(width, codes.device).undo(rotated).mul_(scales)


@dataclass(frozen=True, slots=True)
class Rotation:
    """Steps 1 and 2 of Int4Codec. signs: float32[D]. left: float32[a, a]. right: float32[b, b].

    Autocast would do the products in bfloat16.
    """

    signs: Tensor
    left: Tensor
    right: Tensor

    def apply(self, normal: Tensor) -> Tensor:
        """float32[R, D], overwritten -> float32[R, D]."""
        matrices = normal.mul_(self.signs).view(-1, len(self.left), len(self.right))
        with torch.autocast(normal.device.type, enabled=False):
            return (self.left @ (matrices @ self.right.T)).flatten(1)

    def undo(self, rotated: Tensor) -> Tensor:
        """float32[R, D] -> float32[R, D]."""
        matrices = rotated.reshape(-1, len(self.left), len(self.right))
        with torch.autocast(rotated.device.type, enabled=False):
            return (self.left.T @ (matrices @ self.right)).flatten(1).mul_(self.signs)


# The tables are ordinary tensors also when first asked for in inference mode.
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def rotation_of(width: int, device: torch.device) -> Rotation:
    """The rotation of patches of that width."""
    a = max(k for k in range(1, math.isqrt(width) + 1) if width % k == 0)
    odd = [hashlib.sha256(str(d).encode()).digest()[0] & 1 for d in range(width)]
    signs = torch.tensor([-1.0 if is_odd else 1.0 for is_odd in odd])
    return Rotation(signs.to(device), _dct(a).to(device), _dct(width // a).to(device))


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
