"""Spatial Vision Aggregator (SVA): the patches of several encoders -> one grid of visual tokens.

Source: Cambrian-1 (Tong et al. 2024, section 3.2), in the form of its code with
`connector_only=True` (`cambrian/model/vision_sampler.py`, `cambrian_arch.py`): all of the
aggregation happens before the language model. The scripts that were released run
`connector_only=False`, which also puts aggregation layers *inside* the language model; a frozen,
unchanged language model can only be given the former. The original's learned `image_newline`
comes after this module and is no part of it.

    I images, T towers (encoders), P_t patches and C_t width of tower t, L_t its token length,
    k_t side of a window of tower t, D width, G query groups, Q queries, K keys of a query,
    H LLM width

Parameter names, original -> ours (`Sva.original_names` gives every one):

    model.vision_query                                   vision_query
    model.mm_projector_aux_{t}.{0,2,3}                   aux.{t}.{0,2,3}
    model.vision_sampler_{g}.layers.{i}.                 samplers.{g}.{i}.
        proj_context, proj_in, norm                          as they are
        cross_attn.{q_proj,o_proj}                           q_proj, o_proj
        cross_attn.{k_proj,v_proj}_{t}                       k_proj.{t}, v_proj.{t}
        pos_embed_{t}                                        pos_embed.{t}
        proj_out.linear_{1,2}                                proj_out.{0,2}
    model.mm_projector.{0,2}                             projector.{0,2}

This file imports nothing but torch and can be copied into another project as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class SvaConfig:
    """What the aggregator is made of. Its other widths come from the encoders and the LLM."""

    name: str = "sva"
    width: int = 1024
    """D, of queries, keys and values."""
    side: int = 24
    """Rows and columns of the grid of queries; side * side visual tokens per image."""
    groups: int = 1
    """G, query groups: each has a query vector and layers of its own over the same grid, and their
    outputs are concatenated."""
    depth: int = 3
    """Layers of a group."""
    heads: int = 16
    token_lengths: list[int] = field(default_factory=list)
    """Per tower, the number of tokens that its patches are interpolated to: the square of a
    multiple of `side`, e.g. [576, 576, 576, 9216]; empty takes side * side for each."""
    mask_padding: bool = True
    """Keep queries from looking at the padding of images that were padded to a square. Where they
    were resized or cropped to one there is none, and nothing is masked."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one "field: reason" each."""
        sizes = ("width", "side", "groups", "depth", "heads")
        for name in sizes:
            if getattr(self, name) < 1:
                yield f"{name}: must be at least 1, got {getattr(self, name)}"
        if min(getattr(self, name) for name in sizes) < 1:
            return
        if self.width % self.heads:
            yield f"width: must be divisible by heads, got {self.width} and {self.heads}"
        for length in self.token_lengths:
            if length < 1 or math.isqrt(length) ** 2 != length or math.isqrt(length) % self.side:
                yield (
                    f"token_lengths: must be squares of multiples of side {self.side}, such as "
                    f"{self.side**2} or {(2 * self.side) ** 2}, got {length}"
                )

    def window_sides(self, num_towers: int) -> list[int]:
        """k_t of each tower: its share of a query is a window of k_t x k_t tokens.

        Raises ValueError where `token_lengths` is for another number of towers.
        """
        lengths = self.token_lengths or [self.side**2] * num_towers
        if len(lengths) != num_towers:
            raise ValueError(
                f"token_lengths has {len(lengths)} numbers for {num_towers} encoders; give one for "
                "each, or none"
            )
        return [math.isqrt(length) // self.side for length in lengths]

    def notices(self, towers: Sequence[tuple[int, int]]) -> Iterator[str]:
        """What is legal, but should be known before training; one line each.

        towers: (P_t, C_t) of each encoder, as for `build`.
        """
        if sum(side**2 for side in self.window_sides(len(towers))) == 1:
            dead = self.groups * self.depth * (2 * self.width**2 + 4 * self.width)
            yield (
                f"one encoder at {self.side**2} tokens gives each query one key to attend to: the "
                f"attention is always 1, so q_proj and k_proj ({dead:,} parameters) get no "
                f"gradient and stay as they start; add an encoder, or set token_lengths to "
                f"[{(2 * self.side) ** 2}]"
            )

    def build(self, towers: Sequence[tuple[int, int]], out_width: int) -> Sva:
        """The module for encoders of (P_t, C_t) patches x width and an LLM of `out_width`.

        Raises ValueError where patches are no square grid or `token_lengths` does not fit.
        """
        return Sva(self, towers, out_width)


class Sva(nn.Module):
    """T times features float[I, P_t, C_t] -> visual tokens float[I, Q, H], a row-major grid.

    1. Bilinear interpolation, at least in fp32, of each tower's square grid to L_t tokens.
    2. `aux`: Linear(C_t, D), GELU, Linear(D, D), LayerNorm for each tower.
    3. The context of an image is the mean of tower 0's tokens, padding included.
    4. The grid of tower t is cut into side x side windows of k_t x k_t tokens. Query q of the grid
       sees the q-th window of every tower, K = sum of k_t^2 keys; those in the image's padding are
       masked, but where all of a tower's window lies there none of it is.
    5. For each group, one learned query vector at all Q places goes through `depth` layers.
    6. `projector` over the groups' concatenated outputs: Linear(D * G, H), GELU, Linear(H, H).

    Parameters at D = 1024, G = 1, depth 3: 47,296,512 of the layers for four towers of windows
    1, 1, 1, 4, and 28,336,128 for one tower; `aux` 2,232,320, 2,101,248, 2,625,536 and 6,950,912
    for C_t of 1152, 1024, 1536 and 5760; `projector` 20,979,712 at H = 4096.

    num_tokens: Q. grid: (side, side). towers: (P_t, C_t) of each encoder.
    slow_parameters: prefixes of the names of what the original trains at a tenth of the learning
        rate (`mm_vision_sampler_lr` 1e-4 beside 1e-3): the queries and the layers.
    """

    needs_sizes = True
    slow_parameters = ("vision_query", "samplers.")

    def __init__(
        self, config: SvaConfig, towers: Sequence[tuple[int, int]], out_width: int
    ) -> None:
        super().__init__()
        if not towers:
            raise ValueError("sva needs the features of at least one encoder, got none")
        for index, (patches, _) in enumerate(towers):
            if math.isqrt(patches) ** 2 != patches:
                raise ValueError(
                    f"sva needs square grids of patches, encoder {index} has {patches} patches; "
                    "leave it out"
                )
        width, windows = config.width, config.window_sides(len(towers))
        self.towers = tuple(towers)
        self.num_tokens = config.side**2
        self.grid = (config.side, config.side)
        self.window_sides = windows
        self.mask_padding = config.mask_padding
        self.aux = nn.ModuleList(
            nn.Sequential(
                nn.Linear(in_width, width),
                nn.GELU(),
                nn.Linear(width, width),
                nn.LayerNorm(width),
            )
            for _, in_width in towers
        )
        self.vision_query = nn.Parameter(torch.randn(config.groups, width) / math.sqrt(width))
        self.samplers = nn.ModuleList(
            nn.ModuleList(Layer(width, config.heads, windows) for _ in range(config.depth))
            for _ in range(config.groups)
        )
        self.projector = nn.Sequential(
            nn.Linear(width * config.groups, out_width),
            nn.GELU(),
            nn.Linear(out_width, out_width),
        )

    def forward(self, features: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        """features: T times float[I, P_t, C_t]; sizes: (width, height) of the I original images ->
        float[I, Q, H], in the dtype of the weights or of autocast.

        Raises ValueError for features of other shapes than the module was built for.
        """
        given = [tuple(tower.shape) for tower in features]
        expected = [(len(sizes), *tower) for tower in self.towers]
        if given != expected:
            raise ValueError(
                f"sva was built for features {expected} of {len(sizes)} images, got {given}"
            )
        side = self.grid[0]
        tokens = [
            project(resize_grid(tower, side * window))
            for project, tower, window in zip(self.aux, features, self.window_sides, strict=True)
        ]
        context = tokens[0].mean(1, keepdim=True)
        windows = [cut_windows(grid, side) for grid in tokens]
        mask = self.mask(sizes) if self.mask_padding and sizes else None
        if mask is not None:
            # From pageable memory the copy may wait for what the device is at.
            on_cuda = context.device.type == "cuda"
            mask = (mask.pin_memory() if on_cuda else mask).to(context.device, non_blocking=True)
        outputs = []
        for vector, layers in zip(self.vision_query, self.samplers, strict=True):
            queries = vector.expand(len(sizes), self.num_tokens, -1)
            for layer in layers:  # type: ignore[attr-defined]  # a ModuleList in a ModuleList
                queries = layer(queries, context, windows, mask)
            outputs.append(queries)
        return self.projector(torch.cat(outputs, dim=-1))

    def mask(self, sizes: Sequence[tuple[int, int]]) -> Tensor | None:
        """bool[I, Q, K] on the CPU, true where a query may look; None where it may everywhere.

        sizes: (width, height) of the original images.
        """
        side = self.grid[0]
        windows = []
        for window in self.window_sides:
            real = torch.stack([real_cells(*size, side * window) for size in sizes])
            cut = cut_windows(real.flatten(1).unsqueeze(-1), side).squeeze(-1)
            windows.append(cut | ~cut.any(-1, keepdim=True))
        mask = torch.cat(windows, dim=-1)
        return None if mask.all() else mask

    def original_names(self) -> dict[str, str]:
        """Our name of each parameter -> its name in a checkpoint of Cambrian-1."""
        return {name: original_name(name) for name, _ in self.named_parameters()}


class Layer(nn.Module):
    """Each query looks at its own windows, all towers' keys in one softmax. No biases but in norms.

    1. inner = `proj_in`(query, `proj_context`(context)), 2 D -> D
    2. Tokens of windows larger than one get `pos_embed` of their place in the window.
    3. inner + `o_proj`(attention(query = `q_proj`(inner), key = `k_proj`_t, value = `v_proj`_t)),
       each projection a LayerNorm and a Linear
    4. query + `proj_out`(`norm`(inner)), with `proj_out` Linear(D, D), GELU, Linear(D, D)
    """

    def __init__(self, width: int, heads: int, window_sides: Sequence[int]) -> None:
        super().__init__()
        self.heads = heads
        self.proj_context = nn.Linear(width, width, bias=False)
        self.proj_in = nn.Linear(2 * width, width, bias=False)
        self.q_proj = norm_linear(width)
        self.k_proj = nn.ModuleList(norm_linear(width) for _ in window_sides)
        self.v_proj = nn.ModuleList(norm_linear(width) for _ in window_sides)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.pos_embed = nn.ParameterDict(
            {
                str(tower): nn.Parameter(torch.randn(side**2, width))
                for tower, side in enumerate(window_sides)
                if side > 1
            }
        )
        self.norm = nn.LayerNorm(width)
        self.proj_out = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.GELU(), nn.Linear(width, width, bias=False)
        )

    def forward(
        self, queries: Tensor, context: Tensor, windows: Sequence[Tensor], mask: Tensor | None
    ) -> Tensor:
        """queries float[I, Q, D], context float[I, 1, D], windows T times float[I, Q, k_t^2, D],
        mask bool[I, Q, K] true where a key is seen -> float[I, Q, D]"""
        context = self.proj_context(context).expand(-1, queries.shape[1], -1)
        inner = self.proj_in(torch.cat([queries, context], dim=-1))
        placed = [
            window + self.pos_embed[str(tower)] if str(tower) in self.pos_embed else window
            for tower, window in enumerate(windows)
        ]
        keys = torch.cat([k(w) for k, w in zip(self.k_proj, placed, strict=True)], dim=2)
        values = torch.cat([v(w) for v, w in zip(self.v_proj, placed, strict=True)], dim=2)
        attended = self.attend(self.q_proj(inner), keys, values, mask)
        return queries + self.proj_out(self.norm(inner + self.o_proj(attended)))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """query float[I, Q, D], keys and values float[I, Q, K, D] -> float[I, Q, D]

        Written out: the fused kernels are made for many queries over the same keys, and for one key
        they leave rounding where the gradient is 0, which Adam would scale up to full steps.
        """
        query = query.unflatten(-1, (self.heads, -1))
        keys = keys.unflatten(-1, (self.heads, -1))
        values = values.unflatten(-1, (self.heads, -1))
        scores = torch.einsum("iqhd,iqkhd->iqhk", query, keys) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(2), -math.inf)
        return torch.einsum("iqhk,iqkhd->iqhd", scores.softmax(-1), values).flatten(2)


def norm_linear(width: int) -> nn.Sequential:
    """LayerNorm, then a linear layer without bias."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))


def resize_grid(features: Tensor, side: int) -> Tensor:
    """float[I, P, C] over a square grid of P -> float[I, side * side, C], bilinearly, with
    `align_corners=False`; computed at least in fp32, returned in the dtype given."""
    native = math.isqrt(features.shape[1])
    if native == side:
        return features
    exact = features.to(torch.promote_types(features.dtype, torch.float32))
    grid = exact.transpose(1, 2).unflatten(2, (native, native))
    resized = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(features.dtype)


def cut_windows(tokens: Tensor, side: int) -> Tensor:
    """[I, L, C] over a square grid -> [I, side * side, L / (side * side), C]: windows in row-major
    order, each with its tokens in row-major order."""
    window = math.isqrt(tokens.shape[1]) // side
    grid = tokens.unflatten(1, (side, window, side, window))
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def real_cells(width: int, height: int, side: int) -> Tensor:
    """bool[side, side], false where a grid over an image that was padded to a square shows padding.

    Rounded as the original does (`get_padding_offset` of `train_fsdp.py`): the content's extent
    down, then half of what is left down, the same on both sides.
    """
    scale = side / max(width, height)
    padding = (side - int(min(width, height) * scale)) // 2
    place = torch.arange(side)
    real = (place >= padding) & (place < side - padding)
    return real[:, None].expand(side, side) if width > height else real.expand(side, side)


def original_name(name: str) -> str:
    """The name in a checkpoint of Cambrian-1 of a parameter of `Sva`."""
    part, *rest = name.split(".")
    match part:
        case "vision_query":
            return "model.vision_query"
        case "projector":
            return ".".join(["model.mm_projector", *rest])
        case "aux":
            tower, *rest = rest
            return ".".join([f"model.mm_projector_aux_{tower}", *rest])
    group, index, kind, *rest = rest
    match kind:
        case "q_proj" | "o_proj":
            inner = ["cross_attn", kind, *rest]
        case "k_proj" | "v_proj":
            inner = ["cross_attn", f"{kind}_{rest[0]}", *rest[1:]]
        case "pos_embed":
            inner = [f"pos_embed_{rest[0]}"]
        case "proj_out":
            inner = ["proj_out", f"linear_{int(rest[0]) // 2 + 1}", *rest[1:]]
        case _:
            inner = [kind, *rest]
    return ".".join([f"model.vision_sampler_{group}", "layers", index, *inner])
