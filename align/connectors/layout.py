"""From a grid of visual tokens to the slots of a sequence: unpadding, and a newline after each row.

Source: `prepare_inputs_labels_for_multimodal` of Cambrian-S (cambrian_arch.py), which has both from
LLaVA-NeXT's `unpad_image` and `image_newline`. An image that was padded to a square before it was
encoded leaves rows or columns of patches that show nothing but padding; these are dropped. Every
row that is left is followed by one slot with the same trained vector.

    I images, Q = side * side visual tokens an image, H LLM width, S slots of all images together

This file imports nothing but torch and can be copied into another project as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class LayoutConfig:
    """How an image's visual tokens become slots. With neither, each token is a slot."""

    newline: bool = False
    """One trained vector after each row of tokens, Cambrian's `image_newline`."""
    unpad: bool = False
    """Drop the rows or columns of patches that are padding; needs features of images that were
    padded to a square (`featcache extract --fit pad`)."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one "field: reason" each; nothing can be."""
        yield from ()


def unpadded(size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """Where an image's own tokens lie in the grid of the padded square: (top, left, height, width).

    size: the image's original (width, height). side: tokens along an edge of the square.
    The padding on both sides of the image is rounded down alike, so that a row which is half image
    stays: 640 x 480 in 27 x 27 keeps 21 rows. However long an image is, a row stays, or two of an
    even side (where the original is left with none).
    """
    width, height = size
    long, short = max(size), min(size)
    # The division first: in floating point the other order gives another number for some sizes.
    padding = min((side - int(short * (side / long))) // 2, (side - 1) // 2)
    if width > height:
        return padding, 0, side - 2 * padding, side
    return 0, padding, side, side - 2 * padding


class Layout(nn.Module):
    """Visual tokens float[I, Q, H] -> slots float[S, H], those of the first image first.

    1. (unpad) Of each image the rows and columns of `unpadded`.
    2. (newline) After each row the vector `newline`, float[H], begun as randn / sqrt(H).
    """

    def __init__(
        self, config: LayoutConfig, num_tokens: int, grid: tuple[int, int] | None, width: int
    ) -> None:
        """grid: rows and columns of the tokens, None where they are no grid. width: H.

        Raises ValueError where the tokens have not the grid that the config asks for.
        """
        super().__init__()
        if grid is None and (config.newline or config.unpad):
            raise ValueError(
                f"layout: newline and unpad need visual tokens in a grid, and the {num_tokens} of "
                "this connector are none; use another connector, or leave both off"
            )
        if config.unpad and grid is not None and grid[0] != grid[1]:
            raise ValueError(f"layout: unpad needs a square grid of tokens, this one is {grid}")
        self.unpad = config.unpad
        self.grid = grid or (1, num_tokens)
        self.newline = (
            nn.Parameter(torch.randn(width) / math.sqrt(width)) if config.newline else None
        )

    @property
    def needs_sizes(self) -> bool:
        """Whether images of different shapes take different numbers of slots."""
        return self.unpad

    def place(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the tokens that are kept of an image of that size."""
        if self.unpad:
            return unpadded(size, self.grid[0])
        return 0, 0, *self.grid

    def num_slots(self, size: tuple[int, int]) -> int:
        """Of an image of that original (width, height)."""
        _, _, rows, columns = self.place(size)
        return rows * (columns + (self.newline is not None))

    def forward(self, tokens: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """tokens: float[I, Q, H]; sizes: I original (width, height) -> float[S, H]."""
        flat = tokens.flatten(0, 1)
        if not self.unpad and self.newline is None:
            return flat
        kept, token_slots, newline_slots, count = self._plan(sizes)
        device = tokens.device
        # Two copies, each to places of its own, so that no gradient is summed in any order but one.
        slots = flat.new_empty(count, flat.shape[1])
        own = flat.index_select(0, _send(kept, device))
        slots = slots.index_copy(0, _send(token_slots, device), own)
        if self.newline is None:
            return slots
        rows = self.newline.to(flat.dtype).expand(len(newline_slots), -1)
        return slots.index_copy(0, _send(newline_slots, device), rows)

    def _plan(self, sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor, int]:
        """Of all images: which tokens are kept, the slots that they and the newlines come to
        (int64, rising), and how many slots there are."""
        rows, columns = self.grid
        index = torch.arange(rows * columns).view(rows, columns)
        kept, token_slots, newline_slots, count = [], [], [], 0
        for number, size in enumerate(sizes):
            top, left, height, width = self.place(size)
            own = index[top : top + height, left : left + width]
            kept.append(own.flatten() + number * rows * columns)
            step = width + (self.newline is not None)
            slots = count + torch.arange(height * step).view(height, step)
            token_slots.append(slots[:, :width].flatten())
            if self.newline is not None:
                newline_slots.append(slots[:, width])
            count += height * step
        empty = torch.empty(0, dtype=torch.int64)
        return (
            torch.cat([empty, *kept]),
            torch.cat([empty, *token_slots]),
            torch.cat([empty, *newline_slots]),
            count,
        )


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting for what the device is at, as a copy from pageable memory may."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
