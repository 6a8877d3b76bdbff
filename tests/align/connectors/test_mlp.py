"""LLaVA's projector: its counts, its names, its grid."""

from __future__ import annotations

import pytest
import torch

from align.connectors.mlp import MlpConfig


@pytest.mark.parametrize(
    ("in_width", "out_width", "depth", "expected"),
    [(1024, 4096, 2, 20_979_712), (1024, 5120, 2, 31_467_520), (1152, 3584, 2, 16_980_992)],
)
def test_llava_projector_parameter_counts(
    in_width: int, out_width: int, depth: int, expected: int
) -> None:
    with torch.device("meta"):
        connector = MlpConfig(depth=depth).build([(729, in_width)], out_width)
    assert sum(parameter.numel() for parameter in connector.parameters()) == expected


def test_mlp_keeps_every_patch() -> None:
    connector = MlpConfig().build([(49, 12)], 20)
    assert (connector.num_tokens, connector.grid) == (49, (7, 7))
    assert connector(torch.randn(3, 49, 12)).shape == (3, 49, 20)
    assert set(connector.state_dict()) == {
        "layers.0.weight",
        "layers.0.bias",
        "layers.2.weight",
        "layers.2.bias",
    }


def test_patches_that_are_no_square_have_no_grid() -> None:
    assert MlpConfig().build([(48, 12)], 20).grid is None
