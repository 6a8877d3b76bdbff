"""What a device can do and takes: its rate of matrix products, its memory, its energy."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from align.bench import usage

SIDES = {"cpu": 2048, "cuda": 8192}
"""Of the square matrices: large enough to be at the device's limit, small enough to be cheap."""
RAPL = Path("/sys/class/powercap")


def fence(device: torch.device) -> None:
    """Wait for all that the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Matmul:
    """Large square products, the ceiling of every training step. A server of commands."""

    def __init__(self, device: str, dtype: str) -> None:
        """device: of torch. dtype: "fp32" or "bf16"."""
        self.device = torch.device(device)
        side = SIDES[self.device.type]
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.a, self.b = (torch.randn(side, side, device=self.device).to(kind) for _ in range(2))
        self.out = torch.empty_like(self.a)

    def run(self, seconds: float) -> float:
        """Operations a second, over about so many seconds."""
        count = max(1, int(seconds / self._seconds(1)))
        return 2.0 * len(self.a) ** 3 * count / self._seconds(count)

    def _seconds(self, count: int) -> float:
        torch.mm(self.a, self.b, out=self.out)
        fence(self.device)
        start = time.perf_counter()
        for _ in range(count):
            torch.mm(self.a, self.b, out=self.out)
        fence(self.device)
        return time.perf_counter() - start

    def close(self) -> None:
        pass


def forget_peak(device: torch.device) -> None:
    """`peak_bytes` counts from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        usage.forget_peak()


def peak_bytes(device: torch.device) -> int:
    """CUDA: allocated at most by this process on the device. CPU: of this process at its highest,
    and of its children what they hold now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    children = usage.process_tree(os.getpid())[1:]
    own = usage.memory_bytes(os.getpid(), "VmHWM")
    return own + sum(map(usage.proportional_bytes, children))


def joules_meter(device: torch.device) -> Callable[[], float] | None:
    """A counter of the joules that the device has taken, from an arbitrary zero; None where it
    does not tell. On CUDA the whole GPU's (NVML), on the CPU all packages' (RAPL)."""
    return _gpu_meter(device) if device.type == "cuda" else _cpu_meter(RAPL)


def _cpu_meter(folder: Path) -> Callable[[], float] | None:
    """Packages alone ("intel-rapl:0"): their parts ("intel-rapl:0:1") are within them."""
    zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    try:
        limits = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        last = [int((zone / "energy_uj").read_text()) for zone in zones]
    except OSError:  # since 2020 for root alone
        return None
    if not zones:
        return None
    total = 0

    def joules() -> float:
        nonlocal total
        for at, (zone, limit) in enumerate(zip(zones, limits, strict=True)):
            now = int((zone / "energy_uj").read_text())
            total += (now - last[at]) % (limit + 1)  # the counters start again at their limit
            last[at] = now
        return total / 1e6

    return joules


def _gpu_meter(device: torch.device) -> Callable[[], float] | None:
    """Straight from the driver's library, which needs no package."""
    try:
        nvml: Any = ctypes.CDLL("libnvidia-ml.so.1")
        handle = ctypes.c_void_p()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
            return None
    except (OSError, AttributeError):
        return None

    def joules() -> float | None:
        millijoules = ctypes.c_ulonglong()
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            return None
        return millijoules.value / 1e3

    return joules if joules() is not None else None  # type: ignore[return-value]
