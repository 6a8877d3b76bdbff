"""What a codec does, and the two that only cast.

Letters: B images, P patches, D encoder width, C codes of a patch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    def calibrate(self, features: Tensor | Sequence[Tensor]) -> Tensor | None:
        """features: float[P, D] of each of the first images -> the static float32[2, D] (offset,
        scale); None for a codec without."""

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

    def calibrate(self, features: Tensor | Sequence[Tensor]) -> None:
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
        bits = codes.view(torch.int16).flatten(1)
        # On a CPU one image at a time, so that the temporary stays in the cache.
        parts = bits.split(1) if bits.is_cpu else [bits]
        return torch.cat([(part & 0x7FFF).amax(1) for part in parts]) < infinity
