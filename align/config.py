"""All settings of a run: one dataclass tree, filled from defaults, a YAML file and KEY=VALUE.

A component's config lives beside the component; here they are only gathered. Widths are never
settings: the store knows P and D, the language model knows H.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import align
from align.connectors import CONNECTORS, ConnectorConfig
from align.connectors.layout import LayoutConfig
from align.connectors.resampler import ResamplerConfig
from align.data.dataset import DataConfig
from align.data.templates import TemplateConfig
from align.llm import LLMConfig
from align.optim import OptimConfig
from featcache.errors import ConfigError
from featcache.files import publish
from featcache.fingerprint import diff
from featcache.read_mode import IO_MODES
from featcache.reader import BUDGET_BYTES, CHECKS, DEPTH


@dataclass
class FeaturesConfig:
    """Which features are trained on."""

    layers: list[str] = field(default_factory=list)
    """The encoder layer of each store as the store names it, e.g. ["-2"]; empty takes a store's
    only one."""
    encoders: list[str] = field(default_factory=list)
    """The encoder of each store that the recipe is for, as `featcache extract --model` takes it;
    another one is refused. Empty takes any."""


@dataclass
class TrainConfig:
    """How long, how much at once, and how often something else than a step happens."""

    steps: int | None = None
    """Optimizer steps in all; null takes `epochs`."""
    epochs: float = 1.0
    """Passes over the training samples, where `steps` is null."""
    batch_size: int = 32
    """Samples in one forward pass of one process, at most."""
    grad_accum: int = 1
    """Forward passes of each process per optimizer step. A step sees batch_size * grad_accum *
    processes samples; a resumed run keeps that number, whatever the number of processes then."""
    batch_tokens: int | None = None
    """Tokens in one forward pass, padding included, at most: a step is cut into as many passes as
    that takes, each of samples of like length; null limits their number alone."""
    length_multiple: int = 1
    """Sequences are padded to a multiple of so many tokens: compiled code then meets few shapes."""
    shard_llm: bool = False
    """Divide the language model's layers among all processes (FSDP2), for one that does not fit a
    device. Without effect in a single process."""
    not_finite: str = "stop"
    """What a step whose loss or gradient is not finite leads to, which never changes a weight:
    "stop" the run, or "skip" the step and go on until ten come in a row. Its samples are named in
    not_finite.jsonl."""
    seed: int = 0
    """Of the connector's initial weights, the order of the samples, and dropout."""
    init_from: str | None = None
    """What the connector starts from: a run's folder, a checkpoint's, or what `align import` wrote;
    null starts from random weights. A resumed run does not read it again."""
    shuffle_window: int = 0
    """0 shuffles all samples together. Above it, so many shards of the store are shuffled together
    at a time, for spinning disks and object stores: less random, see docs/sampling.md."""
    device: str = "auto"
    """"auto" takes CUDA where there is one; else any torch device."""
    precision: str = "auto"
    """"fp32" or "bf16" (the frozen LLM in bf16, the connector's fp32 weights under autocast);
    "auto" is bf16 on CUDA and fp32 on the CPU."""
    packing: bool = False
    """Lays the samples of a batch in one row without padding, attention ending at their boundaries;
    false pads them to the longest. Needs llm.attention=sdpa and a model of full attention."""
    compile: bool = False
    """Compiles the language model's decoder layers (torch.compile; needs a C++ compiler, and on
    CUDA Triton): seconds before the first steps, for faster ones after."""
    checkpoint_activations: bool = False
    """Keeps only the input of each decoder layer for the backward pass and computes the layer once
    more there: a third more time for memory that holds larger batches."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 200
    """Steps between evaluations of the loss on the validation split; 0 never evaluates."""
    eval_samples: int = 1024
    """Validation samples per evaluation, the first ones of the split; 0 takes all."""
    sample_every: int = 0
    """Steps between sample captions; 0 never writes any."""
    samples: int = 8
    """Sample captions each time: the first ones of the validation split."""
    save_every: int = 500
    """Steps between checkpoints; 0 saves only at the end."""
    keep_checkpoints: int = 2
    """The newest checkpoints that are kept; 0 keeps all."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest validation loss; each one is then evaluated."""
    read_threads: int | None = None
    """Threads that read features; null takes 8 past the page cache, else up to 4 as cores allow."""
    read_ahead: int = DEPTH
    """Batches of features read ahead of the one in use, as far as `read_budget_mb` allows."""
    read_budget_mb: int = BUDGET_BYTES >> 20
    """MB of memory for features read ahead and in use; two batches are always granted."""
    read_mode: str = "auto"
    """"buffered" (through the page cache), "direct" (past it, O_DIRECT), or "auto": buffered where
    all features fit into memory."""
    verify_features: str = "once"
    """When an image's stored checksum is compared with what was read: "once" (the first time),
    "always", or "never"."""

    cache_dir: str | None = None
    """Folder on a local disk that keeps the features fetched from a bucket; null takes
    FEATCACHE_CACHE_DIR, or `featcache` in the user's folder for caches."""
    cache_gb: float | None = None
    """GB of that disk to use at the most; null takes half of what is free or already used so."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one "field: reason" each."""
        if self.steps is not None and self.steps < 1:
            yield f"steps: must be at least 1 or null, got {self.steps}"
        if not (self.epochs > 0 and math.isfinite(self.epochs)):
            yield f"epochs: must be above 0 and finite, got {self.epochs}"
        if not 0 <= self.seed < 2**63:
            yield f"seed: must be in [0, 2^63), got {self.seed}"
        for name in (
            "batch_size",
            "grad_accum",
            "length_multiple",
            "log_every",
            "read_ahead",
            "read_budget_mb",
        ):
            if getattr(self, name) < 1:
                yield f"{name}: must be at least 1, got {getattr(self, name)}"
        if self.batch_tokens is not None and self.batch_tokens < 1:
            yield f"batch_tokens: must be at least 1 or null, got {self.batch_tokens}"
        if self.not_finite not in ("stop", "skip"):
            yield f'not_finite: must be "stop" or "skip", got {self.not_finite!r}'
        if self.read_threads is not None and self.read_threads < 1:
            yield f"read_threads: must be at least 1 or null, got {self.read_threads}"
        if self.cache_gb is not None and not (self.cache_gb >= 0 and math.isfinite(self.cache_gb)):
            yield f"cache_gb: must be at least 0 and finite, or null, got {self.cache_gb}"
        if self.read_mode not in IO_MODES:
            known = ", ".join(map(repr, IO_MODES))
            yield f"read_mode: must be one of {known}, got {self.read_mode!r}"
        for name in (
            "shuffle_window",
            "eval_every",
            "eval_samples",
            "sample_every",
            "samples",
            "save_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 0:
                yield f"{name}: must be at least 0, got {getattr(self, name)}"
        if self.verify_features not in CHECKS:
            known = ", ".join(map(repr, CHECKS))
            yield f"verify_features: must be one of {known}, got {self.verify_features!r}"
        if self.precision not in ("auto", "fp32", "bf16"):
            yield f'precision: must be "auto", "fp32" or "bf16", got {self.precision!r}'


@dataclass
class EvalConfig:
    """How captions are generated, while training and in `align eval`."""

    temperature: float = 0.0
    """0 is greedy; 0.2 to 0.7 is what the flagship's evaluation protocol samples with."""
    top_p: float = 0.9
    """Of the sampled distribution; without effect when greedy."""
    max_new_tokens: int = 64
    batch_size: int = 32
    """Captions generated at once."""
    seed: int = 0
    """Of the sampling."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one "field: reason" each."""
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            yield f"temperature: must be at least 0 and finite, got {self.temperature}"
        if not 0 < self.top_p <= 1:
            yield f"top_p: must be in (0, 1], got {self.top_p}"
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                yield f"{name}: must be at least 1, got {getattr(self, name)}"


@dataclass
class RunConfig:
    """Everything that decides a run's result, but for the store and the data it names."""

    llm: LLMConfig = field(default_factory=LLMConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    data: DataConfig = field(default_factory=DataConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    connector: ConnectorConfig = field(default_factory=ResamplerConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def load_config(name_or_path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a shipped recipe's name or of a YAML file, with KEY=VALUE overrides on top.

    name_or_path: None takes the defaults.
    overrides: e.g. "optim.lr=2e-4". When `connector.name` is overridden, what the file says about
        another connector is dropped.

    Raises ConfigError with every problem at once, each with its dotted path.
    """
    problems: list[str] = []
    given: dict[str, Any] = {}
    title = "the command line"
    if name_or_path is not None:
        path = find_config(name_or_path)
        title = f"{path}" if not overrides else f"{path} and the command line"
        given = _read_yaml(path)
    on_top = _parse_overrides(overrides, problems)

    named = on_top.get("connector")
    if isinstance(named, dict) and "name" in named:
        of_file = given.get("connector")
        if isinstance(of_file, dict) and of_file.get("name", "resampler") != named["name"]:
            del given["connector"]
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(given, on_top))
    # TypeError: a file's list where the command line has a section, which OmegaConf does not name.
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"{title}: {_one_line(error)}") from error
    assert isinstance(merged, dict)

    sections = {f.name: f for f in dataclasses.fields(RunConfig)}
    for key in merged:
        if key not in sections:
            problems.append(f"{key}: no such section{_did_you_mean(str(key), sections)}")
    built = {
        name: _build_section(name, _section_class(name, merged, problems), merged, problems)
        for name in sections
    }
    if problems:
        head = f"{len(problems)} problem{'s' * (len(problems) > 1)} in {title}: "
        raise ConfigError(head + "; ".join(problems))
    return RunConfig(**built)


def save_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved config as YAML that `load_config` reads back to an equal value.

    All of it or nothing, also where the process is killed. Raises OSError.
    """
    publish(path, [OmegaConf.to_yaml(OmegaConf.create(config_dict(config))).encode()])


def config_dict(config: RunConfig) -> dict[str, Any]:
    """The config as nested plain values."""
    return {f.name: dataclasses.asdict(getattr(config, f.name)) for f in dataclasses.fields(config)}


def diff_fields(a: Any, b: Any) -> list[str]:
    """`featcache.fingerprint.diff` as lines, one "dotted.path: a -> b" each."""
    return [f"{path}: {left!r} -> {right!r}" for path, left, right in diff(a, b)]


def list_configs() -> dict[str, Path]:
    """Name -> file of the recipes that are shipped."""
    return {path.stem: path for path in sorted(_config_folder().glob("*.yaml"))}


def find_config(name_or_path: str | Path) -> Path:
    """The file of a shipped recipe's name, or the path itself.

    Raises ConfigError where there is neither.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = list_configs()
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    raise ConfigError(
        f"{name_or_path}: neither a file nor a shipped config"
        f"{_did_you_mean(str(name_or_path), shipped)}; `align configs` lists them"
    )


def _config_folder() -> Path:
    """`configs/` of the checkout, or where the wheel put it."""
    package = Path(align.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
        content = OmegaConf.to_container(loaded, resolve=True)
    # OmegaConf passes PyYAML's own errors through; both are the user's to mend.
    except (OmegaConfBaseException, _yaml_error(), OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold sections such as `optim:`, holds a list or a value")
    return {str(key): value for key, value in content.items()}


def _yaml_error() -> type[Exception]:
    import yaml

    return yaml.YAMLError


def _parse_overrides(overrides: Sequence[str], problems: list[str]) -> dict[str, Any]:
    parsed = OmegaConf.create({})
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            problems.append(f"{override}: must be KEY=VALUE, e.g. optim.lr=2e-4")
            continue
        try:
            parsed = OmegaConf.merge(parsed, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, _yaml_error()) as error:
            problems.append(f"{override}: {_one_line(error)}")
    content = OmegaConf.to_container(parsed)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _section_class(name: str, merged: dict[str, Any], problems: list[str]) -> type:
    """The dataclass of a section; for `connector`, the one that its `name` asks for."""
    if name != "connector":
        default = getattr(RunConfig(), name)
        return type(default)
    section = merged.get("connector")
    wanted = section.get("name", "resampler") if isinstance(section, dict) else "resampler"
    if wanted not in CONNECTORS:
        known = ", ".join(CONNECTORS)
        problems.append(
            f"connector.name: no connector {wanted!r}{_did_you_mean(str(wanted), CONNECTORS)}; "
            f"there are {known}"
        )
        # Its other fields can be judged only once it is known which connector is meant.
        merged["connector"] = {}
        wanted = "resampler"
    return CONNECTORS[wanted]


def _build_section(name: str, kind: type, merged: dict[str, Any], problems: list[str]) -> Any:
    values = merged.get(name)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        problems.append(f"{name}: is a section, e.g. {name}.FIELD=VALUE, got {values!r}")
        return kind()
    node = OmegaConf.structured(kind)
    fields = {f.name for f in dataclasses.fields(kind)}
    known = len(problems)
    for key, value in values.items():
        if key not in fields:
            problems.append(f"{name}.{key}: no such field{_did_you_mean(str(key), fields)}")
            continue
        default = getattr(kind(), key)
        if _is_special(value):
            problems.append(
                f"{name}.{key}: {value!r} holds what the config language reads as a reference or a "
                "missing value (`${`, `???`); write it another way"
            )
        elif isinstance(default, list) and not isinstance(value, list):
            problems.append(f"{name}.{key}: is a list, e.g. {name}.{key}=[{value}]")
        elif isinstance(default, str) and value is None:
            problems.append(f"{name}.{key}: must not be empty")
        else:
            try:
                OmegaConf.update(node, key, value)
            except OmegaConfBaseException as error:
                problems.append(f"{name}.{key}: {_one_line(error)}")
    section = OmegaConf.to_object(node)
    # A section with wrong types is not yet worth judging by its values.
    if len(problems) == known and hasattr(section, "problems"):
        problems.extend(f"{name}.{problem}" for problem in section.problems())
    return section


def _is_special(value: Any) -> bool:
    """Whether OmegaConf would put something else in the place of a value, or ask for it.

    A file's own references are resolved by now, where they can be.
    """
    if isinstance(value, list):
        return any(_is_special(item) for item in value)
    return isinstance(value, str) and ("${" in value or value == "???")


def _did_you_mean(wrong: str, known: Sequence[str] | Any) -> str:
    close = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f", did you mean `{close[0]}`?" if close else ""


def _one_line(error: Exception) -> str:
    """The message without the location lines that OmegaConf and PyYAML append."""
    return " ".join(str(error).split("\n    full_key")[0].split())
