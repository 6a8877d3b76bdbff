"""What stands between the encoder and the language model, and the names under which to ask for it.

A connector maps `features float[I, P, D]` to visual tokens `float[I, Q, H]`
(I images, P patches, D encoder width, Q visual tokens an image, H LLM width).
To add one: a file here that imports only torch, with a config dataclass beside the module, and one
line in `CONNECTORS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, cast

from torch import nn

from align.connectors.conv import ConvConfig
from align.connectors.mlp import MlpConfig
from align.connectors.pooling import PoolConfig
from align.connectors.resampler import ResamplerConfig
from align.connectors.sva import SvaConfig
from featcache.errors import ConfigError


class ConnectorConfig(Protocol):
    """What a connector's config dataclass offers."""

    name: str

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one "field: reason" each."""

    def build(self, towers: Sequence[tuple[int, int]], out_width: int) -> nn.Module:
        """The module, with `num_tokens` and `grid` as attributes.

        towers: (P, D) of each encoder whose features it is given. Raises ValueError, one line,
        where the config cannot serve them.
        """


class Connector(nn.Module):
    """The type of what `build_connector` returns; connectors need not derive from it.

    num_tokens: visual tokens per image, Q.
    grid: (rows, columns) where the tokens are a row-major grid, else None.
    num_patches: patches per image that it was built for, P.
    """

    num_tokens: int
    grid: tuple[int, int] | None
    num_patches: int


CONNECTORS: dict[str, type[ConnectorConfig]] = {
    "resampler": ResamplerConfig,
    "mlp": MlpConfig,
    "sva": SvaConfig,
    "pool": PoolConfig,
    "conv": ConvConfig,
}


def build_connector(
    config: ConnectorConfig, in_width: int, num_patches: int, out_width: int
) -> Connector:
    """The connector of `config` between an encoder (P x D = num_patches x in_width) and an LLM.

    Raises ConfigError where the config cannot serve these widths.
    """
    try:
        module = config.build([(num_patches, in_width)], out_width)
    except ValueError as error:
        raise ConfigError(f"connector: {error}") from error
    return cast(Connector, module)
