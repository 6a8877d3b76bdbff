"""What stands between the encoder and the language model, and the names under which to ask for it.

A connector is a *core*, which maps the features of an image to a fixed number of visual tokens,
and a *layout* (layout.py), which makes slots of these: as they are, or with padding dropped and
rows ended by a trained vector.

    I images, P patches, D encoder width, Q visual tokens an image, H LLM width, S slots in all

To add a core: a file here that imports only torch, with a config dataclass beside the module, and
one line in `CONNECTORS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from align.connectors.conv import ConvConfig
from align.connectors.layout import Layout, LayoutConfig
from align.connectors.mlp import MlpConfig
from align.connectors.pooling import PoolConfig
from align.connectors.resampler import ResamplerConfig
from align.connectors.sva import SvaConfig
from featcache.errors import ConfigError

Size = tuple[int, int]
"""An image's original (width, height) in pixels."""


class Core(Protocol):
    """What a core offers besides being an `nn.Module`.

    num_tokens: visual tokens an image, Q. grid: their rows and columns where they are a row-major
    grid, else None.

    Called with features float[I, P, D], or, where it has a true `needs_sizes`, with those of each
    tower in a list and the images' `Size`s; returns float[I, Q, H]. May have `slow_parameters`:
    what the names of those parameters begin with that `optim.slow_lr` is for.
    """

    num_tokens: int
    grid: tuple[int, int] | None

    def __call__(self, *inputs: object) -> Tensor: ...


class ConnectorConfig(Protocol):
    """What a core's config dataclass offers.

    May have `notices(towers) -> Iterator[str]`: what a user should know who trains it on these,
    though nothing is wrong; one line each.
    """

    name: str

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one "field: reason" each."""

    def build(self, towers: Sequence[tuple[int, int]], out_width: int) -> nn.Module:
        """The core. towers: (P, D) of each store's encoder. Raises ValueError where it cannot serve
        them."""


CONNECTORS: dict[str, type[ConnectorConfig]] = {
    "resampler": ResamplerConfig,
    "mlp": MlpConfig,
    "sva": SvaConfig,
    "pool": PoolConfig,
    "conv": ConvConfig,
}


class Connector(nn.Module):
    """Features of each tower float[I, P, D] -> slots float[S, H], those of the first image first.

    towers: (P, D) of each encoder that it was built for. padded: whether the images were padded to
    squares before they were encoded; else every image fills its square, whatever its size.
    """

    def __init__(
        self,
        core: nn.Module,
        layout: Layout,
        towers: Sequence[tuple[int, int]],
        padded: bool = False,
    ) -> None:
        super().__init__()
        self.padded = padded
        self.core = core
        self.layout = layout
        self.towers = tuple(towers)
        self._core_needs_sizes = bool(getattr(core, "needs_sizes", False))

    @property
    def num_tokens(self) -> int:
        """Visual tokens an image before the layout, Q."""
        return cast(Core, self.core).num_tokens

    @property
    def slow_parameters(self) -> tuple[str, ...]:
        """What the names of the parameters begin with that `optim.slow_lr` is for."""
        return tuple(f"core.{name}" for name in getattr(self.core, "slow_parameters", ()))

    @property
    def varies(self) -> bool:
        """Whether images of different sizes take different numbers of slots."""
        return self.layout.needs_sizes

    def num_slots(self, size: Size) -> int:
        """Of an image."""
        return self.layout.num_slots(size)

    def forward(self, features: Sequence[Tensor], sizes: Sequence[Size]) -> Tensor:
        """features: float[I, P, D] of each tower; sizes: of I images -> float[S, H]."""
        if self._core_needs_sizes:
            tokens = self.core(features, sizes if self.padded else [(1, 1)] * len(sizes))
        else:
            tokens = self.core(*features)
        slots: Tensor = self.layout(tokens, sizes)
        return slots


def build_connector(
    config: ConnectorConfig,
    towers: Sequence[tuple[int, int]],
    out_width: int,
    layout: LayoutConfig | None = None,
    *,
    padded: bool = False,
) -> Connector:
    """The connector of `config` between encoders and an LLM of width H = out_width.

    towers: (P, D) of each encoder. padded: see `Connector`.
    Raises ConfigError where the config cannot serve them.
    """
    try:
        module = config.build(towers, out_width)
        core = cast(Core, module)
        stage = Layout(layout or LayoutConfig(), core.num_tokens, core.grid, out_width)
    except ValueError as error:
        raise ConfigError(f"connector: {error}") from error
    return Connector(module, stage, towers, padded)


def check_connector(
    config: ConnectorConfig, towers: Sequence[tuple[int, int]], layout: LayoutConfig
) -> None:
    """Raises ConfigError as `build_connector` would, at the cost of nothing."""
    with torch.device("meta"):
        build_connector(config, towers, 64, layout)
