"""Slots of a grid of visual tokens: token counts of Cambrian-S, and what lies in each slot."""

from __future__ import annotations

import pytest
import torch

from align.connectors import build_connector, check_connector
from align.connectors.layout import Layout, LayoutConfig, unpadded
from align.connectors.mlp import MlpConfig
from align.connectors.pooling import PoolConfig
from align.connectors.resampler import ResamplerConfig
from featcache.errors import ConfigError

BOTH = LayoutConfig(newline=True, unpad=True)


@pytest.mark.parametrize(
    ("size", "slots"),
    [
        ((384, 384), 756),
        ((640, 480), 588),
        ((480, 640), 594),
        ((500, 333), 476),
        ((1920, 1080), 420),
        ((1080, 1920), 432),
        ((1000, 100), 84),
    ],
)
def test_slots_are_cambrians(size: tuple[int, int], slots: int) -> None:
    layout = Layout(BOTH, 729, (27, 27), 8)
    assert layout.num_slots(size) == slots
    tokens = torch.randn(1, 729, 8)
    assert layout(tokens, [size]).shape == (slots, 8)


@pytest.mark.parametrize("config", [BOTH, LayoutConfig(newline=True), LayoutConfig(unpad=True)])
def test_each_slot_holds_its_token(config: LayoutConfig) -> None:
    """Against lists put together row by row."""
    side, width = 5, 3
    layout = Layout(config, side * side, (side, side), width)
    sizes = [(50, 50), (90, 40), (20, 90), (9000, 1), (1, 9000)]
    tokens = torch.randn(len(sizes), side * side, width)
    expected = []
    for image, size in zip(tokens, sizes, strict=True):
        grid = image.view(side, side, width)
        if config.unpad:
            top, left, rows, columns = unpadded(size, side)
            grid = grid[top : top + rows, left : left + columns]
        for row in grid:
            expected += list(row)
            if layout.newline is not None:
                expected.append(layout.newline)
    assert torch.equal(layout(tokens, sizes), torch.stack(expected))
    assert sum(layout.num_slots(size) for size in sizes) == len(expected)


def test_what_unpadding_keeps_is_the_image() -> None:
    """No row that holds some of the image is dropped, and at most the rounding's are left over."""
    for long in range(1, 200):
        for short in range(1, long + 1):
            top, left, rows, columns = unpadded((long, short), 27)
            assert (left, columns, 2 * top + rows) == (0, 27, 27)
            covered = 27 * short / long
            assert covered - 1 < rows < covered + 2, (long, short)
            assert unpadded((short, long), 27) == (
                (0, top, 27, rows) if short < long else (0, 0, 27, 27)
            )


@pytest.mark.parametrize("side", [1, 2, 4, 24, 27])
def test_some_of_an_image_stays_however_long_it_is(side: int) -> None:
    layout = Layout(BOTH, side * side, (side, side), 3)
    for size in ((1000, 20), (20, 1000), (9000, 1), (1, 9000)):
        assert layout.num_slots(size) >= side
        assert layout(torch.randn(1, side * side, 3), [size]).shape[0] == layout.num_slots(size)


def test_gradients_reach_kept_tokens_and_the_newline() -> None:
    layout = Layout(BOTH, 25, (5, 5), 3)
    tokens = torch.randn(2, 25, 3, requires_grad=True)
    sizes = [(100, 20), (50, 50)]
    layout(tokens, sizes).sum().backward()
    assert tokens.grad is not None and layout.newline is not None
    kept = torch.zeros(5, 5)
    top, _, rows, _ = unpadded(sizes[0], 5)
    kept[top : top + rows] = 1
    assert torch.equal(tokens.grad[0].view(5, 5, 3), kept[..., None].expand(5, 5, 3))
    assert torch.equal(tokens.grad[1], torch.ones(25, 3))
    assert torch.equal(layout.newline.grad, torch.full((3,), float(rows + 5)))


def test_the_newline_starts_as_cambrians_does() -> None:
    torch.manual_seed(0)
    layout = Layout(LayoutConfig(newline=True), 729, (27, 27), 4096)
    assert layout.newline is not None
    assert layout.newline.std().item() == pytest.approx(4096**-0.5, rel=0.05)


def test_without_either_nothing_changes_and_nothing_is_trained() -> None:
    layout = Layout(LayoutConfig(), 4, None, 3)
    assert list(layout.parameters()) == []
    tokens = torch.randn(2, 4, 3)
    assert torch.equal(layout(tokens, [(1, 1)] * 2), tokens.flatten(0, 1))
    assert (layout.num_slots((9, 1)), layout.needs_sizes) == (4, False)


def test_no_images_have_no_slots_and_gradients_of_zero() -> None:
    connector = build_connector(MlpConfig(), [(25, 6)], 3, BOTH, padded=True)
    slots = connector([torch.zeros(0, 25, 6)], [])
    assert slots.shape == (0, 3)
    slots.sum().backward()
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_cambrian_s_counts() -> None:
    with torch.device("meta"):
        connector = build_connector(MlpConfig(), [(729, 1152)], 3584, BOTH, padded=True)
    counts = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in (("core", connector.core), ("layout", connector.layout))
    }
    assert counts == {"core": 16_980_992, "layout": 3584}
    assert connector.num_slots((640, 480)) == 588 and connector.varies


def test_pooled_grids_are_laid_out_too() -> None:
    connector = build_connector(PoolConfig(side=4), [(64, 6)], 3, BOTH, padded=True)
    assert connector.num_slots((10, 10)) == 4 * 5
    assert connector([torch.randn(2, 64, 6)], [(10, 10), (10, 5)]).shape == (20 + 2 * 5, 3)


@pytest.mark.parametrize(
    ("connector", "patches", "layout", "message"),
    [
        (ResamplerConfig(), 729, LayoutConfig(newline=True), "the 64 of this connector are none"),
        (MlpConfig(), 730, LayoutConfig(unpad=True), "the 730 of this connector are none"),
    ],
)
def test_what_has_no_grid_has_no_rows(
    connector: ResamplerConfig | MlpConfig, patches: int, layout: LayoutConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_connector(connector, [(patches, 8)], layout)
