"""Runs on mixtures of data: they train, resume to themselves, and refuse data that has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.checkpoint import find_checkpoint
from align.config import RunConfig
from align.errors import CheckpointError, RunError
from align.run import load_run
from align.tracking import Event, NoticeEvent, StepEvent
from align.trainer import train
from featcache.store import Store

Mixed = tuple[RunConfig, Path, list[dict[str, Any]]]


@pytest.fixture
def mixed(
    make_config: Callable[..., RunConfig], tmp_path: Path, jsonl: Callable[..., Path]
) -> Mixed:
    """A config with two weighted files, half of whose samples are pairs; a file, and its lines."""
    files = []
    for name, start in (("a", 0), ("b", 20)):
        some = [
            {"id": f"{name}{i}", "images": [f"{i:03d}.png"], "caption": f"square {i}"}
            for i in range(start, start + 20)
        ]
        files.append(jsonl(tmp_path / f"{name}.jsonl", some))
    config = make_config(
        f"data.files=[{files[0]},{files[1]}]",
        "data.weights=[0.5,2]",
        "data.multi_image_ratio=0.5",
        "data.stratify=length",
    )
    return config, files[1], some


class StopError(Exception):
    """Thrown out of a callback, as Ctrl-C would be."""


def stop_after_three(event: Event) -> None:
    if isinstance(event, StepEvent) and event.step == 3:
        raise StopError


def test_it_trains_and_resumes_to_itself(mixed: Mixed, store: Store, tmp_path: Path) -> None:
    config, _, _ = mixed
    told: list[Event] = []
    train(config, [store.path], tmp_path / "whole", on_event=told.append)
    with pytest.raises(StopError):
        train(config, [store.path], tmp_path / "cut", on_event=stop_after_three)
    train(config, [store.path], tmp_path / "cut", resume=True)
    whole, cut = (
        load_file(find_checkpoint(tmp_path / run / "checkpoints").path / "connector.safetensors")
        for run in ("whole", "cut")
    )
    assert whole and all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())

    splits = load_run(tmp_path / "whole").splits
    assert len(splits.val) == 8 and {len(s.record.images) for s in splits.val} == {1}
    pairs = [sample for sample in splits.train if len(sample.record.images) == 2]
    assert len(pairs) == splits.mixture.pairs > 0
    text = next(e.text for e in told if isinstance(e, NoticeEvent) and "epoch" in e.text)
    assert text == f"an epoch is made of {splits.mixture}"
    info = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert info["samples"]["mixture"]["pairs"] == len(pairs)
    assert [each["weight"] for each in info["samples"]["mixture"]["files"]] == [0.5, 2]


def test_what_resume_refuses(
    mixed: Mixed, store: Store, tmp_path: Path, jsonl: Callable[..., Path]
) -> None:
    config, file, some = mixed
    run = tmp_path / "run"
    train(config, [store.path], run)
    for name, other in (
        ("weights", [1.0, 2.0]),
        ("multi_image_ratio", 0.25),
        ("stratify", "none"),
        ("text_only", "train"),
        ("max_images", 3),
    ):
        before = getattr(config.data, name)
        setattr(config.data, name, other)
        with pytest.raises(RunError, match=f"other settings: data.{name}.*: .* -> "):
            train(config, [store.path], run, resume=True)
        setattr(config.data, name, before)
    # Whichever record this is, it is trained on twice or held out.
    some[7]["caption"] = "another caption"
    jsonl(file, some)
    with pytest.raises(CheckpointError, match=r"other training samples: (digest|division)"):
        train(config, [store.path], run, resume=True)
