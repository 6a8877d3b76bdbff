"""Which connector the model has. An exported folder has this file with its own core's names."""

from align.connectors.layout import Layout, LayoutConfig, unpadded
from align.connectors.resampler import ResamplerConfig as CoreConfig

__all__ = ["CoreConfig", "Layout", "LayoutConfig", "unpadded"]
