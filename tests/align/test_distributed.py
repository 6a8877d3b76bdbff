"""Training on two processes that torchrun starts: the same run as one, whichever way it is cut."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import align
from align.checkpoint import find_checkpoint
from align.config import RunConfig, save_config
from align.run import absolute_paths
from align.tracking import read_metrics
from align.trainer import train
from featcache.store import Store
from tests.align.conftest import save_qwen3, write_jsonl

MakeConfig = Callable[..., RunConfig]
ROOT = Path(align.__file__).parents[1]
TOLERANCE = 1e-6
"""Of losses, fp32, relative. Measured: 1.5e-7 in 6 steps."""

WHOLE = ("train.batch_size=8",)
"""Of one process: what two take 4 of."""
HALF = ("train.batch_size=4",)
RUNS: dict[str, tuple[str, ...]] = {
    "two": HALF,
    "again": HALF,
    "accumulated": ("train.batch_size=2", "train.grad_accum=2"),
    "budget": (*HALF, "train.batch_tokens=60"),
    "sharded": (*HALF, "train.shard_llm=true"),
    "sharded_tied": (*HALF, "train.shard_llm=true"),
    "sharded_budget": (*HALF, "train.shard_llm=true", "train.batch_tokens=60"),
    "packed": (*HALF, "train.packing=true", "train.batch_tokens=60"),
    "sharded_all": (
        *HALF,
        "train.shard_llm=true",
        "train.packing=true",
        "train.batch_tokens=60",
        "train.checkpoint_activations=true",
    ),
    "dropout": (*HALF, "connector.dropout=0.2"),
    "dropout_again": (*HALF, "connector.dropout=0.2"),
}


def torchrun(*command: str) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [sys.executable, *launch, *command]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 samples, of which every fifth has no image."""
    lines = [json.loads(line) for line in (world / "captions.jsonl").read_text().splitlines()]
    for line in lines[::5]:
        line["images"] = []
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", lines)


@pytest.fixture(scope="module")
def runs(store: Store, world: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of `RUNS` under its name, trained by two ranks; whole/ by this process; tied/ too;
    begun/, of which this process did the first half, and ended/, of which it did the second."""
    root = tmp_path_factory.mktemp("ranks")

    def config(*overrides: str) -> RunConfig:
        from align.config import load_config

        return absolute_paths(
            load_config(
                None,
                [
                    f"llm.name={world / 'qwen3'}", f"data.files=[{data}]", "data.text_only=train",
                    f"data.images={world / 'images'}", "data.eval_ratio=0.2",
                    "connector.num_latents=4", "connector.depth=1", "connector.heads=2",
                    "connector.head_dim=16", "optim.lr=3e-3", "train.device=cpu", "train.steps=6",
                    "train.log_every=1", "train.eval_every=3", "train.sample_every=2",
                    "train.samples=2", "eval.max_new_tokens=4", *overrides,
                ],
            )
        )  # fmt: skip

    def begin(name: str, *overrides: str) -> list[str]:
        file = root / f"{name}.yaml"
        save_config(config(*overrides), file)
        return [str(file), str(store.path), str(root / name)]

    stop_early: list[Any] = []

    def stop_at_three(event: Any) -> None:
        stop_early.append(event)
        if getattr(event, "kind", "") == "checkpoint":
            raise InterruptedError

    save_qwen3(root / "llm", tie_word_embeddings=True)
    tied = f"llm.name={root / 'llm'}"
    train(config(*WHOLE), [store.path], root / "whole")
    train(config(*WHOLE, tied), [store.path], root / "tied")
    with pytest.raises(InterruptedError):
        train(config(*WHOLE, "train.save_every=3"), [store.path], root / "begun", False,
              stop_at_three)  # fmt: skip
    jobs = [
        begin(name, *overrides, *([tied] if name.endswith("tied") else []))
        for name, overrides in RUNS.items()
    ]
    jobs.append(begin("ended", *HALF, "train.save_every=3"))
    jobs.append(begin("begun", *WHOLE, "train.save_every=3"))
    (root / "jobs.json").write_text(json.dumps(jobs))
    worker = str(Path(__file__).with_name("ranks_worker.py"))
    done = subprocess.run(
        torchrun(worker, str(root / "jobs.json")),
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(find_checkpoint(root / "ended/checkpoints").path)
    train(config(*HALF, "train.save_every=3"), [store.path], root / "ended", resume=True)
    return root


def losses(run: Path, kind: str = "train") -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(run / "checkpoints").path / "connector.safetensors")


@pytest.mark.parametrize("name", [name for name in RUNS if "dropout" not in name])
def test_the_same_losses_as_one_process(runs: Path, name: str) -> None:
    whole = runs / ("tied" if name.endswith("tied") else "whole")
    for kind in ("train", "eval"):
        assert losses(runs / name, kind) == pytest.approx(losses(whole, kind), TOLERANCE)
    assert len(losses(runs / name)) == 6
    for key, tensor in weights(whole).items():
        # The true gradient of a key's bias is 0; AdamW makes steps of what rounding leaves of it.
        if not key.endswith("in_proj_bias"):
            torch.testing.assert_close(weights(runs / name)[key], tensor, rtol=1e-4, atol=2e-6)


def test_a_run_of_ranks_is_repeated_bit_for_bit(runs: Path) -> None:
    for one, other in (("two", "again"), ("dropout", "dropout_again")):
        assert losses(runs / one) == losses(runs / other)
        assert all(torch.equal(t, weights(runs / other)[k]) for k, t in weights(runs / one).items())
    assert losses(runs / "dropout") != losses(runs / "two")


def test_it_is_resumed_by_another_number_of_ranks(runs: Path) -> None:
    """By one and then two, or the other way: a step keeps its 8 samples, and the order goes on."""
    for name, batch_size in (("begun", 8), ("ended", 4)):
        assert losses(runs / name) == pytest.approx(losses(runs / "whole"), TOLERANCE)
        state = find_checkpoint(runs / name / "checkpoints").state()
        assert (state["step"], state["step_size"]) == (6, 8)
        assert state["config"]["train"]["batch_size"] == batch_size


def test_only_one_rank_writes_the_folder(runs: Path) -> None:
    lines = read_metrics(runs / "two/metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 7))
    assert len([line for line in lines if line["kind"] == "samples"]) == 3
    info = json.loads((runs / "two/run.json").read_text())
    assert (info["status"], info["step"]) == ("finished", 6)


@pytest.fixture
def long_run(store: Store, make_config: MakeConfig, tmp_path: Path) -> list[str]:
    """A command of the program itself, that trains for minutes."""
    file = tmp_path / "config.yaml"
    save_config(make_config("train.steps=100000", "train.eval_every=0", "train.save_every=0"), file)
    run = str(tmp_path / "run")
    command = ["train", "--features", str(store.path), "--config", str(file), "--out", run]
    return ["-m", "cli.align", *command, "--json"]


def start(command: list[str], run: Path, **options: Any) -> subprocess.Popen[str]:
    """A training that has logged some steps."""
    process = subprocess.Popen(
        command, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **options,
    )  # fmt: skip
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_it(
    long_run: list[str], tmp_path: Path, sent: signal.Signals
) -> None:
    process = start([sys.executable, *long_run], tmp_path / "run")
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + sent, err
    document = json.loads(out.splitlines()[-1])
    step = document["step"]
    assert document["stopped_by"] == sent.name
    assert f"stopped by {sent.name} with a checkpoint; go on with --resume" in err
    assert find_checkpoint(tmp_path / "run/checkpoints").step == step
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "stopped"
    assert losses(tmp_path / "run")[-1] == document["loss"]


@pytest.mark.parametrize("whom", ["agent", "all"])
def test_every_rank_stops_at_the_same_step(long_run: list[str], tmp_path: Path, whom: str) -> None:
    """As when a machine is taken back. Slurm tells every process, torchrun its ranks once more."""
    process = start(torchrun(*long_run), tmp_path / "run", start_new_session=True)
    if whom == "agent":
        process.send_signal(signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert "stopped by SIGTERM with a checkpoint" in err
    done = find_checkpoint(tmp_path / "run/checkpoints").step
    assert done == len(losses(tmp_path / "run")) > 0
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "stopped"


def test_a_rank_that_dies_ends_the_job(long_run: list[str], tmp_path: Path) -> None:
    process = start(torchrun(*long_run, "train.shard_llm=true"), tmp_path / "run")
    listed = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "cli.align"], capture_output=True, text=True
    )
    ranks = [int(line) for line in listed.stdout.split()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "error: another rank of this training has ended; its own message says why" in err
    assert time.monotonic() - killed < 30


def test_ranks_that_would_begin_at_different_steps_are_refused(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    """Where --out is not shared by all machines, one may find a checkpoint that others do not."""
    config = make_config("train.batch_size=2", "train.steps=2")
    file = tmp_path / "config.yaml"
    save_config(config, file)
    train(config, [store.path], tmp_path / "run-0")
    worker = Path(__file__).with_name("ranks_worker.py")
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([[str(file), str(store.path), str(tmp_path / "run-{rank}")]]))
    done = subprocess.run(
        torchrun(str(worker), str(jobs)),
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert (
        "rank 1 would not begin where rank 0 does: step: 2 -> 0; step_size: 2 -> 4" in done.stderr
    )
