"""Checkpoints: whole or not there, kept or pruned, and refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from align.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_connector,
    load_optimizer,
    prune,
    remove_partial,
    save_checkpoint,
)
from align.connectors.resampler import ResamplerConfig
from align.errors import CheckpointError
from align.optim import OptimConfig, build_optimizer


def make(width: int = 12, out_width: int = 20, **changes: object) -> nn.Module:
    settings = {"num_latents": 3, "heads": 2, "head_dim": 4, "depth": 1, **changes}
    return ResamplerConfig(**settings).build([(4, width)], out_width)  # type: ignore[arg-type]


def trained() -> tuple[nn.Module, torch.optim.AdamW]:
    connector = make()
    optimizer = build_optimizer(OptimConfig(), connector)
    for _ in range(2):
        connector(torch.randn(2, 4, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return connector, optimizer


def test_everything_comes_back(tmp_path: Path) -> None:
    connector, optimizer = trained()
    saved = save_checkpoint(tmp_path, 2, connector, optimizer, {"eval_loss": 1.5})

    other = make()
    fresh = build_optimizer(OptimConfig(), other)
    load_connector(saved, other)
    load_optimizer(saved, other, fresh)
    state = find_checkpoint(tmp_path).state()
    assert (state["step"], state["eval_loss"]) == (2, 1.5)
    for a, b in zip(connector.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for moment, value in optimizer.state[a].items():
            assert torch.equal(value, fresh.state[b][moment])
    assert {file.name for file in saved.path.iterdir()} == {
        "connector.safetensors",
        "optimizer.safetensors",
        "state.json",
    }


def test_partly_written_ones_are_not_there(tmp_path: Path) -> None:
    connector, optimizer = trained()
    save_checkpoint(tmp_path, 2, connector, optimizer, {})
    torn = tmp_path / ".partial-step-00000004"
    torn.mkdir()
    (torn / "connector.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000006").mkdir()  # e.g. a copy that was cut short
    assert [c.step for c in list_checkpoints(tmp_path)] == [2]
    remove_partial(tmp_path)
    assert not torn.exists()
    save_checkpoint(tmp_path, 4, connector, optimizer, {})
    save_checkpoint(tmp_path, 6, connector, optimizer, {})
    assert [c.step for c in list_checkpoints(tmp_path)] == [2, 4, 6]


def test_full_disk_keeps_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connector, optimizer = trained()
    save_checkpoint(tmp_path, 2, connector, optimizer, {})

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(CheckpointError, match=r"step-00000004: cannot be written: .*No space left"):
        save_checkpoint(tmp_path, 4, connector, optimizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_keep_the_newest_and_the_best(tmp_path: Path) -> None:
    connector, optimizer = trained()
    for step, loss in enumerate([3.0, 1.0, 2.0, 2.5], start=1):
        state = {"eval_loss": loss, "eval_step": step}
        save_checkpoint(tmp_path, step, connector, optimizer, state)
    assert find_checkpoint(tmp_path, "best").step == 2
    prune(tmp_path, keep=2, keep_best=True)
    assert [c.step for c in list_checkpoints(tmp_path)] == [2, 3, 4]
    prune(tmp_path, keep=1, keep_best=False)
    assert [c.step for c in list_checkpoints(tmp_path)] == [4]
    prune(tmp_path, keep=0, keep_best=False)
    assert [c.step for c in list_checkpoints(tmp_path)] == [4]


def test_a_loss_of_another_step_makes_no_best(tmp_path: Path) -> None:
    connector, optimizer = trained()
    save_checkpoint(tmp_path, 4, connector, optimizer, {"eval_loss": 2.0, "eval_step": 4})
    save_checkpoint(tmp_path, 5, connector, optimizer, {"eval_loss": 1.0, "eval_step": 3})
    assert find_checkpoint(tmp_path, "best").step == 4
    prune(tmp_path, keep=1, keep_best=True)
    assert [c.step for c in list_checkpoints(tmp_path)] == [4, 5]


def test_a_copy_beside_the_checkpoints_is_left_alone(tmp_path: Path) -> None:
    connector, optimizer = trained()
    saved = save_checkpoint(tmp_path, 6, connector, optimizer, {})
    copy = shutil.copytree(saved.path, tmp_path / "step-00000006-copy")
    assert [c.step for c in list_checkpoints(tmp_path)] == [6]
    prune(tmp_path, keep=1, keep_best=False)
    assert copy.is_dir()


def test_a_kill_while_pruning_leaves_no_half_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connector, optimizer = trained()
    for step in (2, 4):
        save_checkpoint(tmp_path, step, connector, optimizer, {})
    remove = shutil.rmtree

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            (path / "connector.safetensors").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        prune(tmp_path, keep=1, keep_best=False)
    assert shutil.rmtree is remove
    assert [c.step for c in list_checkpoints(tmp_path)] == [4]
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_asking_for_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint; train first"):
        find_checkpoint(tmp_path)
    connector, optimizer = trained()
    save_checkpoint(tmp_path, 5, connector, optimizer, {"eval_loss": None})
    assert find_checkpoint(tmp_path, "5").step == find_checkpoint(tmp_path, "step-00000005").step
    with pytest.raises(CheckpointError, match="no checkpoint 7; there are last, best and 5"):
        find_checkpoint(tmp_path, "7")
    with pytest.raises(
        CheckpointError, match="no checkpoint was evaluated at its own step; use last"
    ):
        find_checkpoint(tmp_path, "best")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"out_width": 24}, r"projector.0.bias is \(80,\), this run's is \(96,\); use the encoder"),
        ({"width": 16}, r"proj_in.weight is \(8, 12\), this run's is \(8, 16\)"),
        ({"depth": 2}, r"the checkpoint has no blocks.1"),
        ({"vision_norm": True}, r"the checkpoint has no vision_norm"),
    ],
)
def test_another_connectors_weights_are_refused(
    tmp_path: Path, other: dict[str, int], message: str
) -> None:
    connector, optimizer = trained()
    saved = save_checkpoint(tmp_path, 2, connector, optimizer, {})
    with pytest.raises(CheckpointError, match=message):
        load_connector(saved, make(**other))  # type: ignore[arg-type]


def test_damage_is_named(tmp_path: Path) -> None:
    connector, optimizer = trained()
    saved = save_checkpoint(tmp_path, 2, connector, optimizer, {})
    weights = saved.path / "connector.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(
        CheckpointError, match=r"connector.safetensors: .*; delete .*/step-00000002 and use --r"
    ):
        load_connector(saved, make())
    state = saved.path / "state.json"
    state.write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads 3"):
        saved.state()
    state.write_text("{")
    with pytest.raises(
        CheckpointError, match=r"state.json: .*; delete .*/step-00000002 and use --resume"
    ):
        saved.state()
