"""A run of six steps on the small world, and a copy of it for each test to write into."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from align.config import load_config
from align.run import Run, load_run
from align.trainer import train
from featcache.store import Store

SETTINGS = (
    "data.eval_ratio=0.4",
    "connector.num_latents=4",
    "connector.depth=1",
    "connector.heads=2",
    "connector.head_dim=16",
    "optim.lr=3e-3",
    "train.device=cpu",
    "train.steps=6",
    "train.batch_size=4",
    "train.log_every=1",
    "train.eval_every=3",
    "train.sample_every=3",
    "eval.max_new_tokens=8",
)


@pytest.fixture(scope="session")
def trained(world: Path, store: Store) -> Path:
    """A finished run with sample captions; not to be written into."""
    out = world / "trained"
    train(load_config(None, [f"llm.name={world / 'qwen3'}", *SETTINGS]), [store.path], out)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    """The trained run in a folder of the test's own."""
    return load_run(shutil.copytree(trained, tmp_path / "run"))
