"""Perceiver resampler and MLP projector: any number of patches -> a fixed number of visual tokens.

Source: the Perceiver resampler of Flamingo (Alayrac et al. 2022, section 3.1.1, without its time
embeddings and with the latents left out of the keys), in the form and sizes of the Qwen3 alignment
run that this project reproduces: `nn.MultiheadAttention` with biases, pre-norm on the queries only,
followed by a two-layer GELU projector.

    I images, P patches, D encoder width, Q visual tokens (latents), R resampler width, H LLM width

This file imports nothing but torch and can be copied into another project as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class ResamplerConfig:
    """What the resampler is made of. The widths at both ends come from the encoder and the LLM."""

    name: str = "resampler"
    num_latents: int = 64
    """Visual tokens per image, Q."""
    depth: int = 2
    """Cross-attention + feed-forward blocks."""
    heads: int = 8
    head_dim: int = 64
    """Width of one head; the resampler's width is R = heads * head_dim."""
    ff_ratio: float = 4.0
    """Hidden width of a block's feed-forward part over R."""
    mlp_ratio: float = 4.0
    """Hidden width of the projector over the LLM width H."""
    dropout: float = 0.0
    """In the feed-forward parts and the projector, after the GELU; 0 to 0.1 is usual."""
    vision_norm: bool = False
    """LayerNorm over D on the patches before anything else (2 * D parameters)."""
    position: str = "none"
    """What is added to the keys, never to the values: "none", "learned" (one vector a patch) or
    "sincos" (fixed, two-dimensional, needs a square number of patches and R divisible by 4)."""
    kv_norm: bool = False
    """LayerNorm over R on the projected patches, once per block."""
    final_norm: bool = False
    """LayerNorm over R on the latents that leave the last block."""
    zero_init: bool = False
    """Start the last linear layer at zero, so that every visual token starts as the zero vector."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one "field: reason" each."""
        for field in ("num_latents", "depth", "heads", "head_dim"):
            if getattr(self, field) < 1:
                yield f"{field}: must be at least 1, got {getattr(self, field)}"
        for field in ("ff_ratio", "mlp_ratio"):
            if getattr(self, field) <= 0:
                yield f"{field}: must be above 0, got {getattr(self, field)}"
        if not 0 <= self.dropout < 1:
            yield f"dropout: must be in [0, 1), got {self.dropout}"
        if self.position not in ("none", "learned", "sincos"):
            yield f'position: must be "none", "learned" or "sincos", got {self.position!r}'
        elif self.position == "sincos" and self.heads * self.head_dim % 4:
            width = self.heads * self.head_dim
            yield f'position: "sincos" needs heads * head_dim divisible by 4, got {width}'

    def build(self, towers: Sequence[tuple[int, int]], out_width: int) -> Resampler:
        """The module for one encoder of (P, D) patches x width and an LLM of `out_width`.

        Raises ValueError where `position` needs a square grid and gets none, or for several
        encoders.
        """
        if len(towers) != 1:
            raise ValueError(
                f"{self.name} takes the features of one encoder, got {len(towers)}; "
                "connector.name=sva takes several"
            )
        return Resampler(self, *towers[0], out_width)


class Block(nn.Module):
    """Latents look at the patches, then each latent is transformed by itself.

    1. latents + attention(query = norm(latents), key = patches + position, value = patches)
    2. latents + feed-forward(norm(latents))
    """

    def __init__(self, config: ResamplerConfig, width: int) -> None:
        super().__init__()
        hidden = round(width * config.ff_ratio)
        self.ln1 = nn.LayerNorm(width)
        self.kv_norm = nn.LayerNorm(width) if config.kv_norm else None
        self.attn = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.ln2 = nn.LayerNorm(width)
        self.ff = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, width),
        )

    def forward(self, latents: Tensor, patches: Tensor, position: Tensor | None) -> Tensor:
        """latents float[I, Q, R], patches float[I, P, R], position float[P, R] -> float[I, Q, R]"""
        if self.kv_norm is not None:
            patches = self.kv_norm(patches)
        keys = patches if position is None else patches + position
        attended, _ = self.attn(self.ln1(latents), keys, patches, need_weights=False)
        latents = latents + attended
        return latents + self.ff(self.ln2(latents))


class Resampler(nn.Module):
    """features float[I, P, D] -> visual tokens float[I, Q, H].

    1. (vision_norm) LayerNorm over D.
    2. `proj_in`: D -> R.
    3. `depth` blocks: Q learned latents attend to the P patches.
    4. (final_norm) LayerNorm over R.
    5. `projector`: R -> mlp_ratio * H -> H with GELU.

    With the defaults, D = 1152 and H = 4096: 6,927,872 parameters up to step 4 and 75,517,952 in
    step 5.

    num_tokens: Q. grid: None, latents have no places.
    """

    def __init__(
        self, config: ResamplerConfig, num_patches: int, in_width: int, out_width: int
    ) -> None:
        super().__init__()
        width = config.heads * config.head_dim
        hidden = round(out_width * config.mlp_ratio)
        self.num_tokens = config.num_latents
        self.grid = None
        self.num_patches = num_patches
        self.vision_norm = nn.LayerNorm(in_width) if config.vision_norm else None
        self.proj_in = nn.Linear(in_width, width)
        # Latents of equal size would stay equal: attention could not tell them apart.
        self.latents = nn.Parameter(torch.randn(config.num_latents, width) * 0.02)
        self.position: Tensor | None
        match config.position:
            case "none":
                self.position = None
            case "learned":
                self.position = nn.Parameter(torch.randn(num_patches, width) * 0.02)
            case "sincos":
                self.register_buffer("position", sincos(num_patches, width), persistent=False)
        self.blocks = nn.ModuleList(Block(config, width) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(width) if config.final_norm else None
        self.projector = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, out_width),
        )
        if config.zero_init:
            last = self.projector[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, features: Tensor) -> Tensor:
        """features float[I, P, D] -> float[I, Q, H], in the dtype of the weights or of autocast."""
        if self.vision_norm is not None:
            features = self.vision_norm(features)
        patches = self.proj_in(features)
        latents = self.latents.expand(len(features), -1, -1)
        for block in self.blocks:
            latents = block(latents, patches, self.position)
        if self.final_norm is not None:
            latents = self.final_norm(latents)
        return self.projector(latents)


def sincos(num_patches: int, width: int) -> Tensor:
    """Fixed two-dimensional position vectors, float[P, R]: half for the row, half for the column.

    Each half holds sines, then cosines, of the coordinate at wavelengths from 2 pi to 10,000 * 2 pi
    in a geometric row (Vaswani et al. 2017, over two axes as in MAE). Patches are in row order.

    Raises ValueError where the patches are not a square grid.
    """
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f'position "sincos" needs a square grid, {num_patches} patches are none; use "learned"'
        )
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows = axis[:, None].expand(side, side, -1)
    columns = axis[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(num_patches, width).float()
