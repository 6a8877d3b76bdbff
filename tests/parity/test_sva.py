"""The SVA against a second one, written from its description alone: one image, one query, one key
at a time, over the parameter names of Cambrian-1's checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from align.connectors.sva import Sva, SvaConfig

Weights = dict[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = w[f"{name}.weight"] @ x
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean()
    scaled = centred / torch.sqrt((centred * centred).mean() + 1e-5)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def bilinear(patches: Tensor, target: int) -> list[list[Tensor]]:
    """[P, C] -> target x target vectors; pixel centres lie at half-integers."""
    native = math.isqrt(len(patches))

    def neighbours(place: int) -> list[tuple[int, float]]:
        centre = max((place + 0.5) * native / target - 0.5, 0.0)
        low = int(centre)
        return [(low, 1 - (centre - low)), (min(low + 1, native - 1), centre - low)]

    def cell(row: int, column: int) -> Tensor:
        parts = [
            patches[r * native + c] * (part_r * part_c)
            for r, part_r in neighbours(row)
            for c, part_c in neighbours(column)
        ]
        return torch.stack(parts).sum(0)

    return [[cell(row, column) for column in range(target)] for row in range(target)]


def is_padding(row: int, column: int, side: int, size: tuple[int, int]) -> bool:
    """Whether a cell lies in what padding the image to a square added."""
    width, height = size
    if width == height:
        return False
    if width > height:
        kept, place = int(height * (side / width)), row
    else:
        kept, place = int(width * (side / height)), column
    border = (side - kept) // 2
    return place < border or place >= side - border


def by_hand(
    w: Weights, towers: list[Tensor], sizes: list[tuple[int, int]], config: SvaConfig
) -> Tensor:
    """towers: T times [I, P, C] -> [I, side * side, H]"""
    side = config.side
    images = []
    for image, size in enumerate(sizes):
        grids = []
        for t, tower in enumerate(towers):
            length = config.token_lengths[t] if config.token_lengths else side * side
            cells = bilinear(tower[image], math.isqrt(length))
            aux = f"model.mm_projector_aux_{t}"
            for row in cells:
                for c, cell in enumerate(row):
                    hidden = gelu(linear(w, f"{aux}.0", cell))
                    row[c] = norm(w, f"{aux}.3", linear(w, f"{aux}.2", hidden))
            grids.append(cells)
        first = [cell for row in grids[0] for cell in row]
        context = sum(first[1:], first[0]) / len(first)

        tokens = []
        for row in range(side):
            for column in range(side):
                of_groups = []
                for g in range(config.groups):
                    query = w["model.vision_query"][g]
                    for layer in range(config.depth):
                        name = f"model.vision_sampler_{g}.layers.{layer}"
                        seen = keys_of(w, name, grids, size, row, column, side)
                        query = one_layer(w, name, query, context, seen, config.heads)
                    of_groups.append(query)
                hidden = gelu(linear(w, "model.mm_projector.0", torch.cat(of_groups)))
                tokens.append(linear(w, "model.mm_projector.2", hidden))
        images.append(torch.stack(tokens))
    return torch.stack(images)


def keys_of(
    w: Weights,
    name: str,
    grids: list[list[list[Tensor]]],
    size: tuple[int, int],
    row: int,
    column: int,
    side: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values that the query at a place of the grid may look at, tower by tower."""
    found: dict[str, list[Tensor]] = {"k": [], "v": []}
    for t, grid in enumerate(grids):
        window = len(grid) // side
        places = [
            (row * window + i, column * window + j) for i in range(window) for j in range(window)
        ]
        padded = [is_padding(r, c, len(grid), size) for r, c in places]
        for index, (r, c) in enumerate(places):
            if padded[index] and not all(padded):
                continue
            token = grid[r][c]
            if window > 1:
                token = token + w[f"{name}.pos_embed_{t}"][index]
            for kind, vectors in found.items():
                proj = f"{name}.cross_attn.{kind}_proj_{t}"
                vectors.append(linear(w, f"{proj}.1", norm(w, f"{proj}.0", token)))
    return found["k"], found["v"]


def one_layer(
    w: Weights,
    name: str,
    query: Tensor,
    context: Tensor,
    seen: tuple[list[Tensor], list[Tensor]],
    heads: int,
) -> Tensor:
    about = linear(w, f"{name}.proj_context", context)
    inner = linear(w, f"{name}.proj_in", torch.cat([query, about]))
    attn = f"{name}.cross_attn"
    asked = linear(w, f"{attn}.q_proj.1", norm(w, f"{attn}.q_proj.0", inner))
    keys, values = seen
    mixed = []
    for h, of_head in enumerate(asked.chunk(heads)):
        scores = [of_head @ key.chunk(heads)[h] / math.sqrt(len(of_head)) for key in keys]
        weights = torch.softmax(torch.stack(scores), 0)
        mixed.append(torch.stack([value.chunk(heads)[h] for value in values]).T @ weights)
    inner = inner + linear(w, f"{attn}.o_proj", torch.cat(mixed))
    hidden = gelu(linear(w, f"{name}.proj_out.linear_1", norm(w, f"{name}.norm", inner)))
    return query + linear(w, f"{name}.proj_out.linear_2", hidden)


@dataclass
class Case:
    towers: list[tuple[int, int]]
    sizes: list[tuple[int, int]]
    config: SvaConfig


SQUARE, WIDE, TALL, STRIP, ODD = (64, 64), (640, 400), (333, 500), (1000, 100), (641, 480)
CASES = {
    "one tower": Case([(16, 5)], [SQUARE, WIDE], SvaConfig(width=8, side=4, depth=2, heads=2)),
    "one tower, larger windows, interpolated": Case(
        [(25, 5)], [TALL, ODD], SvaConfig(width=8, side=3, depth=2, heads=4, token_lengths=[36])
    ),
    # Cambrian-1's four at a sixth of the grid: 27 -> 24, 24, 27 -> 24 and 96 become 5, 4, 5 and 16.
    "four towers": Case(
        [(25, 6), (16, 5), (25, 7), (256, 9)],
        [SQUARE, WIDE, TALL, STRIP],
        SvaConfig(width=16, side=4, depth=3, heads=4, token_lengths=[16, 16, 16, 256]),
    ),
    # 12 x 12 at 10 : 1 is padding but for 2 rows: most windows lie in it wholly, some partly.
    "windows of padding": Case(
        [(144, 4), (9, 3)],
        [STRIP, (100, 1000), (500, 300), (300, 500)],
        SvaConfig(width=8, side=3, depth=2, heads=2, token_lengths=[144, 36]),
    ),
    "two groups": Case(
        [(16, 5), (16, 4)],
        [WIDE],
        SvaConfig(width=8, side=2, groups=2, depth=2, heads=2, token_lengths=[4, 16]),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward_and_gradients(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = case.config
    sva = Sva(config, case.towers, 12).to(dtype)
    with torch.no_grad():
        for parameter in sva.parameters():  # norms start at 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.2)
    features = [
        torch.randn(len(case.sizes), *tower, dtype=dtype).requires_grad_() for tower in case.towers
    ]
    tokens = sva(features, case.sizes)
    pull = torch.randn_like(tokens)
    (tokens * pull).sum().backward()

    names = sva.original_names()
    weights = {
        names[name]: p.detach().double().requires_grad_() for name, p in sva.named_parameters()
    }
    inputs = [tower.detach().double().requires_grad_() for tower in features]
    expected = by_hand(weights, inputs, case.sizes, config)
    (expected * pull.double()).sum().backward()

    # Measured worst case over five seeds, outputs being of size 1 to 3: 1.9e-6 and 7.3e-7 of the
    # largest gradient in fp32, 2.3e-15 and 2.1e-15 in fp64.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-14
    torch.testing.assert_close(tokens.double(), expected, rtol=0, atol=tolerance)
    pairs = {name: (p.grad, weights[names[name]].grad) for name, p in sva.named_parameters()}
    pairs |= {f"features {t}": (features[t].grad, x.grad) for t, x in enumerate(inputs)}
    largest = max(float(hand.abs().max()) for _, hand in pairs.values() if hand is not None)
    for name, (ours, hand) in pairs.items():
        assert ours is not None and hand is not None, name
        torch.testing.assert_close(
            ours.double(), hand, rtol=0, atol=tolerance * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_names_are_the_originals() -> None:
    """Of one parameter of each kind, as RECIPES and the original's modules have them."""
    config = SvaConfig(width=8, side=2, groups=2, depth=2, heads=2, token_lengths=[4, 16])
    names = Sva(config, [(16, 5), (16, 4)], 12).original_names()
    assert len(set(names.values())) == len(names)
    sampler = "model.vision_sampler_1.layers.0"
    expected = {
        "vision_query": "model.vision_query",
        "aux.1.3.bias": "model.mm_projector_aux_1.3.bias",
        "projector.2.weight": "model.mm_projector.2.weight",
        "samplers.1.0.proj_context.weight": f"{sampler}.proj_context.weight",
        "samplers.1.0.proj_in.weight": f"{sampler}.proj_in.weight",
        "samplers.1.0.norm.bias": f"{sampler}.norm.bias",
        "samplers.1.0.q_proj.0.bias": f"{sampler}.cross_attn.q_proj.0.bias",
        "samplers.1.0.o_proj.weight": f"{sampler}.cross_attn.o_proj.weight",
        "samplers.1.0.k_proj.1.1.weight": f"{sampler}.cross_attn.k_proj_1.1.weight",
        "samplers.1.0.v_proj.0.0.weight": f"{sampler}.cross_attn.v_proj_0.0.weight",
        "samplers.1.0.pos_embed.1": f"{sampler}.pos_embed_1",
        "samplers.1.0.proj_out.0.weight": f"{sampler}.proj_out.linear_1.weight",
        "samplers.1.0.proj_out.2.weight": f"{sampler}.proj_out.linear_2.weight",
    }
    assert {name: names[name] for name in expected} == expected
