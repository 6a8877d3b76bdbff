"""How a feature value is stored: the codec's name, its Zarr data type, and the check before it.

Letters: B images, P patches, D encoder width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from featcache.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Codec:
    """A storage format for features.

    name: as given to `--codec`.
    dtype: the stored torch dtype.
    zarr_dtype: the Zarr v3 data type name.
    """

    name: str
    dtype: torch.dtype
    zarr_dtype: str

    @property
    def itemsize(self) -> int:
        """Bytes of one stored value."""
        return self.dtype.itemsize

    def encode(self, features: Tensor) -> tuple[Tensor, list[str | None]]:
        """Cast to the stored dtype, and name what is wrong with each image.

        features: float[B, ...] as the encoder computed them.
        Returns the stored values [B, ...] and, for each image, None or the reason it cannot be
        stored: the encoder gave a non-finite value, or a finite one beyond the stored range.
        """
        stored = features.to(self.dtype)
        peak = features.abs().flatten(1).amax(1).float()
        lost = ~torch.isfinite(stored).flatten(1).all(1)
        reasons: list[str | None] = [None] * len(features)
        for i in lost.nonzero().flatten().tolist():
            value = float(peak[i])
            reasons[i] = (
                f"overflow: the largest |feature| is {value:.4g}, beyond {self.name}'s "
                f"{torch.finfo(self.dtype).max:.5g}" + "; use --codec bf16" * (self.name == "fp16")
                if torch.isfinite(peak[i])
                else "non_finite: the encoder gave NaN or infinity"
            )
        return stored, reasons


CODECS = {
    "fp16": Codec("fp16", torch.float16, "float16"),
    "bf16": Codec("bf16", torch.bfloat16, "bfloat16"),
}


def get_codec(name: str) -> Codec:
    """The codec of that name. Raises ConfigError for an unknown one."""
    if name not in CODECS:
        raise ConfigError(f"unknown codec {name!r}; choose one of {', '.join(CODECS)}")
    return CODECS[name]
