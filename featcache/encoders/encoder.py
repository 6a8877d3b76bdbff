"""An encoder on its device: pixels -> features, in as much memory as there is.

Letters: B images, P patches, D encoder width, N patches of the largest grid, C values of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from featcache.encoders.preprocessing import Pixels, Preprocessing, present_mask
from featcache.encoders.tower import RANDOM_REVISION, Encoded, Tower, first_line
from featcache.errors import EncoderError

OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # Windows' wording
    # oneDNN's; the second may have other causes, so the error for a single image quotes it.
    "could not create a memory",
    "could not create a primitive",
    "std::bad_alloc",
    # A full device leaves no room for cuBLAS' workspace, which is not torch's to allocate.
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Texts by which a RuntimeError says that memory is full; CUDA's allocator has a type for it."""


@dataclass(slots=True)
class Encoder:
    """A frozen vision tower on its device.

    layers: which outputs `encode` gives, in the numbering of `hidden_states`: "-1" is the last
    block's output before the final LayerNorm, "-2" the one before, "0" what enters the first
    block; "last" is transformers' `last_hidden_state`, after the final LayerNorm. Only patches
    are given: class and register tokens are dropped.
    weights: `weights_digest` of the model in float32.
    compiled: whether its blocks went through `torch.compile`.
    max_batch: the most images that one pass takes, found by running out of memory; None before.
    backed_off: (images that did not fit, images that then did) of the latest time; None before.
        Changes whenever memory runs out again, so a caller tells its user when it has changed.
    """

    name: str
    revision: str | None
    weights: str
    tower: Tower
    device: torch.device
    compute_dtype: torch.dtype
    compiled: bool = False
    max_batch: int | None = field(init=False, default=None)
    backed_off: tuple[int, int] | None = field(init=False, default=None)
    _table: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._table = self.preprocessing.normalisation_table().to(self.device)

    @property
    def model(self) -> PreTrainedModel:
        return self.tower.model

    @property
    def config(self) -> Any:
        return self.tower.config

    @property
    def preprocessing(self) -> Preprocessing:
        return self.tower.preprocessing

    @property
    def layers(self) -> tuple[str, ...]:
        return self.tower.layers

    @property
    def architecture(self) -> dict[str, Any]:
        """The config values that decide numbers at equal weights, as JSON."""
        return self.tower.architecture

    @property
    def random_weights(self) -> bool:
        """Whether nothing was ever learned."""
        return self.revision == RANDOM_REVISION

    @property
    def num_patches(self) -> int:
        """P; the most that an image has, where each has its own grid."""
        return self.tower.num_patches

    @property
    def width(self) -> int:
        """D."""
        return self.tower.width

    def preprocess(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """RGB image -> uint8[height, width, 3] at the encoder's resolution, or at that of the
        image's own patch grid. Raises ImageError where it would take too much memory."""
        return self.preprocessing.resize(image)

    def collate(self, images: Sequence[np.ndarray[Any, Any]]) -> Pixels:
        """What `preprocess` gave for some images, as a batch."""
        return self.preprocessing.collate(list(images))

    def normalize(self, pixels: Tensor, grids: Tensor | None = None) -> Tensor:
        """uint8[B, height, width, 3] on any device -> float32[B, 3, height, width] on ours.

        With grids uint8[B, N, C] -> float32[B, N, C], zeros after an image's last patch.
        """
        index = pixels.to(self.device, non_blocking=True).int()
        if grids is None:
            index = index.permute(0, 3, 1, 2)
            return torch.stack([self._table[c][index[:, c]] for c in range(3)], dim=1)
        index = index.unflatten(-1, (-1, 3))
        values = torch.stack([self._table[c][index[..., c]] for c in range(3)], dim=-1).flatten(2)
        return values * present_mask(grids, values.shape[1], self.device)[..., None]

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> Encoded:
        """What `collate` gave -> features of each of `layers`, in the compute dtype.

        A batch for which the memory does not suffice is computed in parts, halved until they fit;
        later batches begin with what fitted. Cutting a batch may change a feature's last bits.

        Raises EncoderError where a single image does not fit.
        """
        parts: list[Encoded] = []
        size = min(len(pixels), self.max_batch or len(pixels))
        start, failed = 0, None
        while start < len(pixels):
            part = pixels[start : start + size]
            encoded = _unless_out_of_memory(partial(self._forward, part))
            if isinstance(encoded, str):
                if len(part) == 1:
                    raise self._no_room(1, encoded)
                failed, size = failed or len(part), (len(part) + 1) // 2
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            if failed is not None:
                self.max_batch, self.backed_off, failed = size, (failed, size), None
            parts.append(encoded)
            start += len(part)
        if len(parts) == 1:
            return parts[0]
        joined = _unless_out_of_memory(partial(_concatenate, parts))
        if isinstance(joined, str):
            raise self._no_room(len(pixels), joined)
        return joined

    def _forward(self, pixels: Pixels) -> Encoded:
        """`encode` of a batch that fits."""
        values = self.normalize(pixels.values, pixels.grids).to(self.compute_dtype)
        return self.tower.forward(values, pixels.grids)

    def _no_room(self, batch: int, reason: str) -> EncoderError:
        smaller = "a smaller encoder" if batch == 1 else "a smaller --batch-size"
        elsewhere = "--device cpu or " if self.device.type == "cuda" else ""
        return EncoderError(
            f"the encoder {self.name} ran out of memory on {self.device} at batch {batch} "
            f"({reason}); use {elsewhere}{smaller}"
        )


def _unless_out_of_memory(compute: Callable[[], Encoded]) -> Encoded | str:
    """What `compute` returns; what was said where memory does not suffice.

    On return the exception is gone, and with its traceback's frames the tensors of the attempt:
    a retry from within `except` would find them all still there.
    """
    try:
        return compute()
    except (torch.OutOfMemoryError, MemoryError) as error:
        return first_line(error)
    except RuntimeError as error:
        if not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        return first_line(error)


def _concatenate(parts: Sequence[Encoded]) -> Encoded:
    pooled = [part.pooled for part in parts if part.pooled is not None]
    grids = [part.grids for part in parts if part.grids is not None]
    return Encoded(
        {name: torch.cat([part.features[name] for part in parts]) for name in parts[0].features},
        torch.cat(pooled) if pooled else None,
        torch.cat(grids) if grids else None,
    )
