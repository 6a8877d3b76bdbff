"""AdamW over the connector, and the learning rate of a step.

Source: Loshchilov & Hutter 2019 (decoupled weight decay; cosine from their SGDR), with the linear
warm-up and the floor of 10 % that the flagship run states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    lr: float = 1e-4
    """The peak, reached at the end of the warm-up."""
    slow_lr: float | None = None
    """The peak for the parameters that a connector names as slow (the SVA's queries and layers;
    Cambrian-1's `mm_vision_sampler_lr`); null takes `lr`."""
    weight_decay: float = 0.01
    """On matrices only: norms, biases and learned tables (latents, positions) get none."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    warmup_ratio: float = 0.02
    """Share of all steps in which the rate rises linearly from 0."""
    min_lr_ratio: float = 0.1
    """The rate that the cosine ends at, over the peak."""
    clip: float = 1.0
    """Largest norm of the gradient over all parameters; 0 does not clip."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one "field: reason" each."""
        for name in ("lr", "slow_lr", "eps"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                yield f"{name}: must be above 0 and finite, got {getattr(self, name)}"
        for name in ("weight_decay", "clip"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                yield f"{name}: must be at least 0 and finite, got {getattr(self, name)}"
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}: must be in [0, 1), got {getattr(self, name)}"
        for name in ("warmup_ratio", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"{name}: must be in [0, 1], got {getattr(self, name)}"


def build_optimizer(config: OptimConfig, connector: nn.Module) -> torch.optim.AdamW:
    """AdamW over every parameter of the connector, in groups by weight decay and learning rate.

    Each group's `lr_ratio` is its rate over the one of `lr_at`; see `set_lr`.
    """
    slow: tuple[str, ...] = getattr(connector, "slow_parameters", ())
    ratio = 1.0 if config.slow_lr is None else config.slow_lr / config.lr
    groups: list[dict[str, Any]] = []
    for named, decay in zip(split_by_decay(connector), (config.weight_decay, 0.0), strict=True):
        for is_slow in (False, True):
            own = [p for name, p in named.items() if name.startswith(slow) == is_slow]
            if own:
                lr_ratio = ratio if is_slow else 1.0
                groups.append({"params": own, "weight_decay": decay, "lr_ratio": lr_ratio})
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Each group's own share of a step's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


def split_by_decay(
    connector: nn.Module,
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Parameters by name: (those with weight decay, those without).

    Decayed are matrices that multiply an input. A table that the module owns directly, such as the
    resampler's latents and learned positions, is an input itself, like an embedding: pulling it to
    zero would pull all latents to one another, so it is left alone, as are 1-D parameters.
    """
    decayed: dict[str, nn.Parameter] = {}
    plain: dict[str, nn.Parameter] = {}
    for name, parameter in connector.named_parameters():
        is_matrix = parameter.ndim >= 2 and name.endswith("weight")
        (decayed if is_matrix else plain)[name] = parameter
    return decayed, plain


def lr_at(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (0-based) out of `total_steps`.

    Warm-up of w = round(warmup_ratio * total_steps) steps: lr * (step + 1) / (w + 1), so that no
    step is wasted at 0; the peak at step w; then a cosine to lr * min_lr_ratio at the last step.
    """
    warmup = round(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
