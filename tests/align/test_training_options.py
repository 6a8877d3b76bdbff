"""How a step is cut, what a step that is not finite leads to, and profiles."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import featcache
from align.checkpoint import find_checkpoint
from align.config import RunConfig
from align.errors import AlignError, RunError
from align.evaluate import evaluate
from align.run import assemble, load_run
from align.tracking import Event, NoticeEvent, StepEvent, read_metrics
from align.trainer import train
from featcache.errors import ConfigError
from featcache.store import Store
from tests.align.test_trainer import (
    StopError,
    assert_same_runs,
    damage,
    stop_after,
    without_checksums,
)

MakeConfig = Callable[..., RunConfig]


def losses(run: Path) -> list[float]:
    lines = read_metrics(run / "metrics.jsonl")
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.batch_size=4", "train.grad_accum=3"),
        ("train.batch_size=12", "train.batch_tokens=70"),
        ("train.batch_size=12", "train.length_multiple=16"),
        ("train.batch_size=6", "train.grad_accum=2", "train.batch_tokens=1"),
        ("train.batch_size=12", "train.packing=true"),
        ("train.batch_size=12", "train.packing=true", "train.batch_tokens=90"),
        ("train.batch_size=12", "train.checkpoint_activations=true"),
    ],
)
def test_however_a_step_is_cut_it_learns_the_same(
    store: Store, make_config: MakeConfig, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """fp32; measured 1.1e-7 of the loss."""
    train(make_config("train.batch_size=12"), [store.path], tmp_path / "whole")
    train(make_config(*overrides), [store.path], tmp_path / "cut")
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), 1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_run_learns_the_same(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    """With batches of several lengths, evaluations and captions in between."""
    options = ("train.grad_accum=2", "train.sample_every=2", "eval.max_new_tokens=4")
    train(make_config(*options), [store.path], tmp_path / "plain")
    train(make_config(*options, "train.compile=true"), [store.path], tmp_path / "compiled")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), 1e-5)


def test_a_packed_run_is_evaluated_like_any(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    """Loss and hits of each sample are its own, not its row's."""
    train(make_config("train.packing=true"), [store.path], tmp_path / "run")
    run = load_run(tmp_path / "run")
    plain = load_run(tmp_path / "run", overrides=["train.packing=false"])
    packed, padded = evaluate(run).captions, evaluate(plain).captions
    assert [caption.tokens for caption in packed] == [caption.tokens for caption in padded]
    assert packed == padded


def test_a_budget_is_kept(store: Store, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("train.batch_size=20", "train.batch_tokens=80", "train.length_multiple=8")
    run = assemble(config, [store.path], tmp_path)
    batches = list(run.loader("train").stream_steps(run.sampler().steps(0, 3)))
    assert [ends for _, ends in batches].count(True) == 3
    for batch, _ in batches:
        B, T = batch.input_ids.shape
        assert T % 8 == 0 and B * T <= 80
    run.close()


def test_the_cut_may_change_when_a_run_is_resumed(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    """Another GPU may hold less; the samples of a step are the same, and their number is kept."""
    train(make_config("train.batch_size=8"), [store.path], tmp_path / "whole")
    with pytest.raises(StopError):
        train(make_config("train.batch_size=8"), [store.path], tmp_path / "cut",
              on_event=stop_after(3))  # fmt: skip
    smaller = make_config("train.batch_size=2", "train.grad_accum=4", "train.batch_tokens=50")
    train(smaller, [store.path], tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), 1e-6)
    with pytest.raises(RunError, match=r"other settings: train.batch_size: 8 -> 2; give the same"):
        train(make_config("train.batch_size=2"), [store.path], tmp_path / "cut", resume=True)


def test_bad_values_are_named(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"train.batch_tokens: must be at least 1 or null, got 0"):
        make_config("train.batch_tokens=0")
    with pytest.raises(ConfigError, match=r'train.not_finite: must be "stop" or "skip", got .go.'):
        make_config("train.not_finite=go")
    with pytest.raises(ConfigError, match=r"train.length_multiple: must be at least 1, got 0"):
        make_config("train.length_multiple=0")


def test_a_step_that_is_not_finite_is_skipped(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    """One damaged image in 40: the steps with it change nothing, and are told and listed."""
    damaged = shutil.copytree(store.path, tmp_path / "damaged.zarr")
    key = "007.png"
    damage(featcache.open(damaged), key)
    config = without_checksums(
        make_config, "train.not_finite=skip", "data.eval_ratio=0", "train.steps=20",
        "train.log_every=3",
    )  # fmt: skip
    events: list[Event] = []
    result = train(config, [damaged], tmp_path / "run", on_event=events.append)
    assert result.step == 20 and result.loss is not None and result.loss < 6.4
    listed = [
        json.loads(line) for line in (tmp_path / "run/not_finite.jsonl").read_text().splitlines()
    ]
    assert len(listed) == 2  # an epoch is 10 steps
    assert all(line["images"] == [key] and len(line["ids"]) == 4 for line in listed)
    told = [e.text for e in events if isinstance(e, NoticeEvent) and "not finite" in e.text]
    assert [text.split(":")[0] for text in told] == [f"step {line['step']}" for line in listed]
    assert told[0].endswith(f"skipped, its samples are in {tmp_path / 'run/not_finite.jsonl'}")
    tensors = find_checkpoint(tmp_path / "run/checkpoints").path / "connector.safetensors"
    from safetensors.torch import load_file

    assert all(t.isfinite().all() for t in load_file(tensors).values())

    with pytest.raises(StopError):
        train(config, [damaged], tmp_path / "cut", on_event=stop_after(12))
    train(config, [damaged], tmp_path / "cut", resume=True)
    assert_same_runs(tmp_path / "run", tmp_path / "cut")


def test_what_excludes_another_is_refused(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config("llm.quantize=fp8", "train.shard_llm=true")
    with pytest.raises(ConfigError, match=r"llm.quantize=fp8, train.shard_llm=true: .* choose one"):
        train(config, [store.path], tmp_path / "run")


def test_ten_in_a_row_end_a_run_that_skips(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        "train.not_finite=skip", "optim.lr=1e30", "optim.clip=0", "train.steps=99",
        "train.eval_every=0", "train.save_every=0",
    )  # fmt: skip
    with pytest.raises(AlignError, match=r"nor were the 9 before; its samples are .* lower optim"):
        train(config, [store.path], tmp_path / "run")
    assert len((tmp_path / "run/not_finite.jsonl").read_text().splitlines()) == 10


def test_a_profile_names_the_steps_operators(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    events: list[Event] = []
    config = make_config("train.steps=9", "train.eval_every=0")
    train(config, [store.path], tmp_path / "run", on_event=events.append, profile=True)
    folder = tmp_path / "run/profile"
    with gzip.open(folder / "rank-0.trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::mm" in names and "aten::_fused_adamw_" in names
    assert "aten::mm" in (folder / "rank-0.txt").read_text()
    assert any(str(folder) in e.text for e in events if isinstance(e, NoticeEvent))
    train(config, [store.path], tmp_path / "plain")
    assert_same_runs(tmp_path / "run", tmp_path / "plain")


def test_operations_are_counted_of_what_is_not_padding(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    from align.flop import connector_step_flop, find_language_model

    config = make_config("train.batch_size=5")
    run = assemble(config, [store.path], tmp_path)
    batch = run.loader("train").load(run.sampler().step(0))
    llm = find_language_model(config.llm.name)
    connector = connector_step_flop(config.connector, [(16, 48)], 64)
    supervised = (batch.labels[:, 1:] != -100).sum(1).tolist()
    expected = sum(
        llm.frozen_step_flop(tokens, learned) + connector
        for tokens, learned in zip(batch.lengths, supervised, strict=True)
    )
    assert run.flop(batch) == pytest.approx(expected, rel=1e-9)
    assert batch.lengths == [int(row.ne(0).sum()) for row in batch.input_ids]
    run.close()
    events: list[Event] = []
    train(config, [store.path], tmp_path / "run", on_event=events.append)
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert all(event.flop_per_s and event.flop_per_s > 0 for event in steps)
    assert all(event.mfu is None for event in steps)  # a CPU's peak is not in a table
    assert torch.cuda.is_available() or steps[0].memory_bytes == 0
