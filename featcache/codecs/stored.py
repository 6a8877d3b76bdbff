"""Features of a layer in their stored form.

Letters: B images, P patches, D encoder width, C codes of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from featcache.codecs.base import Codec


@dataclass(frozen=True, slots=True)
class LayerCodec:
    """A codec with what it needs to know of one layer.

    num_patches, width: P and D. channels: the static float32[2, D], None for an unscaled codec.
    """

    codec: Codec
    num_patches: int
    width: int
    channels: Tensor | None = None
    _on: dict[torch.device, LayerCodec] = field(default_factory=dict, repr=False, compare=False)

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

    @property
    def image_bytes(self) -> int:
        """Of one image as it is stored."""
        return self.code_bytes + self.scale_bytes

    def to(self, device: torch.device | str) -> LayerCodec:
        """The same, with its channel values on another device; copied there once."""
        device = torch.device(device)
        if self.channels is None or self.channels.device == device:
            return self
        if device not in self._on:
            self._on[device] = replace(self, channels=self.channels.to(device), _on={})
        return self._on[device]

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

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def __getitem__(self, images: slice | Tensor) -> StoredFeatures:
        """A view of some of the images, or for their places, int64, a copy."""
        scales = None if self.scales is None else self.scales[images]
        return StoredFeatures(self.codes[images], scales, self.layer)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> StoredFeatures:
        """The same on another device, still in the stored, small form."""
        scales = None if self.scales is None else self.scales.to(device, non_blocking=non_blocking)
        codes = self.codes.to(device, non_blocking=non_blocking)
        return StoredFeatures(codes, scales, self.layer.to(device))

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """dtype[B, P, D] where the codes lie. None: the stored dtype of an unscaled codec, else
        float32."""
        if dtype is None:
            dtype = torch.float32 if self.layer.codec.scaled else self.codes.dtype
        if not len(self):  # a store without images has no channel values
            shape = (0, self.layer.num_patches, self.layer.width)
            return torch.empty(shape, dtype=dtype, device=self.codes.device)
        return self.layer.codec.decode(self.codes, self.scales, self.layer.channels, dtype)
