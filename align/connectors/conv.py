"""Convolutional abstractor: bottleneck blocks, pooling to a smaller grid, more blocks, projector.

Source: the C-Abstractor of Honeybee (Cha et al. 2024, section 3.2): L ResNet blocks, adaptive
average pooling, L ResNet blocks, with L = 3. As in its published code (`honeybee/projectors.py`),
the features first get learned positions; the blocks are those of RegNetY (Radosavovic et al. 2020)
with squeeze-and-excitation (Hu et al. 2018), LayerNorm in the place of BatchNorm, SiLU in the place
of ReLU and depth-wise 3 x 3 convolutions; a two-layer projector with SiLU follows.

Where this departs from it:
- Features come without a class token, so there is no position for one. The original adds it and
  drops it before the first convolution.
- No learned tokens are appended to the output (the original's optional `eos_tokens`).
- 1 x 1 convolutions are linear layers over a channels-last grid: the same operation, but weights of
  the original would have to be reshaped.

    I images, P patches, D encoder width, C width of the blocks, Q visual tokens, H LLM width

This file imports nothing but torch and can be copied into another project as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class ConvConfig:
    """What the abstractor is made of. The widths at both ends come from the encoder and the LLM."""

    name: str = "conv"
    side: int = 12
    """Rows and columns of visual tokens; side * side per image."""
    width: int = 1024
    """C, of all blocks."""
    depth: int = 3
    """L, blocks before the pooling, and as many after it."""
    mlp_depth: int = 2
    """Linear layers of the projector."""
    position: bool = True
    """Add a learned vector to each patch."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one "field: reason" each."""
        for name in ("side", "width", "depth", "mlp_depth"):
            if getattr(self, name) < 1:
                yield f"{name}: must be at least 1, got {getattr(self, name)}"

    def build(self, towers: Sequence[tuple[int, int]], out_width: int) -> ConvAbstractor:
        """The module for one encoder of (P, D) patches x width and an LLM of `out_width`.

        Raises ValueError where the patches are no square grid of at least `side`, or for several
        encoders.
        """
        if len(towers) != 1:
            raise ValueError(
                f"{self.name} takes the features of one encoder, got {len(towers)}; "
                "connector.name=sva takes several"
            )
        return ConvAbstractor(self, *towers[0], out_width)


class Block(nn.Module):
    """A bottleneck of RegNetY, stride 1, bottleneck ratio 1.

    1. `conv1`: 1 x 1, LayerNorm, SiLU
    2. `conv2`: 3 x 3 depth-wise with zero padding, LayerNorm, SiLU
    3. times `gate`, one factor a channel made of the mean over the grid
    4. `conv3`: 1 x 1, LayerNorm
    5. plus the input (`shortcut`: 1 x 1, LayerNorm where the width changes), SiLU
    """

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        # As in RegNetY, a quarter of what comes into the block, also where that is not its width.
        squeezed = max(1, round(in_width / 4))
        self.conv1 = nn.Linear(in_width, width, bias=False)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.gate = nn.Sequential(
            nn.Linear(width, squeezed), nn.SiLU(), nn.Linear(squeezed, width), nn.Sigmoid()
        )
        self.conv3 = nn.Linear(width, width, bias=False)
        self.norm3 = nn.LayerNorm(width, eps=1e-6)
        self.shortcut = (
            nn.Identity()
            if in_width == width
            else nn.Sequential(
                nn.Linear(in_width, width, bias=False), nn.LayerNorm(width, eps=1e-6)
            )
        )

    def forward(self, grid: Tensor) -> Tensor:
        """grid float[I, rows, columns, D or C] -> float[I, rows, columns, C]"""
        inner = F.silu(self.norm1(self.conv1(grid)))
        inner = self.conv2(inner.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        inner = F.silu(self.norm2(inner))
        inner = inner * self.gate(inner.mean((1, 2), keepdim=True))
        return F.silu(self.norm3(self.conv3(inner)) + self.shortcut(grid))


class ConvAbstractor(nn.Module):
    """features float[I, P, D] -> visual tokens float[I, Q, H], a row-major grid.

    1. (position) plus a learned vector for each patch.
    2. `before`: L blocks on the patches' square grid, D -> C.
    3. Adaptive average pooling to side x side. On CUDA its gradient is summed in no fixed order
       where `side` does not divide the patches' grid, so runs there differ in their last bits.
    4. `after`: L blocks, C -> C.
    5. `projector`: Linear(C, H), then mlp_depth - 1 times (SiLU, Linear(H, H)).

    With the defaults, P = 576, D = 1024 and H = 4096: 589,824 parameters of step 1, 7,914,240 of
    step 2 and as many of step 4, and 20,979,712 of step 5.

    num_tokens: Q = side * side. grid: (side, side).
    """

    def __init__(self, config: ConvConfig, num_patches: int, in_width: int, out_width: int) -> None:
        super().__init__()
        native = math.isqrt(num_patches)
        if native**2 != num_patches:
            raise ValueError(
                f"conv needs a square grid, {num_patches} patches are none; use a resampler"
            )
        if config.side > native:
            raise ValueError(
                f"side {config.side} is more than the {native} x {native} patches have; use at "
                f"most {native}"
            )
        width = config.width
        self.num_tokens = config.side**2
        self.grid = (config.side, config.side)
        self.num_patches = num_patches
        self.position = (
            nn.Parameter(nn.init.trunc_normal_(torch.empty(num_patches, in_width), std=0.02))
            if config.position
            else None
        )
        self.before = blocks(config.depth, in_width, width)
        self.after = blocks(config.depth, width, width)
        layers: list[nn.Module] = [nn.Linear(width, out_width)]
        for _ in range(config.mlp_depth - 1):
            layers += [nn.SiLU(), nn.Linear(out_width, out_width)]
        self.projector = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """features float[I, P, D] -> float[I, Q, H], in the dtype of the weights or of autocast."""
        if self.position is not None:
            features = features + self.position
        native = math.isqrt(self.num_patches)
        grid = self.before(features.unflatten(1, (native, native)))
        pooled = F.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), self.grid).permute(0, 2, 3, 1)
        return self.projector(self.after(pooled).flatten(1, 2))


def blocks(depth: int, in_width: int, width: int) -> nn.Sequential:
    """`depth` blocks, the first of which changes the width."""
    return nn.Sequential(*(Block(width if i else in_width, width) for i in range(depth)))
