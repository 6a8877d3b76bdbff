"""The LLaVA-1.5 projector, `mlpNx_gelu`: every patch becomes one visual token.

Source: "Improved Baselines with Visual Instruction Tuning" (Liu et al. 2023), `mlp2x_gelu` of the
LLaVA code: Linear(D, H), then N - 1 times (exact GELU, Linear(H, H)), all with bias. The linear
layers sit at indices 0, 2, ... of one `nn.Sequential`, so LLaVA's own weight names fit.

    I images, P patches, D encoder width, H LLM width

This file imports nothing but torch and can be copied into another project as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class MlpConfig:
    """The projector's depth. Its widths come from the encoder and the LLM."""

    name: str = "mlp"
    depth: int = 2
    """Linear layers; 2 is LLaVA-1.5's `mlp2x_gelu`, 1 the plain linear projector of LLaVA."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one "field: reason" each."""
        if self.depth < 1:
            yield f"depth: must be at least 1, got {self.depth}"

    def build(self, towers: Sequence[tuple[int, int]], out_width: int) -> Mlp:
        """The module for one encoder of (P, D) patches x width and an LLM of `out_width`.

        Raises ValueError for several encoders.
        """
        if len(towers) != 1:
            raise ValueError(
                f"{self.name} takes the features of one encoder, got {len(towers)}; "
                "connector.name=sva takes several"
            )
        return Mlp(self, *towers[0], out_width)


class Mlp(nn.Module):
    """features float[I, P, D] -> visual tokens float[I, P, H], each patch by itself.

    20,979,712 parameters for D = 1024, H = 4096; 31,467,520 for D = 1024, H = 5120.

    num_tokens: P. grid: (rows, columns) where P is a square number, else None.
    """

    def __init__(self, config: MlpConfig, num_patches: int, in_width: int, out_width: int) -> None:
        super().__init__()
        side = math.isqrt(num_patches)
        self.num_tokens = num_patches
        self.grid = (side, side) if side * side == num_patches else None
        self.num_patches = num_patches
        layers: list[nn.Module] = [nn.Linear(in_width, out_width)]
        for _ in range(config.depth - 1):
            layers += [nn.GELU(), nn.Linear(out_width, out_width)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """features float[I, P, D] -> float[I, P, H], in the dtype of the weights or of autocast."""
        return self.layers(features)
