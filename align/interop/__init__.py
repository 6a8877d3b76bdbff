"""Trained connectors in the files that other tools load, and theirs in ours.

    llava.py     mm_projector.bin and config.json, as LLaVA's stage 1 leaves them
    cambrian.py  mm_projector.pth, as Cambrian-S leaves it; mm_projector.bin, as Cambrian-1 reads it
    hf.py        a whole model for transformers: plain Llava, or with modeling code of our own
    remote/      that code
    trained.py   a run's connector, without its language model
    names.py     our parameter names <-> LLaVA's and Cambrian's
    folder.py    how a folder is published: whole or not at all

To add a format: a file with `export` and, where files of it can be taken over, `read`, and a line
in `EXPORTERS` and `IMPORTERS`. docs/interop.md tables what each connector comes to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from align.errors import InteropError
from align.init_from import METADATA, WEIGHTS
from align.interop import cambrian, hf, llava
from align.interop.folder import Written, require_free
from align.interop.names import Projector
from featcache.errors import ConfigError
from featcache.files import publish

EXPORTERS: dict[str, Callable[..., Written]] = {
    "llava": llava.export,
    "cambrian": cambrian.export,
    "hf": hf.export,
}
IMPORTERS: dict[str, Callable[[Path], Projector]] = {
    "llava": llava.read,
    "cambrian": cambrian.read,
}


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import came to.

    file: with the weights. settings: what `align train` must be given for a connector that takes
    them. parameters: how many.
    """

    file: Path
    settings: str
    parameters: int


def export_run(
    run: Path,
    form: str,
    out: Path,
    *,
    checkpoint: str = "last",
    encoders: Sequence[str] = (),
    force: bool = False,
) -> Written:
    """Writes a run's connector (`hf`: the whole model) to the folder `out` in another tool's form.

    checkpoint: "last", "best" or a step. encoders: `hf`: where the encoder is now, empty takes the
    name in the checkpoint. force: replace an earlier export.

    Raises InteropError where the form cannot express a part of the run, the disk is too small or
    `out` is in use, and the errors of loading a run.
    """
    if form not in EXPORTERS:
        raise ConfigError(f"--format {form}: there are {', '.join(EXPORTERS)}")
    if encoders and form != "hf":
        raise ConfigError(f"--encoder: only for --format hf; {form} holds no encoder")
    require_free(out, force)  # before a language model is loaded, which may take minutes
    more: dict[str, Any] = {"encoders": encoders} if form == "hf" else {}
    return EXPORTERS[form](run, checkpoint, out, force=force, **more)


def import_projector(file: Path, form: str, out: Path) -> Imported:
    """Writes another tool's projector file as connector weights that `--init-from` takes.

    out: a .safetensors file, or a folder that gets `connector.safetensors`.

    Raises InteropError where the file is none of that form, or `out` cannot be written.
    """
    if form not in IMPORTERS:
        raise ConfigError(f"--format {form}: there are {', '.join(IMPORTERS)}")
    target = out if out.suffix == ".safetensors" else out / WEIGHTS
    if target.exists():
        raise InteropError(f"--out {target}: is there already; choose another")
    projector = IMPORTERS[form](file)
    tensors = {
        name: tensor.to(torch.float32).contiguous() for name, tensor in projector.tensors.items()
    }
    stated = {
        "settings": projector.settings,
        "towers": [[None, width] for width in projector.in_widths],
        "out_width": projector.out_width,
        "source": str(file.absolute()),
        "format": form,
    }
    try:
        publish(target, [save(tensors, metadata={METADATA: json.dumps(stated)})])
    except OSError as error:
        raise InteropError(
            f"--out {target}: cannot be written: {error.strerror}; give another"
        ) from error
    return Imported(target, projector.settings, sum(each.numel() for each in tensors.values()))
