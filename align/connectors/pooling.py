"""Baselines that pool: fewer visual tokens by a fixed rule, then a projector.

Sources of the four kinds, each followed by LLaVA-1.5's `mlpNx_gelu` (Liu et al. 2023):

    mean     one token, the mean of all patches: the least that a connector can be
    average  adaptive average pooling to side x side, as in DeCo (Yao et al. 2024)
    shuffle  pixel shuffle (space to depth): factor x factor patches concatenated to one token, as
             in InternVL 1.5 (Chen et al. 2024) and Idefics3
    stride   every factor-th patch of every factor-th row, the others are dropped

    I images, P patches, D encoder width, Q visual tokens, S pooled width, H LLM width

This file imports nothing but torch and can be copied into another project as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class PoolConfig:
    """How patches become fewer, and the projector's depth. Widths come from the two models."""

    name: str = "pool"
    kind: str = "average"
    """One of "mean", "average", "shuffle" or "stride"; see the top of this file."""
    side: int = 8
    """Rows and columns of visual tokens of kind "average"."""
    factor: int = 2
    """Of kinds "shuffle" and "stride": patches per token along a side."""
    depth: int = 2
    """Linear layers of the projector; 1 is a plain linear projection."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one "field: reason" each."""
        if self.kind not in ("mean", "average", "shuffle", "stride"):
            yield f'kind: must be "mean", "average", "shuffle" or "stride", got {self.kind!r}'
        for name in ("side", "factor", "depth"):
            if getattr(self, name) < 1:
                yield f"{name}: must be at least 1, got {getattr(self, name)}"

    def build(self, towers: Sequence[tuple[int, int]], out_width: int) -> Pool:
        """The module for one encoder of (P, D) patches x width and an LLM of `out_width`.

        Raises ValueError where the patches cannot be pooled so, or for several encoders.
        """
        if len(towers) != 1:
            raise ValueError(
                f"{self.name} takes the features of one encoder, got {len(towers)}; "
                "connector.name=sva takes several"
            )
        return Pool(self, *towers[0], out_width)

    def grid(self, num_patches: int) -> tuple[int, int] | None:
        """(rows, columns) of visual tokens made of P patches; None for the one of kind "mean".

        Raises ValueError where the patches cannot be pooled so.
        """
        if self.kind == "mean":
            return None
        native = math.isqrt(num_patches)
        if native**2 != num_patches:
            raise ValueError(
                f'kind "{self.kind}" needs a square grid, {num_patches} patches are none; use '
                'kind "mean" or a resampler'
            )
        if self.kind == "average" and self.side > native:
            raise ValueError(
                f"side {self.side} is more than the {native} x {native} patches have; use at most "
                f"{native}"
            )
        if self.kind == "shuffle" and native % self.factor:
            fitting = [n for n in range(1, native + 1) if native % n == 0]
            raise ValueError(
                f"factor {self.factor} does not divide the grid of {native} x {native} patches; "
                f"use {' or '.join(map(str, fitting))}"
            )
        side = self.side if self.kind == "average" else math.ceil(native / self.factor)
        return side, side


class Pool(nn.Module):
    """features float[I, P, D] -> visual tokens float[I, Q, H].

    1. Pooling to float[I, Q, S]: S = D * factor^2 for kind "shuffle", D for the others.
    2. `projector`: Linear(S, H), then depth - 1 times (GELU, Linear(H, H)).

    S * H + H parameters at depth 1 and H^2 + H more for each further layer: 20,979,712 for D = 1024
    and H = 4096 at depth 2, 33,562,624 of kind "shuffle" with factor 2.

    num_tokens: Q. grid: (rows, columns) of the tokens, None for kind "mean".
    """

    def __init__(self, config: PoolConfig, num_patches: int, in_width: int, out_width: int) -> None:
        super().__init__()
        self.grid = config.grid(num_patches)
        self.num_tokens = 1 if self.grid is None else math.prod(self.grid)
        self.num_patches = num_patches
        self.kind, self.factor = config.kind, config.factor
        pooled = in_width * (config.factor**2 if config.kind == "shuffle" else 1)
        layers: list[nn.Module] = [nn.Linear(pooled, out_width)]
        for _ in range(config.depth - 1):
            layers += [nn.GELU(), nn.Linear(out_width, out_width)]
        self.projector = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """features float[I, P, D] -> float[I, Q, H], in the dtype of the weights or of autocast."""
        return self.projector(self.pool(features))

    def pool(self, features: Tensor) -> Tensor:
        """features float[I, P, D] -> float[I, Q, S]"""
        if self.grid is None:
            return features.mean(1, keepdim=True)
        native = math.isqrt(self.num_patches)
        grid = features.unflatten(1, (native, native))
        match self.kind:
            case "average":
                pooled = F.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), self.grid)
                return pooled.flatten(2).transpose(1, 2)
            case "shuffle":
                side, _ = self.grid
                cells = grid.unflatten(2, (side, -1)).unflatten(1, (side, -1)).transpose(2, 3)
                return cells.flatten(3).flatten(1, 2)
            case _:
                return grid[:, :: self.factor, :: self.factor].flatten(1, 2)
