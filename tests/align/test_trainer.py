"""Training through the real trainer: what it writes, how it resumes, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import align
import featcache
from align.checkpoint import find_checkpoint, list_checkpoints
from align.config import RunConfig, config_dict, load_config, save_config
from align.data.sampling import StepSampler
from align.errors import AlignError, CheckpointError, DataError, RunError
from align.evaluate import evaluate
from align.resume import FREE_TO_CHANGE, is_free_to_change
from align.run import RunFolder, absolute_paths, assemble, load_run
from align.tracking import (
    CheckpointEvent,
    EvalEvent,
    Event,
    NoticeEvent,
    SampleEvent,
    StepEvent,
    read_metrics,
)
from align.trainer import evaluate_loss, train
from featcache.errors import ConfigError, CorruptStoreError, FingerprintMismatch
from featcache.extract import ExtractOptions, extract
from featcache.fingerprint import flatten
from featcache.store import Store
from tests.align.conftest import save_siglip

MakeConfig = Callable[..., RunConfig]
TIMES = ("samples_per_s", "tokens_per_s", "flop_per_s", "mfu", "data_wait_ratio", "seconds")


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    last = find_checkpoint(run / "checkpoints").path
    return {
        f"{file}.{name}": tensor
        for file in ("connector", "optimizer")
        for name, tensor in load_file(last / f"{file}.safetensors").items()
    }


def assert_same_runs(a: Path, b: Path) -> None:
    """Bit for bit: every logged loss, every weight, every moment."""
    assert metrics(a) == metrics(b)
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


class StopError(Exception):
    """Thrown out of a callback, as Ctrl-C would be."""


def stop_after(step: int) -> Callable[[Event], None]:
    def on_event(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == step:
            raise StopError

    return on_event


def test_a_run_and_its_folder(store: Store, make_config: MakeConfig, tmp_path: Path) -> None:
    events: list[Event] = []
    config = make_config(
        "train.steps=20",
        "train.save_every=8",
        "train.sample_every=10",
        "train.samples=2",
        "eval.max_new_tokens=5",
    )
    result = train(config, [store.path], tmp_path / "run", on_event=events.append)
    steps = [e for e in events if isinstance(e, StepEvent)]
    evals = [e for e in events if isinstance(e, EvalEvent)]
    assert [e.step for e in steps] == list(range(1, 21))
    assert [e.step for e in evals] == [3, 6, 9, 12, 15, 18, 20]
    assert steps[-1].loss < steps[0].loss - 0.3
    assert evals[-1].loss < evals[0].loss
    assert all(0 <= e.data_wait_ratio <= 1 and e.samples_per_s > 0 for e in steps)
    assert [e.step for e in events if isinstance(e, CheckpointEvent)] == [8, 16, 20]
    assert (result.step, result.loss, result.eval_loss) == (20, steps[-1].loss, evals[-1].loss)
    told = [e.text for e in events if isinstance(e, NoticeEvent)]
    assert told[0].startswith("features are read through the page cache: ")
    assert told[1:] == ["32 samples to train on, 8 held out, 20 steps of 4"]
    samples = [e for e in events if isinstance(e, SampleEvent)]
    assert [e.step for e in samples] == [10, 20]
    assert all(len(e.captions) == 2 and e.captions[0].reference for e in samples)

    folder = RunFolder(tmp_path / "run")
    data = replace(config.data, files=list(store.source["data"]), images=store.source["images"])
    assert load_config(folder.config) == replace(config, data=data)
    info = folder.read_info()
    assert (info["status"], info["step"]) == ("finished", 20)
    (file,) = store.source["data"]
    share = {"file": file, "weight": 1.0, "records": 32, "samples": 32}
    assert info["samples"] == {
        "train": 32,
        "val": 8,
        "found": 40,
        "left_out": {},
        "mixture": {"files": [share], "pairs": 0},
    }
    assert [c.step for c in list_checkpoints(folder.checkpoints)] == [16, 20]
    kinds = [line["kind"] for line in read_metrics(folder.metrics)]
    assert (kinds.count("train"), kinds.count("eval"), kinds.count("samples")) == (20, 7, 2)

    run = load_run(tmp_path / "run")
    assert (run.step, run.model.training) == (20, False)
    assert evaluate_loss(run, 1024).loss == evals[-1].loss
    assert load_run(tmp_path / "run", "16").step == 16


def test_gradient_accumulation_is_the_same_step(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    """8 x 1, 4 x 2 and 1 x 8 (samples x micro-batches) agree to fp32 rounding."""
    for size, accum in ((8, 1), (4, 2), (1, 8)):
        train(
            make_config(f"train.batch_size={size}", f"train.grad_accum={accum}", "optim.eps=1e-3"),
            [store.path],
            tmp_path / f"{accum}",
        )
    losses = [
        torch.tensor([line["loss"] for line in metrics(tmp_path / name) if line["kind"] == "train"])
        for name in ("1", "2", "8")
    ]
    # Measured worst case over 6 steps: 2.4e-7 of the loss, 3.0e-8 of a weight. Adam's default eps
    # would turn the rounding of a gradient near 0 into a whole step of the weight.
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=2e-6, atol=0)
    whole = load_file(find_checkpoint(tmp_path / "1/checkpoints").path / "connector.safetensors")
    cut = load_file(find_checkpoint(tmp_path / "8/checkpoints").path / "connector.safetensors")
    for name in whole:
        torch.testing.assert_close(whole[name], cut[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_resume_is_bit_for_bit(
    store: Store, make_config: MakeConfig, tmp_path: Path, stop: int
) -> None:
    """Stopped before the first checkpoint, right at one, and between two; dropout on."""
    config = make_config("connector.dropout=0.1", "train.grad_accum=2", "train.steps=7")
    train(config, [store.path], tmp_path / "whole")
    with pytest.raises(StopError):
        train(config, [store.path], tmp_path / "cut", on_event=stop_after(stop))
    torn = tmp_path / "cut/checkpoints/.partial-step-00000006"
    torn.mkdir(parents=True)
    (torn / "connector.safetensors").write_bytes(b"half")
    with (tmp_path / "cut/metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    torch.manual_seed(999)  # whatever the process did in between
    result = train(config, [store.path], tmp_path / "cut", resume=True)
    assert result.step == 7
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    assert not torn.exists()


def test_a_windowed_run_resumes_bit_for_bit(
    world: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    """5 shards of 8 in windows of 2, stopped in the first epoch and in the second (of 8 steps)."""
    data = extract_in_order(world, tmp_path, reverse=False)
    config = make_config(f"data.files=[{data}]", "train.shuffle_window=2", "train.steps=12")
    store = tmp_path / "False.zarr"
    train(config, [store], tmp_path / "whole")
    for stop in (5, 11):
        cut = tmp_path / f"cut{stop}"
        with pytest.raises(StopError):
            train(config, [store], cut, on_event=stop_after(stop))
        train(config, [store], cut, resume=True)
        assert_same_runs(tmp_path / "whole", cut)
    shutil.copytree(store, tmp_path / "copy.zarr")
    train(config, [tmp_path / "copy.zarr"], cut, resume=True)

    shuffled = replace(config, train=replace(config.train, shuffle_window=0))
    train(shuffled, [store], tmp_path / "global")
    assert metrics(tmp_path / "global") != metrics(tmp_path / "whole")


def test_other_shards_or_windows_are_refused(
    world: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    """They order the samples; a global shuffle does not care where these lie."""
    data = extract_in_order(world, tmp_path, reverse=False)
    extract_in_order(world, tmp_path, reverse=True)
    there, other = tmp_path / "False.zarr", tmp_path / "True.zarr"
    for window in (0, 2):
        config = make_config(f"data.files=[{data}]", f"train.shuffle_window={window}")
        train(config, [there], tmp_path / f"{window}")
    refused = r"lie in other shards of .*True.zarr than .* shards: .*; use that store"
    with pytest.raises(CheckpointError, match=refused):
        train(config, [other], tmp_path / "2", resume=True)
    with pytest.raises(RunError, match=r"other settings: train.shuffle_window: 0 -> 2; give"):
        train(config, [there], tmp_path / "0", resume=True)
    config = make_config(f"data.files=[{data}]")
    train(config, [other], tmp_path / "0", resume=True)


def test_a_run_of_before_there_were_windows_resumes(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    train(make_config(), [store.path], tmp_path / "whole")
    with pytest.raises(StopError):
        train(make_config(), [store.path], tmp_path / "old", on_event=stop_after(3))
    config = tmp_path / "old/config.yaml"
    kept = [line for line in config.read_text().splitlines() if "shuffle_window" not in line]
    config.write_text("\n".join(kept))
    train(make_config(), [store.path], tmp_path / "old", resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "old")


def extract_in_order(world: Path, folder: Path, *, reverse: bool) -> Path:
    """A store of 5 shards, by name or the other way round; returns the data in the first order."""
    lines = (world / "captions.jsonl").read_text().splitlines(keepends=True)
    data = folder / f"{reverse}.jsonl"
    data.write_text("".join(reversed(lines) if reverse else lines))
    extract(
        ExtractOptions(
            model=str(world / "siglip"),
            data=(data,),
            image_root=world / "images",
            out=folder / f"{reverse}.zarr",
            shard_images=8,
        )
    )
    return data


def test_killed_at_any_moment(store: Store, make_config: MakeConfig, tmp_path: Path) -> None:
    """A process that is killed without warning again and again arrives at the same bytes."""
    config = make_config("train.steps=60", "connector.dropout=0.1", "train.save_every=5")
    train(config, [store.path], tmp_path / "whole")
    save_config(config, tmp_path / "config.yaml")
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from align.config import load_config\n"
        "from align.trainer import train\n"
        "train(load_config(sys.argv[1]), [sys.argv[2]], sys.argv[3], resume=True)\n"
    )
    command = [
        sys.executable,
        "-c",
        script,
        str(tmp_path / "config.yaml"),
        str(store.path),
        str(tmp_path / "killed"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(align.__file__).parents[1])}
    checkpoints = tmp_path / "killed/checkpoints"
    for kill in range(2):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        before = len(read_lines(tmp_path / "killed"))
        deadline = time.monotonic() + 60
        # Once it has logged some steps of its own, at a moment that differs from kill to kill.
        while process.poll() is None and time.monotonic() < deadline:
            if checkpoints.exists() and len(read_lines(tmp_path / "killed")) > before + 7 * kill:
                break
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")


def read_lines(run: Path) -> list[str]:
    file = run / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def test_a_finished_run_resumes_to_itself(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    train(make_config(), [store.path], tmp_path / "run")
    before = metrics(tmp_path / "run")
    result = train(make_config(), [store.path], tmp_path / "run", resume=True)
    assert result.step == 6
    assert result.eval_loss is not None
    assert metrics(tmp_path / "run") == before


def test_what_resume_refuses(
    store: Store, make_config: MakeConfig, tmp_path: Path, world: Path
) -> None:
    run = tmp_path / "run"
    train(make_config(), [store.path], run)
    with pytest.raises(RunError, match=r"run: already holds a run; give --resume or another --out"):
        train(make_config(), [store.path], run)
    with pytest.raises(RunError, match=r"other settings: optim.lr: 0.003 -> 0.1; give the same"):
        train(make_config("optim.lr=0.1", "train.log_every=3"), [store.path], run, resume=True)
    shorter = tmp_path / "captions.jsonl"
    text = (world / "captions.jsonl").read_text()
    changed = make_config(f"data.files=[{shorter}]")
    shorter.write_text(text)
    train(changed, [store.path], tmp_path / "other")
    shorter.write_text("".join(text.splitlines(keepends=True)[:-9]))
    with pytest.raises(CheckpointError, match=r"other training samples: train: 32 -> 25; digest:"):
        train(changed, [store.path], tmp_path / "other", resume=True)


def test_another_encoders_store_is_refused(
    store: Store, make_config: MakeConfig, tmp_path: Path, extract_again: Callable[..., Path]
) -> None:
    train(make_config(), [store.path], tmp_path / "run")
    other = extract_again(tmp_path, seed=7)
    with pytest.raises(FingerprintMismatch, match=r"encoder.weights: .* in .*step-00000006"):
        load_run(tmp_path / "run", features=[other])
    with pytest.raises(FingerprintMismatch):
        train(make_config(), [other], tmp_path / "run", resume=True)


def test_an_encoder_of_another_width_is_refused(
    store: Store, world: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    train(make_config(), [store.path], tmp_path / "run")
    save_siglip(tmp_path / "narrow", hidden_size=32)
    narrow = tmp_path / "narrow.zarr"
    extract(
        ExtractOptions(
            model=str(tmp_path / "narrow"),
            data=(world / "captions.jsonl",),
            image_root=world / "images",
            out=narrow,
        )
    )
    with pytest.raises(FingerprintMismatch) as caught:
        load_run(tmp_path / "run", features=[narrow])
    message = str(caught.value)
    step = tmp_path / "run/checkpoints/step-00000006"
    assert f"encoder.width: 48 in {step}, 32 in {narrow}" in message
    assert message.endswith(
        "use the store that the run was trained on, or one of the same encoder and codec"
    )


def test_another_language_model_is_refused(
    store: Store,
    make_config: MakeConfig,
    tmp_path: Path,
    save_llm: Callable[..., None],
) -> None:
    train(make_config(), [store.path], tmp_path / "run")
    save_llm(tmp_path / "wide", hidden_size=96)
    with pytest.raises(CheckpointError) as caught:
        load_run(tmp_path / "run", overrides=[f"llm.name={tmp_path / 'wide'}"])
    before = run_llm(tmp_path / "run")
    assert str(caught.value).endswith(
        f"step-00000006: trained with another model: its connector makes vectors of width 64 "
        f"({before}), {tmp_path / 'wide'} takes 96; use llm.name={before}"
    )
    save_llm(tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(
        CheckpointError, match=r"another model: num_hidden_layers: 2 -> 3; .*; use llm\.name="
    ):
        load_run(tmp_path / "run", overrides=[f"llm.name={tmp_path / 'deep'}"])


def test_another_tokenizer_is_refused(
    store: Store,
    make_config: MakeConfig,
    tmp_path: Path,
    save_llm: Callable[..., None],
) -> None:
    """The same weights under other words; and a folder whose tokenizer has changed since."""
    save_llm(tmp_path / "llm")
    train(make_config(f"llm.name={tmp_path / 'llm'}"), [store.path], tmp_path / "run")
    file = tmp_path / "llm" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["another word"] = vocabulary.pop("!")
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(
        CheckpointError,
        match=r"another tokenizer: tokenizer\.digest: '\w+' -> '\w+'; what .*llm holds has changed",
    ):
        load_run(tmp_path / "run")


def run_llm(run: Path) -> str:
    """The language model that a run was trained with."""
    return str(RunFolder(run).read_info()["llm"]["name"])


def test_a_moved_run_and_store_load(store: Store, make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config(), [store.path], tmp_path / "run")
    moved_store = shutil.copytree(store.path, tmp_path / "moved.zarr")
    moved_run = (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert load_run(moved_run, features=[moved_store]).step == 6


def test_a_loss_that_is_not_finite_stops(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        "optim.lr=1e30",
        "optim.clip=0",
        "train.log_every=50",
        "train.steps=9",
        "train.save_every=5",
        "train.eval_every=0",
    )
    with pytest.raises(
        AlignError, match=r"step \d: loss nan, .* its samples are s\d+, .*another --out$"
    ):
        train(config, [store.path], tmp_path / "run")
    assert list_checkpoints(tmp_path / "run/checkpoints") == []
    document = json.loads((tmp_path / "run/not_finite.jsonl").read_text())
    assert len(document["ids"]) == 4
    # The cure, as it was told.
    assert train(make_config("optim.lr=1e-3"), [store.path], tmp_path / "again").step == 6


def damage(store: Store, key: str, value: bytes = b"\x00\x7e") -> Path:
    """Overwrites an image's stored features in the shard file, the checksums not; returns the file.

    value: fp16, little-endian; NaN unless told.
    """
    (row,) = store.rows([key]).tolist()
    codes, _ = store.placements(store.layers[0])
    shard, slot = divmod(row, codes.rows_per_file)
    file = codes.paths(shard)
    with file.open("r+b") as stream:
        stream.seek(slot * codes.pitch_bytes)
        stream.write(value * (codes.row_bytes // 2))
    return file


def without_checksums(make_config: MakeConfig, *overrides: str) -> RunConfig:
    """A config under which damaged features are read as they are."""
    return make_config(*overrides, "train.verify_features=never")


@pytest.mark.parametrize("steps", ["train.log_every=1", "train.log_every=50"])
def test_damaged_features_are_told_from_a_diverging_run(
    store: Store, make_config: MakeConfig, tmp_path: Path, steps: str
) -> None:
    """NaN on disk is not blamed on the learning rate, and mended bytes are the cure."""
    damaged = shutil.copytree(store.path, tmp_path / "damaged.zarr")
    config = without_checksums(make_config, "data.eval_ratio=0", "train.steps=10", steps)
    train(config, [store.path], tmp_path / "whole")
    run = tmp_path / "run"
    sampler = StepSampler(40, 4, config.train.seed)
    samples = assemble(config, [store.path], run).splits.train
    third = [samples[i].record for i in sampler.step(2).tolist()]
    file = damage(featcache.open(damaged), third[1].images[0])

    with pytest.raises(DataError) as caught:
        train(config, [damaged], run)
    key = third[1].images[0]
    assert str(caught.value) == (
        "step 3: loss nan, gradient norm nan are not finite, as the features of "
        f"{key} in {damaged} are not (all in {run / 'not_finite.jsonl'}); the store is damaged: "
        f"run `featcache verify {damaged} --repair`, then --resume"
    )
    document = json.loads((run / "not_finite.jsonl").read_text())
    ids = [record.id for record in third]
    nan = {"loss": "nan", "grad_norm": "nan"}
    assert document == {"step": 3, **nan, "ids": ids, "images": [key]}

    shutil.copy(store.path / file.relative_to(damaged), file)
    train(config, [damaged], run, resume=True)
    assert_same_runs(tmp_path / "whole", run)


def test_damaged_features_are_not_trained_on(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    """Finite ones, which nothing but their checksum gives away."""
    damaged = shutil.copytree(store.path, tmp_path / "damaged.zarr")
    file = damage(featcache.open(damaged), "007.png", b"\x00\x3c")
    with pytest.raises(CorruptStoreError, match=r"the features of row \d+ are not the bytes"):
        train(make_config("data.eval_ratio=0", "train.steps=10"), [damaged], tmp_path / "run")
    assert file.exists()


def with_ghosts(
    jsonl: Callable[..., Path], file: Path, good: int, gone: int, prefix: str = ""
) -> Path:
    """Records of two images, of which `gone` lack the second one's features."""
    names = [f"{prefix}s{i}" for i in range(good)] + [f"{prefix}gone{i}" for i in range(gone)]
    return jsonl(
        file,
        [
            {
                "id": name,
                "images": [f"{i:03d}.png", "gone.png" if "gone" in name else "039.png"],
                "caption": f"two squares, {i}",
            }
            for i, name in enumerate(names)
        ],
    )


def left_out(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's left_out.jsonl."""
    return [json.loads(line) for line in (run / "left_out.jsonl").read_text().splitlines()]


def test_left_out_records_are_told_before_the_first_step(
    store: Store, make_config: MakeConfig, tmp_path: Path, jsonl: Callable[..., Path]
) -> None:
    """In one line, and all of them in a file that is there by then."""
    data = with_ghosts(jsonl, tmp_path / "data.jsonl", good=16, gone=4)
    run = tmp_path / "run"
    events: list[Event] = []
    found: list[dict[str, Any]] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if isinstance(event, NoticeEvent) and event.text.startswith("left out"):
            found.extend(left_out(run))

    config = make_config(f"data.files=[{data}]", "train.steps=1", "data.max_missing=0.2")
    train(config, [store.path], run, on_event=on_event)
    assert isinstance(events[2], NoticeEvent)
    assert events[2].text == (
        "left out 4 of 20 records: 4 image not in the store (gone0, gone1, gone2, ...); "
        f"all in {run / 'left_out.jsonl'}"
    )
    assert found == [
        {
            "id": f"gone{i}",
            "reason": "image not in the store",
            "detail": "gone.png: not in the store",
            "images": [f"{16 + i:03d}.png", "gone.png"],
        }
        for i in range(4)
    ]


def test_a_file_of_left_out_records_that_cannot_be_written(
    store: Store, make_config: MakeConfig, tmp_path: Path, jsonl: Callable[..., Path]
) -> None:
    data = with_ghosts(jsonl, tmp_path / "data.jsonl", good=39, gone=1)
    (tmp_path / "run/left_out.jsonl").mkdir(parents=True)
    with pytest.raises(RunError, match=r"left_out.jsonl: cannot be written: Is a directory; free"):
        train(make_config(f"data.files=[{data}]"), [store.path], tmp_path / "run")


def test_too_many_records_without_features_start_nothing(
    store: Store, make_config: MakeConfig, tmp_path: Path, jsonl: Callable[..., Path]
) -> None:
    data = with_ghosts(jsonl, tmp_path / "data.jsonl", good=16, gone=4)
    with pytest.raises(DataError, match=r"4 of 20 records have no .* set data.max_missing=0.2 "):
        train(make_config(f"data.files=[{data}]"), [store.path], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_may_be_missing_may_change_when_a_run_is_resumed(
    store: Store, make_config: MakeConfig, tmp_path: Path, jsonl: Callable[..., Path]
) -> None:
    """Images of the validation file lose their features and get them back."""
    run = tmp_path / "run"
    data = with_ghosts(jsonl, tmp_path / "data.jsonl", good=12, gone=0)
    held = with_ghosts(jsonl, tmp_path / "val.jsonl", good=4, gone=0, prefix="v")
    given = [f"data.files=[{data}]", f"data.val_files=[{held}]"]
    train(make_config(*given), [store.path], run)
    assert not (run / "left_out.jsonl").exists()
    digest = load_run(run).identity()["data"]

    with_ghosts(jsonl, held, good=4, gone=4, prefix="v")
    with pytest.raises(DataError, match=r"4 of 20 records have no features"):
        train(make_config(*given), [store.path], run, resume=True)
    with pytest.raises(
        DataError, match=r"4 of 20 .*\(for `align eval`, in the run's config.yaml\)"
    ):
        load_run(run)
    train(make_config(*given, "data.max_missing=0.2"), [store.path], run, resume=True)
    assert [record["id"] for record in left_out(run)] == [f"vgone{i}" for i in range(4)]
    # What was allowed to train is allowed to be evaluated, and to be resumed as it was.
    loaded = load_run(run)
    assert loaded.identity()["data"] == digest
    assert len(evaluate(loaded).captions) == 4
    assert train(load_config(run / "config.yaml"), [store.path], run, resume=True).step == 6

    with_ghosts(jsonl, held, good=4, gone=0, prefix="v")
    train(make_config(*given), [store.path], run, resume=True)
    assert not (run / "left_out.jsonl").exists()


def test_a_store_that_lacks_the_runs_images_is_refused_for_evaluation(
    store: Store, make_config: MakeConfig, tmp_path: Path, world: Path, jsonl: Callable[..., Path]
) -> None:
    """`align eval --features`: the same encoder, but only 30 of the 40 images. Where that is
    allowed, what was trained on is not held out in their place."""
    data = world / "captions.jsonl"
    train(make_config(f"data.files=[{data}]"), [store.path], tmp_path / "run")
    held_out = {sample.record.id for sample in load_run(tmp_path / "run").splits.val}
    lines = data.read_text().splitlines(keepends=True)[:30]
    (tmp_path / "part.jsonl").write_text("".join(lines))
    out = tmp_path / "part.zarr"
    model = str(world / "siglip")
    extract(ExtractOptions(model, (tmp_path / "part.jsonl",), out, world / "images"))
    with pytest.raises(DataError, match=r"part.zarr: 10 of 40 records have no .*max_missing=0.25 "):
        load_run(tmp_path / "run", features=[out])
    allowed = load_run(tmp_path / "run", features=[out], overrides=["data.max_missing=0.25"])
    there = {f"s{i}" for i in range(30)}
    assert {caption.id for caption in evaluate(allowed).captions} == held_out & there


def test_only_the_named_settings_may_change_when_a_run_is_resumed() -> None:
    """A setting whose name begins like another one is not let through with it."""

    def is_free(setting: str) -> bool:
        return is_free_to_change(setting, FREE_TO_CHANGE)

    assert all(is_free(setting) for setting in ("data.max_missing", "eval.seed"))
    for setting in ("data.max_missing_images", "data.max", "evaluation.seed", "train.samples_seen"):
        assert not is_free(setting)
    settings = {name for name, _ in flatten(config_dict(RunConfig()))}
    for free in FREE_TO_CHANGE:  # none is misspelt
        assert any(name == free or name.startswith(f"{free}.") for name in settings), free
    assert not any(is_free(name) for name in settings if name.startswith("optim."))


def test_samples_without_room_are_told_and_skipped(
    store: Store, make_config: MakeConfig, tmp_path: Path, jsonl: Callable[..., Path]
) -> None:
    lines: list[dict[str, object]] = [
        {"id": f"s{i}", "images": [f"{i:03d}.png"], "caption": "a square"} for i in range(9)
    ]
    lines += [{"id": "pair", "images": ["001.png", "002.png"], "caption": "two squares"}]
    data = jsonl(tmp_path / "data.jsonl", lines)
    one = load_run_prompt_length(make_config, store, tmp_path, data)
    events: list[Event] = []
    config = make_config(f"data.files=[{data}]", f"data.max_length={one + 1}", "data.eval_ratio=0")
    train(config, [store.path], tmp_path / "run", on_event=events.append)
    told = [e.text for e in events if isinstance(e, NoticeEvent) and "skipped" in e.text]
    assert told == [
        f"skipped so far: 1 its images and prompt alone fill data.max_length={one + 1} (pair)"
    ]


def load_run_prompt_length(make_config: MakeConfig, store: Store, folder: Path, data: Path) -> int:
    """Tokens before the answer of a one-image sample."""
    run = assemble(make_config(f"data.files=[{data}]"), [store.path], folder / "unused")
    record = next(s.record for s in run.splits.train if len(s.record.images) == 1)
    return len(run.encoder.encode_prompt(record, [4]).input_ids)


def test_epochs_count_steps(store: Store, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("train.steps=null", "train.epochs=1.5")
    assert train(config, [store.path], tmp_path / "run").step == 12  # 32 samples by 4, 1.5 times


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["features.layers=[-7]"], r"features.layers=-7: .* holds -2; extract it with --layer -7"),
        (["train.device=warp9"], r"unknown device 'warp9'; give auto"),
    ],
)
def test_clear_errors(
    store: Store, make_config: MakeConfig, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(make_config(*overrides), [store.path], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_store_of_another_encoder_than_the_recipes(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config("features.encoders=[siglip2-so400m]")
    with pytest.raises(FingerprintMismatch, match="extract with --model siglip2-so400m, or set"):
        train(config, [store.path], tmp_path / "run")
    named = make_config(
        f"features.encoders=[{store.fingerprint['encoder']['name']}]", "train.steps=1"
    )
    assert train(named, [store.path], tmp_path / "run").step == 1


def test_two_stores_are_refused(store: Store, make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resampler takes the features of one encoder, got 2"):
        train(make_config(), [store.path, store.path], tmp_path / "run")


def test_an_out_that_is_a_file(store: Store, make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("hello")
    with pytest.raises(RunError, match=r"run: cannot be written: File exists; give another --out"):
        train(make_config(), [store.path], tmp_path / "run")


def test_no_run_to_load(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run's folder"):
        load_run(tmp_path)


def test_the_validation_file_and_no_validation_at_all(
    store: Store, make_config: MakeConfig, tmp_path: Path, jsonl: Callable[..., Path]
) -> None:
    result = train(make_config("data.eval_ratio=0"), [store.path], tmp_path / "run")
    assert result.eval_loss is None
    assert {line["kind"] for line in metrics(tmp_path / "run")} == {"train"}

    lines = [{"id": f"v{i}", "images": [f"{i:03d}.png"], "caption": "a thing"} for i in (3, 5, 8)]
    held = jsonl(tmp_path / "val.jsonl", lines)
    events: list[Event] = []
    config = make_config(
        f"data.val_files=[{held}]",
        "data.max_samples=6",
        "train.sample_every=6",
        "train.samples=2",
        "eval.max_new_tokens=3",
    )
    result = train(config, [store.path], tmp_path / "held", on_event=events.append)
    assert result.eval_loss is not None
    assert [e.samples for e in events if isinstance(e, EvalEvent)] == [3, 3]
    (samples,) = [e for e in events if isinstance(e, SampleEvent)]
    assert [caption.id for caption in samples.captions] == ["v3", "v5"]
    told = [e.text for e in events if isinstance(e, NoticeEvent)]
    assert told[1:] == [
        "6 samples to train on, 3 held out, 6 steps of 4",
        "2 images of the validation files are trained on as well: the held-out loss is not of "
        "images never seen",
    ]
    assert len(evaluate(load_run(tmp_path / "held")).captions) == 3


def test_mlp_trains_too(store: Store, make_config: MakeConfig, tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            f"llm.name={make_config().llm.name}",
            "connector.name=mlp",
            "template.name=plain",
            "train.steps=60",
            "train.batch_size=4",
            "train.log_every=1",
            "optim.lr=3e-3",
            "data.eval_ratio=0.1",
            "train.device=cpu",
        ],
    )
    train(config, [store.path], tmp_path / "run")
    losses = [line["loss"] for line in metrics(tmp_path / "run") if line["kind"] == "train"]
    assert losses[-1] < losses[0]
    result = evaluate(load_run(tmp_path / "run"))
    assert len(result.captions) == 4
    assert any(caption.generated for caption in result.captions)
    assert not any("\n" in caption.generated for caption in result.captions)


def with_a_pair(jsonl: Callable[..., Path], folder: Path) -> Path:
    """Nine samples of one image, and one of two that does not fit where they just do."""
    lines: list[dict[str, object]] = [
        {"id": f"s{i}", "images": [f"{i:03d}.png"], "caption": "a square"} for i in range(9)
    ]
    lines += [{"id": "pair", "images": ["001.png", "002.png"], "caption": "two squares"}]
    return jsonl(folder / "data.jsonl", lines)


def test_a_sample_without_room_ends_no_run_at_batch_size_one(
    store: Store, make_config: MakeConfig, tmp_path: Path, jsonl: Callable[..., Path]
) -> None:
    """Its step changes nothing, wherever it falls, and resuming goes over it as well."""
    data = with_a_pair(jsonl, tmp_path)
    one = load_run_prompt_length(make_config, store, tmp_path, data)
    for accum in (1, 2):
        config = make_config(
            f"data.files=[{data}]",
            f"data.max_length={one + 1}",
            "data.eval_ratio=0",
            "train.batch_size=1",
            f"train.grad_accum={accum}",
            "train.steps=30",
            "train.save_every=1",
        )
        whole, cut = tmp_path / f"whole{accum}", tmp_path / f"cut{accum}"
        train(config, [store.path], whole)
        logged = [line["step"] for line in metrics(whole) if line["kind"] == "train"]
        assert len(logged) == (27 if accum == 1 else 30)
        missing = next(iter(set(range(1, 31)) - set(logged)), 3)
        before = max(step for step in logged if step < missing)
        with pytest.raises(StopError):
            train(config, [store.path], cut, on_event=stop_after(before))
        train(config, [store.path], cut, resume=True)
        assert_same_runs(whole, cut)


def test_a_first_step_without_room_is_saved_and_resumed(
    store: Store, make_config: MakeConfig, tmp_path: Path, jsonl: Callable[..., Path]
) -> None:
    data = with_a_pair(jsonl, tmp_path)
    one = load_run_prompt_length(make_config, store, tmp_path, data)
    seed = next(s for s in range(99) if StepSampler(10, 1, s).step(0)[0] == 9)
    config = make_config(
        f"data.files=[{data}]",
        f"data.max_length={one + 1}",
        "data.eval_ratio=0",
        "train.batch_size=1",
        "train.steps=3",
        "train.save_every=1",
        f"train.seed={seed}",
    )

    def stop(event: Event) -> None:
        if isinstance(event, CheckpointEvent):
            raise StopError

    train(config, [store.path], tmp_path / "whole")
    with pytest.raises(StopError):
        train(config, [store.path], tmp_path / "cut", on_event=stop)
    assert find_checkpoint(tmp_path / "cut/checkpoints").step == 1
    train(config, [store.path], tmp_path / "cut", resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_run_without_any_sample_that_fits(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"none of 32 training samples can be used: 32 its images"):
        train(make_config("data.max_length=3"), [store.path], tmp_path / "run")


def test_the_best_checkpoint_was_evaluated_itself(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config("train.save_every=2", "train.eval_every=3", "train.keep_checkpoints=0")
    train(config, [store.path], tmp_path / "run")
    # Steps 2 and 4 were saved, 3 and 6 evaluated: only the last was both.
    assert load_run(tmp_path / "run", "best").step == 6
    config = make_config("train.save_every=2", "train.eval_every=0", "train.keep_best=true")
    train(config, [store.path], tmp_path / "best")
    evals = {
        line["step"]: line["loss"] for line in metrics(tmp_path / "best") if line["kind"] == "eval"
    }
    assert sorted(evals) == [2, 4, 6]
    best = load_run(tmp_path / "best", "best")
    assert best.step == min(evals, key=lambda step: evals[step])
    assert evaluate_loss(best, 1024).loss == evals[best.step]


def test_another_precision_is_refused(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    """As "auto" comes to when a run started on a GPU is resumed on a CPU, or the other way."""
    run = tmp_path / "run"
    train(make_config("train.precision=bf16", "train.steps=2"), [store.path], run)
    with pytest.raises(
        CheckpointError, match=r"trained in bf16 and cannot be resumed in fp32; .*precision=bf16"
    ):
        train(make_config("train.steps=2"), [store.path], run, resume=True)
    again = make_config("train.precision=bf16", "train.steps=2")
    assert train(again, [store.path], run, resume=True).step == 2
    # "auto" that comes to the same is the same.
    train(make_config("train.steps=2"), [store.path], tmp_path / "auto")
    named = make_config("train.precision=fp32", "train.steps=2")
    assert train(named, [store.path], tmp_path / "auto", resume=True).step == 2


@pytest.mark.parametrize("change", ["caption", "images"])
def test_other_captions_or_images_under_the_same_ids_are_refused(
    store: Store, make_config: MakeConfig, tmp_path: Path, jsonl: Callable[..., Path], change: str
) -> None:
    lines: list[dict[str, Any]] = [
        {"id": f"s{i}", "images": [f"{i:03d}.png"], "caption": "a square"} for i in range(9)
    ]
    data = jsonl(tmp_path / "data.jsonl", lines)
    config = make_config(f"data.files=[{data}]", "data.eval_ratio=0")
    train(config, [store.path], tmp_path / "run")
    lines[4][change] = {"caption": "a circle", "images": ["005.png"]}[change]
    jsonl(data, lines)
    with pytest.raises(CheckpointError, match="other training samples: digest:"):
        train(config, [store.path], tmp_path / "run", resume=True)


def test_paths_hold_from_anywhere(
    store: Store, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative ones as KEY=VALUE; the same files named another way are no other settings."""
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(world)
    common = ["data.eval_ratio=0.2", "train.device=cpu", "train.steps=2", "connector.num_latents=4"]
    own = ["llm.name=qwen3", "data.files=[captions.jsonl]", "data.images=images", *common]
    train(load_config(None, own), [Path("store.zarr")], tmp_path / "run")
    monkeypatch.chdir(tmp_path / "there")
    assert len(evaluate(load_run(tmp_path / "run"), limit=2).captions) == 2
    other = [
        f"llm.name={world / 'qwen3'}",
        f"data.files=[{world / 'images' / '..' / 'captions.jsonl'}]",
        f"data.images={os.path.relpath(world / 'images')}",
        *common,
    ]
    assert train(load_config(None, other), [store.path], tmp_path / "run", resume=True).step == 2


def test_names_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "Qwen/Qwen3-8B-Base"):
        assert absolute_paths(load_config(None, [f"llm.name={name}"])).llm.name == name
    assert absolute_paths(load_config()).data.images is None


def test_a_start_that_failed_can_be_repeated(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(StopError):
        train(make_config(), [store.path], run, on_event=stop_after(1))
    assert (run / "run.json").exists()
    # Without --resume and with other settings: there is nothing yet that they could spoil.
    train(make_config("optim.lr=1e-3"), [store.path], run)
    assert load_config(run / "config.yaml").optim.lr == 1e-3
    assert [line["step"] for line in metrics(run) if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_config_that_lies_in_the_folder_is_kept(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("# mine\noptim: {lr: 0.5}\n")
    train(make_config(), [store.path], run)
    assert (run / "config.before.yaml").read_text() == "# mine\noptim: {lr: 0.5}\n"
    assert load_config(run / "config.yaml").optim.lr == 3e-3


def test_a_damaged_newest_checkpoint_is_deleted_and_the_run_goes_on(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(make_config(), [store.path], run)
    # Copies: what is loaded is mapped from the file that is damaged next.
    expected = {name: tensor.clone() for name, tensor in weights(run).items()}
    newest = find_checkpoint(run / "checkpoints").path
    (newest / "connector.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=f"delete {newest} and use --resume"):
        train(make_config(), [store.path], run, resume=True)
    shutil.rmtree(newest)
    assert train(make_config(), [store.path], run, resume=True).step == 6
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(run).items())


def test_a_batch_far_larger_than_the_data_is_refused(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"train.batch_size=3201: .* 32 training samples over 100"
    ):
        train(make_config("train.batch_size=3201"), [store.path], tmp_path / "run")
    assert not (tmp_path / "run").exists()


TEXT_ONLY = [
    {
        "id": f"t{i}",
        "conversations": [
            {"from": "human", "value": "Name a colour."},
            {"from": "gpt", "value": "red"},
        ],
    }
    for i in range(6)
]


@pytest.mark.parametrize("connector", ["resampler", "mlp", "sva", "pool", "conv"])
def test_text_without_images_teaches_a_connector_nothing(
    store: Store, make_config: MakeConfig, world: Path, tmp_path: Path, connector: str
) -> None:
    """Alone in a batch it gives gradients of zero; in one it counts in the mean, as in LLaVA."""
    small = {
        "resampler": [], "mlp": [], "pool": ["side=2"], "conv": ["side=2", "width=16"],
        "sva": ["side=2", "width=16", "heads=2", "token_lengths=[16]"],
    }  # fmt: skip
    overrides = [f"connector.name={connector}"] if connector != "resampler" else []
    overrides += [f"connector.{field}" for field in small[connector]]
    texts = world / "texts.json"
    texts.write_text(json.dumps(TEXT_ONLY))
    config = load_config(
        None,
        [
            f"llm.name={world / 'qwen3'}", f"data.files=[{texts},{world / 'captions.jsonl'}]",
            f"data.images={world / 'images'}", "data.text_only=train", "data.eval_ratio=0",
            "train.device=cpu", "train.steps=46", "train.batch_size=1", "train.log_every=1",
            "train.eval_every=0", *overrides,
        ],
    )  # fmt: skip
    events: list[Event] = []
    train(config, [store.path], tmp_path / "run", on_event=events.append)
    norms = [event.grad_norm for event in events if isinstance(event, StepEvent)]
    assert len(norms) == 46 and sum(norm == 0 for norm in norms) == 6
    skipped = train(
        replace(config, data=replace(config.data, text_only="skip")),
        [store.path], tmp_path / "skipped",
    )  # fmt: skip
    info = RunFolder(skipped.path).read_info()
    assert (info["samples"]["train"], sum(info["samples"]["left_out"].values())) == (40, 6)
