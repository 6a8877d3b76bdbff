"""What every connector promises, whichever it is."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import align.connectors
from align.config import load_config
from align.connectors import CONNECTORS, build_connector
from align.connectors.conv import ConvConfig
from align.connectors.mlp import MlpConfig
from align.connectors.pooling import PoolConfig
from align.connectors.resampler import ResamplerConfig
from align.connectors.sva import SvaConfig
from featcache.errors import ConfigError

FILES = [
    file
    for file in sorted(Path(align.connectors.__file__).parent.glob("*.py"))
    if file.stem != "__init__"
]
SINGLE: list[Any] = [
    MlpConfig(),
    MlpConfig(depth=1),
    ResamplerConfig(num_latents=5, heads=2, head_dim=8),
    PoolConfig(kind="mean", depth=1),
    PoolConfig(kind="average", side=3),
    PoolConfig(kind="shuffle", factor=3),
    PoolConfig(kind="stride", factor=2, depth=3),
    ConvConfig(side=3, width=16, depth=1),
    ConvConfig(side=2, width=12, depth=2, mlp_depth=1, position=False),
    SvaConfig(side=3, width=16, depth=2, heads=2, token_lengths=[36]),
]


def tokens_of(connector: nn.Module, features: Tensor) -> Tensor:
    """Of images that were square."""
    if getattr(connector, "needs_sizes", False):
        return connector([features], [(64, 64)] * len(features))
    return connector(features)


@pytest.mark.parametrize("config", SINGLE, ids=str)
@pytest.mark.parametrize("images", [0, 1, 3])
def test_shapes_and_gradients(config: Any, images: int) -> None:
    connector = config.build([(81, 12)], 20)
    tokens = tokens_of(connector, torch.randn(images, 81, 12))
    assert tokens.shape == (images, connector.num_tokens, 20)
    if connector.grid is not None:
        rows, columns = connector.grid
        assert rows * columns == connector.num_tokens
    if images:
        tokens.square().sum().backward()
        for name, parameter in connector.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("config", SINGLE, ids=str)
def test_images_of_a_batch_do_not_touch(config: Any) -> None:
    torch.manual_seed(0)
    connector = config.build([(81, 12)], 20)
    features = torch.randn(3, 81, 12)
    together = tokens_of(connector, features)
    alone = torch.cat([tokens_of(connector, image[None]) for image in features])
    # Measured worst case over five seeds: 5.8e-7.
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("config", SINGLE, ids=str)
def test_autocast_computes_in_bf16_and_stays_close(config: Any) -> None:
    torch.manual_seed(0)
    connector = config.build([(81, 12)], 20)
    features = torch.randn(2, 81, 12)
    exact = tokens_of(connector, features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = tokens_of(connector, features)
    assert (exact.dtype, tokens.dtype) == (torch.float32, torch.bfloat16)
    tokens.float().square().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all()
        for p in connector.parameters()
    )
    # Measured worst case over five seeds: 2.8e-2 of the largest value.
    assert (tokens - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("config", SINGLE, ids=str)
def test_whole_modules_in_other_dtypes(config: Any) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        connector = config.build([(81, 12)], 20).to(dtype)
        tokens = tokens_of(connector, torch.randn(2, 81, 12, dtype=dtype))
        assert tokens.dtype == dtype and torch.isfinite(tokens).all()


@pytest.mark.parametrize("config", [c for c in SINGLE if c.name != "sva"], ids=str)
@pytest.mark.parametrize("towers", [[], [(81, 12), (81, 12)]])
def test_one_encoder_where_one_is_taken(config: Any, towers: list[tuple[int, int]]) -> None:
    message = f"{config.name} takes the features of one encoder, got {len(towers)}"
    with pytest.raises(ValueError, match=message):
        config.build(towers, 20)


@pytest.mark.parametrize(
    ("config", "patches", "message"),
    [
        (PoolConfig(), 12, r"connector: kind \"average\" needs a square grid, 12 patches are none"),
        (PoolConfig(side=5), 16, r"side 5 is more than the 4 x 4 patches have; use at most 4"),
        (
            PoolConfig(kind="shuffle", factor=2),
            729,
            r"factor 2 does not divide the grid of 27 x 27 patches; use 1 or 3 or 9 or 27",
        ),
        (PoolConfig(kind="stride"), 8, r"kind \"stride\" needs a square grid, 8 patches"),
        (ConvConfig(), 12, r"conv needs a square grid, 12 patches are none; use a resampler"),
        (ConvConfig(), 16, r"side 12 is more than the 4 x 4 patches have; use at most 4"),
        (SvaConfig(), 12, r"sva needs square grids of patches, encoder 0 has 12 patches"),
        (SvaConfig(token_lengths=[576, 576]), 576, r"token_lengths has 2 numbers for 1 encoders"),
    ],
)
def test_what_cannot_be_built_is_told(config: Any, patches: int, message: str) -> None:
    assert list(config.problems()) == []
    with pytest.raises(ConfigError, match=message):
        build_connector(config, [(patches, 12)], 20)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MlpConfig(depth=0), "depth: must be at least 1, got 0"),
        (PoolConfig(kind="max"), "kind: must be"),
        (PoolConfig(factor=0), "factor: must be at least 1, got 0"),
        (ConvConfig(side=-1), "side: must be at least 1, got -1"),
        (SvaConfig(heads=0), "heads: must be at least 1, got 0"),
        (SvaConfig(width=100), "width: must be divisible by heads, got 100 and 16"),
        (SvaConfig(token_lengths=[729]), "token_lengths: must be squares of multiples of side 24"),
        (SvaConfig(token_lengths=[0]), "token_lengths: must be squares of multiples of side 24"),
    ],
)
def test_bad_values_are_told(config: Any, message: str) -> None:
    [problem] = config.problems()
    assert problem.startswith(message)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_connector_files_import_only_torch(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.split(".")[0]
            assert top in {"torch", "math", "collections", "dataclasses", "__future__"}, (
                f"{file.name}:{node.lineno} imports {name}"  # type: ignore[attr-defined]
            )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_connector_file_works_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] in ("align", "featcache"):
            monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    spec = importlib.util.spec_from_file_location("lifted_out", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lifted_out", module)
    spec.loader.exec_module(module)

    if file.stem == "layout":  # a stage after a connector; test_layout.py
        return
    [kind] = [
        value
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and isinstance(value, type)
    ]
    likes = [config for config in SINGLE if type(config).__name__ == kind.__name__]
    assert likes, f"no config of {file.name} in SINGLE"
    for like in likes:
        connector = kind(**dataclasses.asdict(like)).build([(36, 12)], 20)
        tokens = tokens_of(connector, torch.randn(2, 36, 12))
        assert tokens.shape == (2, connector.num_tokens, 20)


def test_every_registered_connector_builds_from_its_defaults() -> None:
    for name, kind in CONNECTORS.items():
        config = kind()
        assert config.name == name
        assert list(config.problems()) == []
        connector = config.build([(729, 12)], 20)
        tokens = tokens_of(connector, torch.randn(1, 729, 12))
        assert tokens.shape == (1, connector.num_tokens, 20), name


@pytest.mark.parametrize("config", SINGLE, ids=str)
def test_a_connector_is_configured_by_name(config: Any) -> None:
    settings = [f"connector.{key}={value}" for key, value in dataclasses.asdict(config).items()]
    assert load_config(None, settings).connector == config
