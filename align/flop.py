"""Floating-point operations of a training step, by formula. 2 a multiply-add, as is usual.

Counted are the matrix products; norms, activations, softmax and rotary positions are left out.
Recomputation inside a kernel is not counted: these are the operations that the model needs.

    P patches, D encoder width, Q visual tokens, R resampler width
    T tokens of a sample, N supervised ones among them, H LLM width, V vocabulary
    L layers, h heads, k key-value heads, d head width, I hidden width of the feed-forward part
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from align.connectors import ConnectorConfig
from align.connectors.conv import ConvConfig
from align.connectors.mlp import MlpConfig
from align.connectors.pooling import PoolConfig
from align.connectors.resampler import ResamplerConfig
from align.connectors.sva import SvaConfig
from align.errors import ModelError
from featcache.errors import ConfigError

GATED_DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type`s of transformers that are L times: attention with grouped heads, and a feed-forward
part of three matrices."""


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """The sizes of a dense decoder with gated feed-forward parts: Llama, Mistral, Qwen2, Qwen3.

    hidden_size H; num_layers L; num_heads h; num_kv_heads k; head_dim d; intermediate_size I;
    vocab_size V.
    """

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    @property
    def block_parameters(self) -> int:
        """Of the matrices of all layers: L (2 H h d + 2 H k d + 3 H I)."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.num_layers * self.hidden_size * (attention + 3 * self.intermediate_size)

    def frozen_step_flop(self, tokens: int, supervised: int, causal: bool = True) -> float:
        """Forward and backward to the inputs of one sample, no weight getting a gradient.

        Matrices: 2 forward and 2 backward a parameter and token. Attention: 4 T^2 h d forward a
        layer, halved where the kernel leaves out what lies in the future, and twice that backward,
        as both factors of each product get a gradient. The output layer: 4 V H a supervised token.
        """
        matrices = 4 * self.block_parameters * tokens
        attention = 12 * tokens**2 * self.num_heads * self.head_dim * self.num_layers
        head = 4 * self.vocab_size * self.hidden_size * supervised
        return matrices + (attention / 2 if causal else attention) + head


_SIZES = {
    "Qwen3-0.6B": (1024, 28, 16, 8, 128, 3072, 151_936),
    "Qwen3-1.7B": (2048, 28, 16, 8, 128, 6144, 151_936),
    "Qwen3-4B": (2560, 36, 32, 8, 128, 9728, 151_936),
    "Qwen3-8B": (4096, 36, 32, 8, 128, 12_288, 151_936),
    "Qwen3-14B": (5120, 40, 40, 8, 128, 17_408, 151_936),
    "Qwen3-32B": (5120, 64, 64, 8, 128, 25_600, 151_936),
    "Qwen2.5-7B": (3584, 28, 28, 4, 128, 18_944, 152_064),
    "Llama-3-8B": (4096, 32, 32, 8, 128, 14_336, 128_256),
    "Vicuna-7B": (4096, 32, 32, 32, 128, 11_008, 32_000),
    "Vicuna-13B": (5120, 40, 40, 40, 128, 13_824, 32_000),
}
LANGUAGE_MODELS = {name.lower(): LanguageModel(name, *sizes) for name, sizes in _SIZES.items()}
"""Known without a hub, by their name in lower case. Source: their published config.json."""
_VARIANTS = ("-base", "-instruct", "-v1.5")


PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "A10G": 70.0,
}
"""Of dense bf16 with fp32 sums, by a part of the device's name. Source: NVIDIA's data sheets."""


def find_language_model(name: str) -> LanguageModel:
    """A model of `LANGUAGE_MODELS`, also as "Qwen/Qwen3-8B-Base"; else the one whose config.json
    lies in a folder or on the hub.

    Raises ModelError where there is none, or one of another architecture.
    """
    short = name.rsplit("/", 1)[-1].lower()
    for variant in _VARIANTS:
        short = short.removesuffix(variant)
    if short in LANGUAGE_MODELS and not Path(name).is_dir():
        return LANGUAGE_MODELS[short]
    if "/" not in name and name != "tiny" and not Path(name).is_dir():
        near = difflib.get_close_matches(short, LANGUAGE_MODELS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ModelError(
            f"--llm {name}: not known by name; {hint}give one of {', '.join(LANGUAGE_MODELS)}, a "
            "hub id (owner/name) or a folder with config.json"
        )
    from transformers import AutoConfig

    from align.llm import find_llm

    try:
        found = AutoConfig.from_pretrained(find_llm(name))
    except (OSError, ValueError) as error:
        raise ModelError(f"--llm {name}: {str(error).splitlines()[0]}") from None
    model = language_model_of(found.get_text_config(), name)
    if model is None:
        raise ModelError(
            f"--llm {name}: how many operations a {found.model_type!r} model takes is not known; "
            f"known are dense {', '.join(GATED_DECODERS)} models"
        )
    return model


def language_model_of(config: Any, name: str) -> LanguageModel | None:
    """The sizes in a text model's config of transformers; None for another architecture."""
    if config.model_type not in GATED_DECODERS:
        return None
    heads = config.num_attention_heads
    return LanguageModel(
        name,
        config.hidden_size,
        config.num_hidden_layers,
        heads,
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        config.intermediate_size,
        config.vocab_size,
    )


@dataclass(frozen=True, slots=True)
class StepFlop:
    """Operations of a run's training steps. llm: None where it is of an unknown architecture.

    connector: of one image; None where there is no formula for it.
    """

    llm: LanguageModel | None
    connector: float | None

    @classmethod
    def find(
        cls,
        llm: LanguageModel | None,
        connector: ConnectorConfig,
        towers: Sequence[tuple[int, int]],
        hidden_size: int,
    ) -> StepFlop:
        """towers, hidden_size: as `connector_step_flop` takes them."""
        try:
            return cls(llm, connector_step_flop(connector, towers, hidden_size))
        except ConfigError:
            return cls(llm, None)

    def of(self, lengths: Sequence[int], supervised: int, images: int) -> int | None:
        """Of samples of these numbers of tokens, `supervised` of which are learned in all."""
        if self.llm is None or self.connector is None:
            return None
        layers = sum(self.llm.frozen_step_flop(length, 0) for length in lengths)
        head = self.llm.frozen_step_flop(0, supervised)
        return round(layers + head + images * self.connector)


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that a device can do at most in dense bf16; None where not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def connector_step_flop(
    connector: ConnectorConfig, towers: Sequence[tuple[int, int]], hidden_size: int
) -> float:
    """Forward and backward of one image with gradients for all weights, none for the features.

    Three times the forward, less the gradient that the first layer would hand to the features.
    towers: (P, D) of each encoder whose features the connector is given; hidden_size H.

    Raises ConfigError for a connector without a formula, ValueError for towers that it cannot take.
    """
    if isinstance(connector, SvaConfig):
        return _sva_step_flop(connector, towers, hidden_size)
    if len(towers) != 1:
        raise ValueError(f"{connector.name} takes the features of one encoder, got {len(towers)}")
    [(num_patches, width)] = towers
    if isinstance(connector, MlpConfig):
        first = 2 * num_patches * width * hidden_size
        return 3 * (first + 2 * num_patches * (connector.depth - 1) * hidden_size**2) - first
    if isinstance(connector, PoolConfig):
        grid = connector.grid(num_patches)
        tokens = 1 if grid is None else math.prod(grid)
        pooled = width * (connector.factor**2 if connector.kind == "shuffle" else 1)
        first = 2 * tokens * pooled * hidden_size
        return 3 * (first + 2 * tokens * (connector.depth - 1) * hidden_size**2) - first
    if isinstance(connector, ConvConfig):
        return _conv_step_flop(connector, num_patches, width, hidden_size)
    if isinstance(connector, ResamplerConfig):
        latents, inner = connector.num_latents, connector.heads * connector.head_dim
        first = 2 * num_patches * width * inner
        keys_and_values = 4 * num_patches * inner**2
        query_and_output = 4 * latents * inner**2
        attention = 4 * latents * num_patches * inner
        feed_forward = 4 * latents * inner * round(inner * connector.ff_ratio)
        block = keys_and_values + query_and_output + attention + feed_forward
        hidden = round(hidden_size * connector.mlp_ratio)
        projector = 2 * latents * hidden * (inner + hidden_size)
        return 3 * (first + connector.depth * block + projector) - first
    raise ConfigError(
        f"connector {connector.name}: its operations are not known; see align/flop.py"
    )


def _sva_step_flop(
    connector: SvaConfig, towers: Sequence[tuple[int, int]], hidden_size: int
) -> float:
    """A layer takes 12 D^2 of each query, 4 D^2 of each key and 2 D^2 of the image's context."""
    queries, width = connector.side**2, connector.width
    windows = [side**2 for side in connector.window_sides(len(towers))]
    keys = sum(windows)
    first = sum(
        2 * queries * window * in_width * width
        for window, (_, in_width) in zip(windows, towers, strict=True)
    )
    second = 2 * queries * keys * width**2
    attention = 4 * queries * keys * width
    layer = (2 + 12 * queries + 4 * queries * keys) * width**2 + attention
    projector = 2 * queries * hidden_size * (width * connector.groups + hidden_size)
    layers = connector.groups * connector.depth * layer
    return 3 * (first + second + layers + projector) - first


def _conv_step_flop(connector: ConvConfig, num_patches: int, width: int, hidden_size: int) -> float:
    """Depth-wise 3 x 3 convolutions are 18 operations a channel and place."""
    inner, tokens = connector.width, connector.side**2

    def block(places: int, in_width: int) -> int:
        convolutions = 2 * places * inner * (in_width + 9 + inner)
        gate = 4 * inner * max(1, round(in_width / 4))
        shortcut = 0 if in_width == inner else 2 * places * in_width * inner
        return convolutions + gate + shortcut

    before = block(num_patches, width) + (connector.depth - 1) * block(num_patches, inner)
    after = connector.depth * block(tokens, inner)
    projector = 2 * tokens * hidden_size * (inner + (connector.mlp_depth - 1) * hidden_size)
    step = 3 * (before + after + projector)
    if connector.position:  # learned, so the gradient goes on to where the features come in
        return step
    return step - 2 * num_patches * inner * width * (1 if width == inner else 2)
