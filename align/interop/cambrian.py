"""Cambrian: the projector with `image_newline`, and the SVA of Cambrian-1.

    mm_projector.pth    {"model": {...}}, as Cambrian-S' stage 1 leaves it
    mm_projector.bin    the same tensors without "model", as Cambrian-1's loaders read them

Source: `safe_save_model_for_hf_trainer` (train_fsdp.py) and `initialize_vision_modules`
(cambrian_arch.py) of Cambrian-1, commit 539ffc32, which read `model.image_newline` whatever the
projector is. The weights are written in fp32, as they were trained.
"""

from __future__ import annotations

from pathlib import Path

from align.connectors.mlp import MlpConfig
from align.connectors.sva import SvaConfig
from align.errors import InteropError
from align.interop.folder import Written, finish, published, save_tensors
from align.interop.names import Projector, as_mlp, as_sva, original_tensors, read_tensors
from align.interop.trained import load_trained


def export(run: Path, checkpoint: str, out: Path, *, force: bool) -> Written:
    """The folder with both files.

    Raises InteropError for a connector that is neither an MLP nor an SVA, or has no newline.
    """
    trained = load_trained(run, checkpoint)
    config, layout = trained.config.connector, trained.config.layout
    if not isinstance(config, MlpConfig | SvaConfig):
        raise InteropError(
            f"{run}: Cambrian has linear, mlpNx_gelu and SVA projectors, this run's connector is "
            f"{config.name}; give --format hf"
        )
    if not layout.newline:
        other = "train with layout.newline=true"
        if isinstance(config, MlpConfig):
            other = "give --format hf" if layout.unpad else "give --format llava or hf"
        raise InteropError(
            f"{run}: Cambrian's loaders need image_newline, and this run was trained with "
            f"layout.newline=false; {other}"
        )
    notices = []
    if not layout.unpad:
        notices.append(
            "Cambrian drops the padding of images that are not square when it answers; this run "
            "was trained with layout.unpad=false"
        )
    if isinstance(config, SvaConfig):
        notices.append(
            "the SVA is that of connector_only=True; Cambrian's scripts default to layers inside "
            "the language model"
        )
    tensors = original_tensors(trained.connector)
    nbytes = 2 * sum(each.nbytes for each in tensors.values())
    with published(out, nbytes, force) as folder:
        save_tensors(folder / "mm_projector.pth", {"model": tensors})
        save_tensors(folder / "mm_projector.bin", tensors)
        written = finish(folder, "cambrian", trained.describe(), notices)
    return Written(out, "cambrian", trained.step, written, tuple(notices))


def read(file: Path) -> Projector:
    """A `mm_projector.pth` or `.bin`. Raises InteropError where it is none."""
    tensors = read_tensors(file)
    if "model.vision_query" in tensors:
        return as_sva(file, tensors)
    return as_mlp(file, tensors, newline=True)
