"""The convolutional abstractor: its counts, and its block against functional calls over NCHW."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from align.connectors.conv import Block, ConvConfig


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts() -> None:
    with torch.device("meta"):
        conv = ConvConfig().build([(576, 1024)], 4096)
        wide = ConvConfig(position=False).build([(729, 1152)], 4096)
    assert conv.position is not None and conv.position.numel() == 589_824
    assert count(conv.before) == count(conv.after) == 7_914_240
    assert count(conv.projector) == 20_979_712
    assert (conv.num_tokens, conv.grid) == (144, (12, 12))
    # The first block alone differs: its two ways in, a norm, and a gate of 1152 / 4 inner channels.
    shortcut = 1152 * 1024 + 2 * 1024
    gates = [2 * n * 1024 + n + 1024 for n in (1152 // 4, 1024 // 4)]
    assert count(wide) - count(conv) == (
        (1152 - 1024) * 1024 + shortcut + gates[0] - gates[1] - 589_824
    )


def by_hand(w: dict[str, Tensor], grid: Tensor) -> Tensor:
    """grid[I, D, rows, columns] -> [I, C, rows, columns], with every 1 x 1 as a convolution."""

    def pointwise(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"][:, :, None, None], w.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return scaled * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def silu(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    inner = silu(norm("norm1", pointwise("conv1", grid)))
    inner = F.conv2d(inner, w["conv2.weight"], padding=1, groups=inner.shape[1])
    inner = silu(norm("norm2", inner))
    squeezed = inner.mean((2, 3), keepdim=True)
    inner = inner * torch.sigmoid(pointwise("gate.2", silu(pointwise("gate.0", squeezed))))
    out = norm("norm3", pointwise("conv3", inner))
    if "shortcut.0.weight" in w:
        grid = norm("shortcut.1", pointwise("shortcut.0", grid))
    return silu(out + grid)


@pytest.mark.parametrize(("in_width", "width"), [(12, 12), (12, 20), (3, 8)])
@pytest.mark.parametrize("side", [1, 5])
def test_a_block(in_width: int, width: int, side: int) -> None:
    torch.manual_seed(0)
    block = Block(in_width, width).double()
    with torch.no_grad():
        for parameter in block.parameters():  # norms start at 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.1)
    grid = torch.randn(2, side, side, in_width, dtype=torch.float64)
    expected = by_hand(dict(block.named_parameters()), grid.permute(0, 3, 1, 2))
    # Measured worst case over five seeds: 2.7e-15.
    torch.testing.assert_close(block(grid).permute(0, 3, 1, 2), expected, rtol=0, atol=2e-14)


def test_tokens_are_in_row_order_and_see_their_neighbourhood() -> None:
    """One block each side of the pooling: a patch reaches a token by the 3 x 3 kernels, and all of
    them by the gates; with the gates open, nothing further away."""
    torch.manual_seed(0)
    conv = ConvConfig(side=4, width=8, depth=1, position=False).build([(64, 8)], 12)
    for block in (*conv.before, *conv.after):
        torch.nn.init.zeros_(block.gate[2].weight)  # type: ignore[index]
    features = torch.randn(1, 64, 8, requires_grad=True)
    conv(features)[0, 1 * 4 + 3].sum().backward()
    assert features.grad is not None
    reached = features.grad[0].abs().sum(-1).view(8, 8) > 0
    # The token's 3 x 3 neighbours are 2 x 2 patches each, and each patch looks one further.
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[0:7, 3:8] = True
    assert torch.equal(reached, expected)


def test_positions_tell_patches_apart() -> None:
    torch.manual_seed(0)
    flat = torch.randn(1, 1, 8).expand(1, 81, 8)
    plain = ConvConfig(side=9, width=8, depth=1, position=False).build([(81, 8)], 12)(flat)[0]
    placed = ConvConfig(side=9, width=8, depth=1).build([(81, 8)], 12)(flat)[0]
    # Two places that no kernel reaches the border from; batched products round places differently.
    assert (plain[40] - plain[41]).abs().max() < 1e-6
    assert (placed[40] - placed[41]).abs().max() > 1e-4
