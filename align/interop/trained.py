"""A run's trained connector, without its language model: all that a projector file is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.checkpoint import find_checkpoint, load_connector
from align.config import RunConfig, load_config
from align.connectors import Connector, build_connector
from align.run import RunFolder, are_padded, versions


@dataclass(frozen=True, slots=True)
class Tower:
    """An encoder as the run knew it.

    name: hub id, folder or registered name. model: class of transformers. layer: as the store names
    it. depth: its blocks. preprocessing: of the store's fingerprint.
    """

    name: str
    model: str
    layer: str
    depth: int
    patches: int
    width: int
    preprocessing: dict[str, Any]

    @property
    def is_clip(self) -> bool:
        return self.model.startswith("CLIPVision")

    @property
    def is_siglip(self) -> bool:
        """SigLIP and SigLIP 2 of a fixed resolution."""
        return self.model.startswith("SiglipVision")

    @property
    def hidden_state(self) -> int | None:
        """The layer as an index of transformers' `hidden_states`, below 0 from the end.

        None for the output of a final LayerNorm, which is not among them.
        """
        if self.layer == "last":
            return -1 if self.is_clip else None
        return int(self.layer) % (self.depth + 1) - (self.depth + 1)


@dataclass(frozen=True, slots=True)
class Trained:
    """A checkpoint of a run.

    connector: on the CPU, fp32, in eval mode. state: of the checkpoint.
    """

    path: Path
    step: int
    config: RunConfig
    connector: Connector
    state: dict[str, Any]

    @property
    def out_width(self) -> int:
        """H of the language model."""
        return int(self.state["widths"]["out_width"])

    @property
    def towers(self) -> tuple[Tower, ...]:
        """Of each store."""
        return tuple(
            tower_of(fingerprint, features["layer"])
            for fingerprint, features in zip(
                self.state["stores"], self.state["features"], strict=True
            )
        )

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.connector.parameters())

    def describe(self) -> dict[str, Any]:
        """Where an export is from, JSON-able."""
        return {
            "run": str(self.path.absolute()),
            "step": self.step,
            "llm": self.state["llm"],
            "versions": versions(),
        }


def load_trained(run: Path, checkpoint: str) -> Trained:
    """Raises RunError and CheckpointError where there is no such checkpoint, or it is torn."""
    folder = RunFolder(run)
    folder.read_info()
    config = load_config(folder.config)
    found = find_checkpoint(folder.checkpoints, checkpoint)
    state = found.state()
    connector = build_connector(
        config.connector,
        [(patches, width) for patches, width in state["widths"]["towers"]],
        state["widths"]["out_width"],
        config.layout,
        padded=are_padded(config, state["stores"]),
    )
    load_connector(found, connector)
    return Trained(run, found.step, config, connector.eval(), state)


def tower_of(fingerprint: dict[str, Any], layer: str) -> Tower:
    """Of a store's fingerprint."""
    encoder = fingerprint["encoder"]
    config = encoder["config"]
    return Tower(
        name=encoder["name"],
        model=encoder["architecture"],
        layer=layer,
        depth=int(config.get("num_hidden_layers", 0)),
        patches=encoder["num_patches"],
        width=encoder["width"],
        preprocessing=fingerprint["preprocessing"],
    )


def pads_with_mean(preprocessing: dict[str, Any]) -> bool:
    """Whether images were padded with the colour that LLaVA's code pads with."""
    mean = [math.floor(value * 255) for value in preprocessing["mean"]]
    return preprocessing["aspect"] == "pad" and list(preprocessing["pad"]) == mean
