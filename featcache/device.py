"""Which device to compute on, and with how many cores."""

from __future__ import annotations

import os

import torch

from featcache.errors import ConfigError


def resolve_device(device: str | torch.device) -> torch.device:
    """The CPU or a CUDA device; "auto" is CUDA where there is one, else the CPU.

    Raises ConfigError for another kind of device, or one that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {str(device)!r}; give auto, cpu, cuda or cuda:0")
    there = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= there:
        raise ConfigError(
            f"device {device} was asked for, but torch sees {there}; give auto or cpu"
        )
    return chosen


def num_cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
