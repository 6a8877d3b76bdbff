"""Each kind of pooling, against its description written out, and its counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align.connectors.pooling import Pool, PoolConfig


def pooled(config: PoolConfig, features: Tensor) -> Tensor:
    connector = config.build([(features.shape[1], features.shape[2])], 20)
    assert isinstance(connector, Pool)
    tokens = connector.pool(features)
    assert tokens.shape[1] == connector.num_tokens
    return tokens


@pytest.mark.parametrize("patches", [1, 12, 49])
def test_mean_of_any_number_of_patches(patches: int) -> None:
    features = torch.randn(3, patches, 6)
    tokens = pooled(PoolConfig(kind="mean"), features)
    torch.testing.assert_close(tokens[:, 0], features.sum(1) / patches)
    assert PoolConfig(kind="mean").grid(patches) is None


@pytest.mark.parametrize(("native", "side"), [(4, 2), (7, 3), (27, 8), (5, 5), (5, 1)])
def test_average_over_bins_that_may_overlap(native: int, side: int) -> None:
    features = torch.randn(2, native**2, 6)
    grid = features.view(2, native, native, 6)
    tokens = pooled(PoolConfig(kind="average", side=side), features).view(2, side, side, 6)

    def bin_of(place: int) -> slice:
        return slice(place * native // side, -(-(place + 1) * native // side))

    for row in range(side):
        for column in range(side):
            expected = grid[:, bin_of(row), bin_of(column)].mean((1, 2))
            torch.testing.assert_close(tokens[:, row, column], expected)


@pytest.mark.parametrize(("native", "factor"), [(4, 2), (6, 3), (5, 1), (27, 3), (3, 3)])
def test_shuffle_keeps_every_value_in_its_place(native: int, factor: int) -> None:
    features = torch.randn(2, native**2, 6)
    grid = features.view(2, native, native, 6)
    side = native // factor
    tokens = pooled(PoolConfig(kind="shuffle", factor=factor), features)
    tokens = tokens.view(2, side, side, factor, factor, 6)
    for row in range(native):
        for column in range(native):
            cell = tokens[:, row // factor, column // factor, row % factor, column % factor]
            assert torch.equal(cell, grid[:, row, column])


@pytest.mark.parametrize(("native", "factor", "side"), [(4, 2, 2), (7, 3, 3), (5, 1, 5), (2, 5, 1)])
def test_stride_takes_every_nth(native: int, factor: int, side: int) -> None:
    features = torch.arange(native**2).float().view(1, -1, 1)
    tokens = pooled(PoolConfig(kind="stride", factor=factor), features)
    expected = [r * native + c for r in range(0, native, factor) for c in range(0, native, factor)]
    assert tokens.flatten().tolist() == expected
    assert PoolConfig(kind="stride", factor=factor).grid(native**2) == (side, side)


@pytest.mark.parametrize(
    ("config", "tokens", "grid", "parameters"),
    [
        (PoolConfig(kind="mean", depth=1), 1, None, 1152 * 4096 + 4096),
        (PoolConfig(kind="average"), 64, (8, 8), 1152 * 4096 + 4096 + 4096**2 + 4096),
        (PoolConfig(kind="shuffle", factor=3), 81, (9, 9), 9 * 1152 * 4096 + 8192 + 4096**2),
        (PoolConfig(kind="stride", factor=2), 196, (14, 14), 1152 * 4096 + 8192 + 4096**2),
    ],
    ids=lambda value: value.kind if isinstance(value, PoolConfig) else "",
)
def test_counts_at_full_size(
    config: PoolConfig, tokens: int, grid: tuple[int, int] | None, parameters: int
) -> None:
    with torch.device("meta"):
        connector = config.build([(729, 1152)], 4096)
    assert (connector.num_tokens, connector.grid) == (tokens, grid)
    assert sum(parameter.numel() for parameter in connector.parameters()) == parameters


def test_counts_of_the_docstring() -> None:
    with torch.device("meta"):
        average = PoolConfig().build([(576, 1024)], 4096)
        shuffle = PoolConfig(kind="shuffle", factor=2).build([(576, 1024)], 4096)
    assert sum(p.numel() for p in average.parameters()) == 20_979_712
    assert sum(p.numel() for p in shuffle.parameters()) == 33_562_624
