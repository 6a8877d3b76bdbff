"""A run of six steps on the small world, and a copy of it for each test to write into."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from align.config import RunConfig
from align.run import Run, load_run
from align.trainer import train
from featcache.store import Store


@pytest.fixture(scope="session")
def trained(world: Path, store: Store, make_config: Callable[..., RunConfig]) -> Path:
    """A finished run with sample captions; not to be written into."""
    out = world / "trained"
    config = make_config(
        "data.eval_ratio=0.4",
        "train.sample_every=3",
        "train.save_every=500",
        "eval.max_new_tokens=8",
    )
    train(config, [store.path], out)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    """The trained run in a folder of the test's own."""
    return load_run(shutil.copytree(trained, tmp_path / "run"))
