"""A name, hub id or folder -> Encoder."""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import torch

from featcache.device import resolve_device
from featcache.encoders.compiling import compile_blocks
from featcache.encoders.encoder import Encoder
from featcache.encoders.families import FAMILIES, family_of
from featcache.encoders.preprocessing import Preprocessing
from featcache.encoders.tower import RANDOM_REVISION, auto_config
from featcache.errors import EncoderError
from featcache.fingerprint import weights_digest
from featcache.quiet import quiet
from featcache.registry import ENCODERS, EncoderEntry


def load_encoder(
    name: str,
    *,
    layers: Sequence[str | int] = (-2,),
    device: str | torch.device = "cpu",
    random_weights: bool = False,
    fit: str = "checkpoint",
    compile: bool = False,
) -> Encoder:
    """Load an encoder by registered name, Hugging Face hub id, or local folder; a folder's absolute
    path is the encoder's name, which holds from any working directory.

    random_weights: the full architecture with seeded random weights (benchmarks, tests); needs
    neither hub nor checkpoint for registered names.
    fit: how images get the encoder's resolution, see `Preprocessing.with_fit`.
    compile: `torch.compile` of the tower's blocks; its results differ by rounding.
    Compute is bfloat16 on CUDA and float32 elsewhere; attention is SDPA.
    Raises EncoderError: unknown name, unreachable hub, a model that is no tower of patches, missing
    weights, no compiler. Raises ConfigError for a wrong `fit` or device.
    """
    name = absolute_name(name)
    entry = _entry_of(name)
    source = _source(name)
    device = resolve_device(device)
    if (
        entry is not None
        and entry.architecture is not None
        and (random_weights or not entry.describes_itself)
    ):
        family = FAMILIES[entry.model_type]
        config = family.config_class(**entry.architecture)
        processor = family.processor_class(**(entry.processor or {}))
        called = family.processor_name
        preprocessing = Preprocessing.from_processor(processor, name, called=called)
    else:
        whole = auto_config(name, source)
        family = family_of(whole.model_type)
        config = family.tower_config(whole)
        preprocessing = family.read_processor(name, source)
    if entry is not None and entry.resolution is not None:
        preprocessing = preprocessing.at(entry.resolution)
    preprocessing = preprocessing.with_fit(fit, name)
    with quiet():
        if random_weights:
            model = family.random_model(name, config)
        else:
            model = family.read_model(name, source, config)
    model = model.eval().requires_grad_(False)
    tower = family(name, model, preprocessing, tuple(str(layer) for layer in layers), entry)
    weights = weights_digest(model)
    compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tower.to(device, compute_dtype)
    if compile:
        compile_blocks(tower, device)
    return Encoder(
        name=name,
        revision=RANDOM_REVISION if random_weights else getattr(config, "_commit_hash", None),
        weights=weights,
        tower=tower,
        device=device,
        compute_dtype=compute_dtype,
        compiled=compile,
    )


def absolute_name(name: str) -> str:
    """The same, a relative path of a folder as an absolute one."""
    if name not in ENCODERS and Path(name).is_dir():
        return str(Path(name).absolute())
    return name


def _entry_of(name: str) -> EncoderEntry | None:
    """What the registry says of a name; of a hub id or a folder only where the repository does not
    say it itself."""
    if name in ENCODERS:
        return ENCODERS[name]
    for entry in ENCODERS.values():
        if not entry.describes_itself and Path(entry.hub_id or "").name == Path(name).name:
            return entry
    return None


def _source(name: str) -> str:
    entry = ENCODERS.get(name)
    if entry is not None:
        if entry.asset is not None:
            return str(importlib.resources.files("featcache") / "assets" / entry.asset)
        assert entry.hub_id is not None
        return entry.hub_id
    if "/" in name or Path(name).exists():
        return name
    near = difflib.get_close_matches(name, ENCODERS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise EncoderError(
        f"unknown encoder {name!r}; {hint}give a name from `featcache models`, a Hugging Face id "
        "(owner/name), or a folder with config.json"
    )
