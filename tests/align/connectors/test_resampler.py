"""The flagship connector: its counts at full size, its options, its gradients."""

from __future__ import annotations

import pytest
import torch

from align.config import load_config
from align.connectors import build_connector
from align.connectors.resampler import ResamplerConfig, sincos
from featcache.errors import ConfigError

D, P, H = 1152, 729, 4096


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_flagship_parameter_counts() -> None:
    with torch.device("meta"):
        connector = ResamplerConfig().build([(P, D)], H)
        with_norm = ResamplerConfig(vision_norm=True).build([(P, D)], H)
    projector = count(connector.get_submodule("projector"))
    assert projector == 75_517_952
    assert count(connector) - projector == 6_927_872
    assert count(connector) == 82_445_824
    assert count(with_norm) - count(connector) == 2_304


def test_flagship_config_builds_at_full_size() -> None:
    with torch.device("meta"):
        connector = load_config("qwen3-8b-resampler").connector.build([(P, D)], H)
        trial = load_config("qwen3-trial").connector.build([(P, D)], H)
    assert count(connector) == 82_445_824 + 2_304
    assert count(trial) == 82_445_824


@pytest.mark.parametrize("position", ["none", "learned", "sincos"])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("images", "patches"), [(1, 1), (3, 49)])
def test_shapes_and_gradients(position: str, extras: bool, images: int, patches: int) -> None:
    config = ResamplerConfig(
        num_latents=5,
        heads=2,
        head_dim=8,
        position=position,
        vision_norm=extras,
        kv_norm=extras,
        final_norm=extras,
        dropout=0.1 if extras else 0.0,
    )
    connector = config.build([(patches, 12)], 20)
    tokens = connector(torch.randn(images, patches, 12))
    assert tokens.shape == (images, 5, 20)
    assert (connector.num_tokens, connector.grid) == (5, None)
    tokens.square().sum().backward()
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_options_add_what_they_say() -> None:
    def size(**changes: object) -> int:
        return count(ResamplerConfig(**changes).build([(49, 12)], 20))  # type: ignore[arg-type]

    R = 512
    base = size()
    assert size(kv_norm=True) - base == 2 * 2 * R  # once per block
    assert size(final_norm=True) - base == 2 * R
    assert size(position="learned") - base == 49 * R
    assert size(position="sincos") == base
    assert size(num_latents=65) - base == R


def test_zero_init_starts_with_zero_tokens() -> None:
    connector = ResamplerConfig(zero_init=True).build([(4, 12)], 20)
    assert (connector(torch.randn(2, 4, 12)) == 0).all()


def test_patch_order_matters_only_with_positions() -> None:
    features = torch.randn(2, 16, 12)
    shuffled = features[:, torch.randperm(16)]
    plain = ResamplerConfig(depth=1).build([(16, 12)], 20)
    placed = ResamplerConfig(depth=1, position="sincos").build([(16, 12)], 20)
    torch.testing.assert_close(plain(features), plain(shuffled), atol=1e-6, rtol=0)
    assert (placed(features) - placed(shuffled)).abs().max() > 1e-5


def test_sincos_is_a_grid_of_distinct_places() -> None:
    table = sincos(49, 16)
    assert table.shape == (49, 16)
    assert len(torch.unique(table, dim=0)) == 49
    grid = table.view(7, 7, 16)
    assert torch.equal(grid[2, :, :8], grid[2, :1, :8].expand(7, 8))  # rows: the same along a row
    assert torch.equal(grid[:, 3, 8:], grid[:1, 3, 8:].expand(7, 8))  # columns: along a column


def test_sincos_refuses_what_is_no_square() -> None:
    with pytest.raises(ConfigError, match=r"connector: .*12 patches .*use \"learned\""):
        build_connector(ResamplerConfig(position="sincos"), [(12, 12)], 20)
