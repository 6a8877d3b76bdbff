"""`torch.compile` of a tower."""

from __future__ import annotations

import torch
from torch import Tensor

from featcache.encoders.tower import Tower, first_line
from featcache.errors import EncoderError


def compile_blocks(tower: Tower, device: torch.device) -> None:
    """Compile the forward of each of the tower's blocks, where nearly all of its time goes.

    The blocks are alike, so that one compilation serves all. It is done for batches of any size
    (`dynamic`): one for each size would give an image other last bits before and after a resume,
    depending on which batch came first.
    Raises EncoderError where nothing can be compiled.
    """
    _require_compiler(device)
    for block in tower.compiled():
        # The forward, not the module: the hooks that take the layers stay outside.
        block.forward = torch.compile(block.forward, dynamic=True)


def _require_compiler(device: torch.device) -> None:
    """Compile something tiny."""

    def double(values: Tensor) -> Tensor:
        return values.sin() * 2

    try:
        torch.compile(double)(torch.ones(8, device=device))
    # What is raised where the C++ compiler or Triton is missing has no public type of its own.
    except (RuntimeError, ImportError, OSError) as error:
        raise EncoderError(
            f"--compile needs a compiler that works on {device}, and none does: "
            f"{first_line(error)[:200]}; install one (g++ for a CPU, Triton for CUDA), or leave "
            "--compile out"
        ) from None
