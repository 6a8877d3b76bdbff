"""Our parameter names <-> those of LLaVA and Cambrian, and their files' tensors.

ours                          theirs
core.layers.{0,2,..}.*        model.mm_projector.{0,2,..}.*      MLP of two or more layers
core.layers.0.*               model.mm_projector.*               one layer (`linear`)
core.* of an SVA              `Sva.original_names`
layout.newline                model.image_newline
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from align.connectors import Connector
from align.connectors.mlp import Mlp
from align.connectors.sva import Sva, SvaConfig
from align.errors import InteropError

PROJECTOR = "model.mm_projector"
NEWLINE = "model.image_newline"
WRAPPERS = re.compile(r"^(?:module\.|base_model\.model\.)+")
"""What DataParallel, DeepSpeed and peft put before a parameter's name."""


@dataclass(frozen=True, slots=True)
class Projector:
    """A connector's weights under our names.

    settings: the KEY=VALUE of a run that takes them. in_widths: D of each encoder. out_width: H.
    """

    tensors: dict[str, Tensor]
    settings: str
    in_widths: tuple[int, ...]
    out_width: int


def mlp_names(depth: int) -> dict[str, str]:
    """Ours -> theirs, for an MLP of so many linear layers."""
    if depth == 1:
        return {f"core.layers.0.{part}": f"{PROJECTOR}.{part}" for part in ("weight", "bias")}
    return {
        f"core.layers.{2 * i}.{part}": f"{PROJECTOR}.{2 * i}.{part}"
        for i in range(depth)
        for part in ("weight", "bias")
    }


def original_names(connector: Connector) -> dict[str, str]:
    """Ours -> theirs of every parameter; of an MLP or an SVA."""
    core = connector.core
    if isinstance(core, Mlp):
        names = mlp_names(sum(isinstance(layer, torch.nn.Linear) for layer in core.layers))
    else:
        assert isinstance(core, Sva)
        names = {f"core.{ours}": theirs for ours, theirs in core.original_names().items()}
    if connector.layout.newline is not None:
        names["layout.newline"] = NEWLINE
    return names


def original_tensors(connector: Connector) -> dict[str, Tensor]:
    """The connector's weights under their names, fp32, each in memory of its own."""
    names, own = original_names(connector), connector.state_dict()
    assert names.keys() == own.keys(), "a parameter without a name would be dropped"
    return {theirs: own[ours].detach().clone() for ours, theirs in names.items()}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A file that `torch.save` wrote, without running what may be in it -> {name as in
    "model.mm_projector.0.weight": tensor}.

    A dictionary of tensors, or one in its "model"; wrappers' prefixes are taken off, and "model."
    is put where it lacks.

    Raises InteropError where the file is no such thing.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InteropError(f"{file}: there is no such file") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it ends early"
        raise InteropError(
            f"{file}: not a file of tensors that torch.save wrote: {reason[:160]}; give a "
            "mm_projector.bin or mm_projector.pth"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not content:
        raise InteropError(
            f"{file}: holds no dictionary of tensors; give a mm_projector.bin or mm_projector.pth"
        )
    odd = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if odd:
        raise InteropError(
            f"{file}: {', '.join(odd[:4])}{', ...' * (len(odd) > 4)} are no tensors, as of a whole "
            "training's checkpoint; give the mm_projector file that was saved beside it"
        )
    tensors: dict[str, Tensor] = {}
    for key, tensor in content.items():
        name = WRAPPERS.sub("", str(key))
        # peft's base_model.model.model.X is model.X, its base_model.model.X of a bare model X.
        name = name if name.startswith("model.") else f"model.{name}"
        if name in tensors:
            raise InteropError(f"{file}: holds {name} twice, also as {key}; save it again")
        tensors[name] = tensor
    return tensors


def as_mlp(file: Path, tensors: dict[str, Tensor], *, newline: bool) -> Projector:
    """An MLP's. newline: whether Cambrian's `image_newline` is a part of it.

    Raises InteropError for tensors that are missing or too many, by their names, and for shapes
    that are no chain of linear layers.
    """
    if f"{PROJECTOR}.weight" in tensors:
        depth = 1
        names = mlp_names(1)
    else:
        places = [re.fullmatch(rf"{re.escape(PROJECTOR)}\.(\d+)\.weight", name) for name in tensors]
        found = [int(place[1]) for place in places if place]
        depth = max(found, default=0) // 2 + 1
        # `mlp1x_gelu` is one layer that LLaVA numbers.
        names = {
            f"core.layers.{2 * i}.{part}": f"{PROJECTOR}.{2 * i}.{part}"
            for i in range(depth)
            for part in ("weight", "bias")
        }
    if newline:
        names["layout.newline"] = NEWLINE
    ours = _renamed(file, tensors, names)
    weights = [ours[f"core.layers.{2 * i}.weight"] for i in range(depth)]
    if any(weight.ndim != 2 for weight in weights):
        shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
        raise InteropError(
            f"{file}: its weights are {shapes}, no matrices; under DeepSpeed ZeRO-3 gather the "
            "parameters before saving"
        )
    out_width, in_width = weights[0].shape
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(names, (out_width,))
    for i in range(depth):
        expected[f"core.layers.{2 * i}.weight"] = (out_width, in_width if i == 0 else out_width)
    _require_shapes(file, ours, names, expected)
    settings = f"connector.name=mlp connector.depth={depth}{' layout.newline=true' * newline}"
    return Projector(ours, settings, (in_width,), out_width)


def as_sva(file: Path, tensors: dict[str, Tensor]) -> Projector:
    """Of Cambrian-1's SVA with `connector_only=True`. Raises InteropError as `as_mlp` does."""
    inside = sorted(name for name in tensors if name.startswith("model.vision_sampler_layers."))
    if inside:
        raise InteropError(
            f"{file}: {inside[0]} and {len(inside) - 1} more are layers inside the language model "
            "(connector_only=False), which a frozen one cannot take; only connector_only=True can "
            "be imported"
        )
    query, last = tensors["model.vision_query"], tensors.get(f"{PROJECTOR}.2.weight")
    aux = [
        tensors[name]
        for name in (f"model.mm_projector_aux_{t}.0.weight" for t in range(len(tensors)))
        if name in tensors
    ]
    layers = [re.match(r"model\.vision_sampler_0\.layers\.(\d+)\.", name) for name in tensors]
    depth = 1 + max((int(layer[1]) for layer in layers if layer), default=-1)
    if last is None or not aux or not depth or query.ndim != 2:
        raise InteropError(
            f"{file}: has model.vision_query, but not the rest of an SVA ({PROJECTOR}.2, "
            "model.mm_projector_aux_0, model.vision_sampler_0); save it again"
        )
    groups, width = query.shape
    windows = []
    for tower in range(len(aux)):
        place = tensors.get(f"model.vision_sampler_0.layers.0.pos_embed_{tower}")
        windows.append(1 if place is None else math.isqrt(len(place)))
    config = SvaConfig(
        width=width,
        side=1,  # the weights are the same for a grid of any side
        groups=groups,
        depth=depth,
        heads=1,
        token_lengths=[window**2 for window in windows],
    )
    with torch.device("meta"):
        sva = Sva(config, [(1, weight.shape[1]) for weight in aux], len(last))
    names = {f"core.{ours}": theirs for ours, theirs in sva.original_names().items()}
    names["layout.newline"] = NEWLINE
    ours = _renamed(file, tensors, names)
    shapes = {f"core.{name}": tuple(each.shape) for name, each in sva.state_dict().items()}
    shapes["layout.newline"] = (len(last),)
    _require_shapes(file, ours, names, shapes)
    settings = (
        f"connector.name=sva connector.width={width} connector.groups={groups} "
        f"connector.depth={depth} layout.newline=true"
    )
    if max(windows) > 1:
        settings += (
            f", and connector.token_lengths of connector.side^2 times "
            f"{', '.join(str(window**2) for window in windows)}"
        )
    return Projector(ours, settings, tuple(weight.shape[1] for weight in aux), len(last))


def _renamed(file: Path, tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """names: ours -> theirs."""
    missing = sorted(set(names.values()) - tensors.keys())
    if missing:
        raise InteropError(
            f"{file}: has no {_first(missing)}; it holds {_first(sorted(tensors))}; give the "
            "projector file of this --format"
        )
    extra = sorted(tensors.keys() - set(names.values()))
    if extra:
        raise InteropError(
            f"{file}: holds more than the projector: {_first(extra)}; remove these, or give the "
            "--format that has them"
        )
    return {ours: tensors[theirs] for ours, theirs in names.items()}


def _require_shapes(
    file: Path,
    tensors: dict[str, Tensor],
    names: dict[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise InteropError(
                f"{file}: {names[name]} is {tuple(tensors[name].shape)}, by the other tensors it "
                f"must be {shape}; save it again"
            )


def _first(names: list[str]) -> str:
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more' * (len(names) > 4)}"
