"""The flagship connector: its counts at full size, its options, its gradients."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import align.connectors
from align.config import load_config
from align.connectors import CONNECTORS, build_connector
from align.connectors.mlp import MlpConfig
from align.connectors.resampler import ResamplerConfig, sincos
from featcache.errors import ConfigError

D, P, H = 1152, 729, 4096


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_flagship_parameter_counts() -> None:
    with torch.device("meta"):
        connector = build_connector(ResamplerConfig(), D, P, H)
        with_norm = build_connector(ResamplerConfig(vision_norm=True), D, P, H)
    projector = count(connector.get_submodule("projector"))
    assert projector == 75_517_952
    assert count(connector) - projector == 6_927_872
    assert count(connector) == 82_445_824
    assert count(with_norm) - count(connector) == 2_304


def test_flagship_config_builds_at_full_size() -> None:
    with torch.device("meta"):
        connector = build_connector(load_config("qwen3-8b-resampler").connector, D, P, H)
        trial = build_connector(load_config("qwen3-trial").connector, D, P, H)
    assert count(connector) == 82_445_824 + 2_304
    assert count(trial) == 82_445_824


@pytest.mark.parametrize(
    ("in_width", "out_width", "depth", "expected"),
    [(1024, 4096, 2, 20_979_712), (1024, 5120, 2, 31_467_520), (1152, 3584, 2, 16_980_992)],
)
def test_llava_projector_parameter_counts(
    in_width: int, out_width: int, depth: int, expected: int
) -> None:
    with torch.device("meta"):
        assert count(build_connector(MlpConfig(depth=depth), in_width, P, out_width)) == expected


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
    connector = build_connector(config, 12, patches, 20)
    tokens = connector(torch.randn(images, patches, 12))
    assert tokens.shape == (images, 5, 20)
    assert connector.num_tokens == 5
    tokens.square().sum().backward()
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_options_add_what_they_say() -> None:
    def size(**changes: object) -> int:
        return count(build_connector(ResamplerConfig(**changes), 12, 49, 20))  # type: ignore[arg-type]

    R = 512
    base = size()
    assert size(kv_norm=True) - base == 2 * 2 * R  # once per block
    assert size(final_norm=True) - base == 2 * R
    assert size(position="learned") - base == 49 * R
    assert size(position="sincos") == base
    assert size(num_latents=65) - base == R


def test_zero_init_starts_with_zero_tokens() -> None:
    connector = build_connector(ResamplerConfig(zero_init=True), 12, 4, 20)
    assert (connector(torch.randn(2, 4, 12)) == 0).all()


def test_patch_order_matters_only_with_positions() -> None:
    features = torch.randn(2, 16, 12)
    shuffled = features[:, torch.randperm(16)]
    plain = build_connector(ResamplerConfig(depth=1), 12, 16, 20)
    placed = build_connector(ResamplerConfig(depth=1, position="sincos"), 12, 16, 20)
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
        build_connector(ResamplerConfig(position="sincos"), 12, 12, 20)


def test_mlp_keeps_every_patch() -> None:
    connector = build_connector(MlpConfig(), 12, 49, 20)
    assert connector.num_tokens == 49
    assert connector(torch.randn(3, 49, 12)).shape == (3, 49, 20)
    assert set(connector.state_dict()) == {
        "layers.0.weight",
        "layers.0.bias",
        "layers.2.weight",
        "layers.2.bias",
    }


def test_connector_files_can_be_lifted_out() -> None:
    """They import the standard library and torch, nothing else."""
    folder = Path(align.connectors.__file__).parent
    for file in folder.glob("*.py"):
        if file.name == "__init__.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top in {"torch", "math", "collections", "dataclasses", "__future__"}, (
                    f"{file.name}:{node.lineno} imports {name}"  # type: ignore[attr-defined]
                )


def test_every_registered_connector_builds_from_its_defaults() -> None:
    for name, kind in CONNECTORS.items():
        config = kind()
        assert config.name == name
        assert list(config.problems()) == []
        assert build_connector(config, 12, 16, 20)(torch.randn(1, 16, 12)).shape[2] == 20
