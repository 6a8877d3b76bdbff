"""What must survive a stop: connector, optimizer, position; all or nothing.

    RUN/checkpoints/step-00000100/
        connector.safetensors    the connector's state_dict, fp32
        optimizer.safetensors    "<moment>.<parameter>", fp32
        state.json               everything else; written last

A checkpoint is written under another name, flushed to the disk, and renamed: a folder that is
called step-* is whole.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align.errors import CheckpointError
from featcache.files import sync

FORMAT = 3
PREFIX = "step-"
PARTIAL = ".partial-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk. step: optimizer steps done."""

    step: int
    path: Path

    def state(self) -> dict[str, Any]:
        """The content of state.json.

        Raises CheckpointError where it is unreadable or of another format.
        """
        file = self.path / "state.json"
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: {error}; {_cure(self.path)}") from error
        if state.get("format") != FORMAT:
            raise CheckpointError(
                f"{file}: format {state.get('format')}, this version reads {FORMAT}; "
                "use the version that wrote it"
            )
        return dict(state)


def save_checkpoint(
    folder: Path,
    step: int,
    connector: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Checkpoint:
    """Writes one checkpoint under `folder`; what was there before stays until it is complete.

    state: JSON-able; "format" and "step" are added.

    Raises CheckpointError where the disk does not take it; earlier checkpoints are untouched.
    """
    target = folder / f"{PREFIX}{step:08d}"
    partial = folder / f"{PARTIAL}{target.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_on_cpu(connector.state_dict()), partial / "connector.safetensors")
        save_file(_moments(connector, optimizer), partial / "optimizer.safetensors")
        document = {"format": FORMAT, "step": step, **state}
        (partial / "state.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        if target.exists():
            _remove(target)
        partial.rename(target)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{target}: cannot be written: {error}; free some space and use --resume"
        ) from error
    return Checkpoint(step, target)


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints by rising step."""
    found = [
        Checkpoint(int(path.name.removeprefix(PREFIX)), path)
        for path in folder.glob(f"{PREFIX}*")
        # Not e.g. a copy, step-00000100-copy, that a user made.
        if path.name.removeprefix(PREFIX).isdecimal() and (path / "state.json").is_file()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find_checkpoint(folder: Path, which: str = "last") -> Checkpoint:
    """The "last" checkpoint, the "best" by validation loss, or the one of a step, e.g. "1000".

    Raises CheckpointError where there is no such one.
    """
    found = list_checkpoints(folder)
    if not found:
        raise CheckpointError(f"{folder}: no complete checkpoint; train first")
    if which == "last":
        return found[-1]
    if which == "best":
        best = best_checkpoint(found)
        if best is None:
            raise CheckpointError(
                f"{folder}: no checkpoint was evaluated at its own step; use last, or train "
                "with train.keep_best=true"
            )
        return best
    for checkpoint in found:
        if which in (str(checkpoint.step), checkpoint.path.name):
            return checkpoint
    there = ", ".join(str(checkpoint.step) for checkpoint in found)
    raise CheckpointError(f"{folder}: no checkpoint {which}; there are last, best and {there}")


def best_checkpoint(found: list[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest validation loss; None where none has one.

    Only a loss that was measured at the checkpoint's own step tells of its weights.
    """
    known: list[tuple[float, Checkpoint]] = []
    for checkpoint in found:
        state = checkpoint.state()
        if state.get("eval_step") == checkpoint.step and math.isfinite(state["eval_loss"]):
            known.append((state["eval_loss"], checkpoint))
    return min(known, key=lambda pair: pair[0])[1] if known else None


def prune(folder: Path, keep: int, keep_best: bool) -> None:
    """Removes all but the newest `keep` checkpoints (0 keeps all) and, if asked for, the best."""
    found = list_checkpoints(folder)
    kept = set(found[-keep:]) if keep else set(found)
    best = best_checkpoint(found) if keep_best else None
    for checkpoint in found:
        if checkpoint not in kept and checkpoint != best:
            _remove(checkpoint.path)


def remove_partial(folder: Path) -> None:
    """Removes what a kill left of a checkpoint that was being written."""
    for path in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(path)


def load_connector(checkpoint: Checkpoint, connector: nn.Module) -> None:
    """Fills the connector with a checkpoint's weights.

    Raises CheckpointError, naming both sizes, where the weights are of another connector.
    """
    tensors = _load(checkpoint.path / "connector.safetensors")
    own = connector.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors or name not in own:
            lacking = "the checkpoint" if name not in tensors else "this config's connector"
            raise CheckpointError(
                f"{checkpoint.path}: {lacking} has no {name}; "
                "use the connector section of the checkpoint's own config"
            )
        if own[name].shape != tensors[name].shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} is {tuple(tensors[name].shape)}, this run's is "
                f"{tuple(own[name].shape)}; use the encoder, LLM and connector that it was "
                "trained with"
            )
    connector.load_state_dict(tensors)


def load_optimizer(
    checkpoint: Checkpoint, connector: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Fills an optimizer over the connector's parameters with a checkpoint's moments."""
    tensors = _load(checkpoint.path / "optimizer.safetensors")
    if not tensors:  # no step had anything to learn from
        return
    for name, parameter in connector.named_parameters():
        moments: dict[str, Tensor] = {}
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            key = f"{moment}.{name}"
            if key not in tensors:
                raise CheckpointError(f"{checkpoint.path}: optimizer.safetensors has no {key}")
            moments[moment] = tensors[key].to(parameter.device)
        optimizer.state[parameter] = moments


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _moments(connector: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return _on_cpu(
        {
            f"{moment}.{name}": value
            for name, parameter in connector.named_parameters()
            for moment, value in optimizer.state[parameter].items()
        }
    )


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: {error}; {_cure(file.parent)}") from error


def _cure(damaged: Path) -> str:
    return f"delete {damaged} and use --resume, or evaluate an earlier one with --checkpoint"


def _remove(checkpoint: Path) -> None:
    """Renamed first, so that a kill in between leaves no half of a checkpoint under its name."""
    going = checkpoint.with_name(f"{PARTIAL}removed-{checkpoint.name}")
    shutil.rmtree(going, ignore_errors=True)
    checkpoint.rename(going)
    shutil.rmtree(going)
