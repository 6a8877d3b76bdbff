"""Prints the loss curves of every recipe's tiny twin, as curves.txt holds them.

    python -m tests.golden.curves > tests/golden/curves.txt    where a change is meant to be one

Floating-point sums depend on a CPU's vector width. Here the libraries are told to use none that
not every x86-64 has, in this process, before torch is imported.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    os.environ.update(
        ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE", ONEDNN_MAX_CPU_ISA="SSE41",
        OMP_NUM_THREADS="1", MKL_NUM_THREADS="1",
    )  # fmt: skip

import torch

from align.run import versions
from align.tracking import EvalEvent, Event, StepEvent
from align.trainer import train
from tests.align.conftest import write_world
from tests.align.twins import RECIPES, twin, write_parts


def header() -> str:
    """What the curves hold for."""
    return "# " + ", ".join(f"{name} {version}" for name, version in versions().items())


def main() -> None:
    torch.set_num_threads(1)
    print(header())
    print("# recipe, step, loss, gradient norm; or held-out loss")

    def tell(event: Event) -> None:
        match event:
            case StepEvent():
                print(name, event.step, f"{event.loss:.6g} {event.grad_norm:.6g}")
            case EvalEvent():
                print(name, event.step, f"held out {event.loss:.6g}")

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "world").mkdir()
        (root / "parts").mkdir()
        world = write_world(root / "world")
        parts = write_parts(world, root / "parts")
        for name in RECIPES:
            config, stores = twin(name, world, parts)
            train(config, stores, root / name, on_event=tell)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
