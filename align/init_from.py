"""A connector's first weights from an earlier training, ours or an imported one.

PATH is a run's folder (its newest checkpoint), a checkpoint's folder, or what `align import` wrote:
a .safetensors file, or a folder with `connector.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from align.checkpoint import Checkpoint, find_checkpoint
from align.connectors import CONNECTORS, Connector
from align.errors import CheckpointError, listed
from featcache.files import seal_of

WEIGHTS = "connector.safetensors"
METADATA = "align"
"""Key of the JSON that `align import` puts into the file's metadata."""


@dataclass(frozen=True, slots=True)
class InitialWeights:
    """Where a connector's first weights came from, as run.json and checkpoints keep it.

    path: as it was given, absolute. file: that was read. xxh3_64: of its bytes. step: of the
    checkpoint; None for an imported file.
    """

    path: str
    file: str
    xxh3_64: str
    step: int | None

    def describe(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def initialise(connector: Connector, out_width: int, path: Path) -> InitialWeights:
    """Fills an untrained connector with the weights at `path`; every tensor, or none.

    out_width: H of the language model.

    Raises CheckpointError where there are none, they cannot be read, or they are of another
    connector, encoder width or language model width: both numbers are named.
    """
    file, checkpoint = _find(path)
    tensors, stated = _read(file)
    if checkpoint is not None:
        state = checkpoint.state()
        stated = {**state["widths"], "settings": _settings(state["config"])}
    if stated is not None:
        _require_widths(file, stated, connector.towers, out_width)
    _require_same_tensors(file, tensors, connector, stated)
    connector.load_state_dict(tensors)
    return InitialWeights(
        path=str(path),
        file=str(file),
        xxh3_64=seal_of(file).xxh3_64,
        step=checkpoint.step if checkpoint else None,
    )


def _find(path: Path) -> tuple[Path, Checkpoint | None]:
    if path.is_file():
        if path.suffix == ".safetensors":
            return path, None
        raise CheckpointError(
            f"--init-from {path}: neither a run, a checkpoint nor an imported connector; import "
            "a file of LLaVA or Cambrian first: align import FILE --format llava|cambrian"
        )
    if (path / "run.json").is_file():
        found = find_checkpoint(path / "checkpoints")
        return found.path / WEIGHTS, found
    if (path / "state.json").is_file():
        return path / WEIGHTS, Checkpoint(int(Checkpoint(0, path).state()["step"]), path)
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS, None
    there = "holds no" if path.is_dir() else "there is no such file or folder, so no"
    raise CheckpointError(
        f"--init-from {path}: {there} run.json, state.json or {WEIGHTS}; give a run's folder, a "
        "checkpoint's, or what `align import` wrote"
    )


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors in fp32, and what `align import` says of them."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"--init-from {file}: cannot be read: {error}; write it again"
        ) from error
    return tensors, json.loads(metadata[METADATA]) if METADATA in metadata else None


def _settings(config: dict[str, Any]) -> str:
    """KEY=VALUE of a checkpoint's connector and layout, those at their defaults left out."""
    given = {"name": config["connector"]["name"]}
    default = asdict(CONNECTORS[given["name"]]())  # type: ignore[call-overload]
    given |= {key: v for key, v in config["connector"].items() if v != default.get(key)}
    said = [f"connector.{key}={value}" for key, value in given.items()]
    return " ".join([*said, *(f"layout.{key}=true" for key, on in config["layout"].items() if on)])


def _require_widths(
    file: Path, widths: dict[str, Any], towers: Sequence[tuple[int, int]], out_width: int
) -> None:
    """widths: with "towers", [[P or null, D], ...], and "out_width", H."""
    before, now = [width for _, width in widths["towers"]], [width for _, width in towers]
    if before != now:
        raise CheckpointError(
            f"--init-from {file}: its connector is for encoders of width {listed(before)}, the "
            f"features here have {listed(now)}; give the --features of encoders of width "
            f"{listed(before)}"
        )
    if widths["out_width"] != out_width:
        raise CheckpointError(
            f"--init-from {file}: its connector is for a language model of width "
            f"{widths['out_width']}, this one's is {out_width}; give --llm the model that it was "
            "trained with, or one of that width"
        )


def _require_same_tensors(
    file: Path, tensors: dict[str, Tensor], connector: Connector, stated: dict[str, Any] | None
) -> None:
    own = connector.state_dict()
    cure = "give the connector and layout settings that it was trained with"
    if stated is not None:
        cure = f"give {stated['settings']}"
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors or name not in own:
            lacking = "it" if name not in tensors else "this config's connector"
            raise CheckpointError(f"--init-from {file}: {lacking} has no {name}; {cure}")
        if own[name].shape != tensors[name].shape:
            raise CheckpointError(
                f"--init-from {file}: {name} is {tuple(tensors[name].shape)}, this run's is "
                f"{tuple(own[name].shape)}; {cure}"
            )
