"""Which connector the model has: here one of them; an exported folder imports its own core."""

from align.connectors.layout import Layout, LayoutConfig, unpadded
from align.connectors.resampler import ResamplerConfig as CoreConfig

__all__ = ["CoreConfig", "Layout", "LayoutConfig", "unpadded"]
