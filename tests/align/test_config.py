"""Settings: defaults, files, overrides, and everything a user can get wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config import (
    RunConfig,
    config_dict,
    diff_fields,
    list_configs,
    load_config,
    save_config,
)
from align.connectors.mlp import MlpConfig
from align.connectors.resampler import ResamplerConfig
from featcache.errors import ConfigError


def problem(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_defaults_are_the_flagships() -> None:
    config = load_config()
    assert config == RunConfig()
    assert (config.optim.lr, config.optim.weight_decay, config.optim.clip) == (1e-4, 0.01, 1.0)
    assert (config.optim.warmup_ratio, config.optim.min_lr_ratio) == (0.02, 0.1)
    assert config.connector == ResamplerConfig()


def test_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim:\n  lr: 1e-3\ntrain:\n  batch_size: 8\ndata: {files: [a.json]}\n")
    config = load_config(file, ["train.batch_size=16", "connector.num_latents=32"])
    assert config.optim.lr == 0.001  # PyYAML alone reads 1e-3 as a string
    assert config.train.batch_size == 16
    assert config.data.files == ["a.json"]
    assert isinstance(config.connector, ResamplerConfig)
    assert config.connector.num_latents == 32


def test_null_and_lists_on_the_command_line() -> None:
    config = load_config(None, ["train.steps=null", "data.files=[a.json,b.json]"])
    assert config.train.steps is None
    assert config.data.files == ["a.json", "b.json"]


def test_another_connector_drops_the_files_fields(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("connector: {name: resampler, num_latents: 32}\n")
    assert load_config(file, ["connector.name=mlp"]).connector == MlpConfig()


def test_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(None, ["connector.name=mlp", "connector.depth=3", "train.steps=7"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_every_shipped_config_loads_and_opens_with_its_command() -> None:
    shipped = list_configs()
    assert {"qwen3-8b-resampler", "qwen3-trial"} <= shipped.keys()
    for name, path in shipped.items():
        load_config(name)
        head = path.read_text().split("\n\n")[0]
        for part in ("align ", "Hardware:", "Time:", "Result:"):
            assert part in head, f"{path}: its header lacks {part}"


def test_flagship_config() -> None:
    config = load_config("qwen3-8b-resampler")
    assert config.train.batch_size * config.train.grad_accum == 512
    assert config.connector == ResamplerConfig(vision_norm=True)
    assert config.data.max_length == 1536


def test_every_problem_at_once_with_its_path_and_a_suggestion() -> None:
    message = problem(
        "optim.lrr=2e-4", "trian.steps=3", "train.batch_size=many", "eval.top_p=3", "connector"
    )
    assert message.startswith("5 problems in the command line: ")
    assert "optim.lrr: no such field, did you mean `lr`?" in message
    assert "trian: no such section, did you mean `train`?" in message
    assert "train.batch_size: Value 'many'" in message
    assert "eval.top_p: must be in (0, 1], got 3" in message
    assert "connector: must be KEY=VALUE" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("connector.name=resmapler", "no connector 'resmapler', did you mean `resampler`?"),
        ("connector.position=spiral", 'connector.position: must be "none", "learned" or "sincos"'),
        ("train=3", "train: is a section, e.g. train.FIELD=VALUE"),
        ("llm.quantize=int4", 'llm.quantize: must be "none" or "fp8", got'),
        ("llm.fp8_backward=fp32", 'llm.fp8_backward: must be "fp8" or "bf16", got'),
        ("train.precision=fp8", 'train.precision: must be "auto", "fp32" or "bf16", got'),
        (
            "template.name=qwen2",
            "template.name: no template 'qwen2'; there are caption, plain, qwen, chatml_direct, "
            "vicuna_v1, llama_v3, chat",
        ),
        ("template.system=''", "template.system: template 'caption' has no system text"),
        ("template.prompt=<image> what?", "template.prompt: the template places <image> itself"),
        ("data.eval_ratio=1", "data.eval_ratio: must be in [0, 1), got 1"),
        ("data.max_missing=1.01", "data.max_missing: must be in [0, 1], got 1.01"),
        ("data.max_missing=-0.1", "data.max_missing: must be in [0, 1], got -0.1"),
        ("data.max_missing=nan", "data.max_missing: must be in [0, 1], got nan"),
        ("optim.lr=0", "optim.lr: must be above 0"),
    ],
)
def test_one_problem(override: str, expected: str) -> None:
    assert expected in problem(override)


def test_unreadable_files(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("optim: [unclosed\n")
    with pytest.raises(ConfigError, match=r"broken.yaml: not a readable YAML file"):
        load_config(broken)
    broken.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match=r"broken.yaml: must hold sections"):
        load_config(broken)
    with pytest.raises(ConfigError, match=r"did you mean `qwen3-trial`\?"):
        load_config("qwen-trial")


def test_diff_fields() -> None:
    a, b = load_config(), load_config(None, ["optim.lr=1", "connector.name=mlp"])
    assert diff_fields(config_dict(a), config_dict(a)) == []
    lines = diff_fields(config_dict(a), config_dict(b))
    assert "optim.lr: 0.0001 -> 1.0" in lines
    assert "connector.num_latents: 64 -> (absent)" in lines
    assert diff_fields({"a": {"b": 1}}, {"a": {"b": 1, "c": None}}) == ["a.c: (absent) -> None"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=nan", "optim.lr: must be above 0 and finite, got nan"),
        ("optim.lr=inf", "optim.lr: must be above 0 and finite, got inf"),
        ("optim.clip=nan", "optim.clip: must be at least 0 and finite"),
        ("train.epochs=inf", "train.epochs: must be above 0 and finite"),
        ("train.epochs=nan", "train.epochs: must be above 0 and finite"),
        ("train.seed=-1", "train.seed: must be in [0, 2^63), got -1"),
        (f"train.seed={2**64}", "train.seed: must be in [0, 2^63)"),
        ("eval.temperature=nan", "eval.temperature: must be at least 0 and finite, got nan"),
        ("template.prompt=${foo}", "template.prompt: '${foo}' holds what the config language"),
        ("template.prompt=${name}", "template.prompt: '${name}' holds what the config language"),
        ("template.prompt=???", "template.prompt: '???' holds what the config language"),
        ("data.files=['${foo}']", "data.files: ['${foo}'] holds what the config language"),
        ("template.prompt=", "template.prompt: must not be empty"),
        ("llm.name=", "llm.name: must not be empty"),
        ("data.files=nope.json", "data.files: is a list, e.g. data.files=[nope.json]"),
    ],
)
def test_values_that_would_fail_later(override: str, expected: str) -> None:
    message = problem(override)
    assert expected in message
    assert "\n" not in message


def test_references_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim: {lr: 2e-4}\ntrain: {seed: 3}\ndata: {seed: '${train.seed}'}\n")
    assert load_config(file).data.seed == 3
    file.write_text("template: {prompt: '???'}\n")
    with pytest.raises(ConfigError, match=r"template.prompt: '\?\?\?' holds"):
        load_config(file)
    file.write_text("train: [1, 2]\n")
    with pytest.raises(ConfigError, match=r"run.yaml and the command line: Cannot merge"):
        load_config(file, ["train.steps=3"])
