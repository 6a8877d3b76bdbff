"""Who encodes the shards does not decide their bytes. Lost workers are in tests/faults."""

from __future__ import annotations

import errno
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featcache
from featcache.encoders import Encoder, load_encoder
from featcache.errors import ConfigError, EncoderError, StoreError
from featcache.executors import InlineExecutor, open_executor, processes, ranks
from featcache.executors.base import Tally
from featcache.executors.processes import ProcessExecutor
from featcache.executors.ranks import (
    Rank,
    RankExecutor,
    Speaker,
    Word,
    _order,
    listen,
    rank_from,
)
from featcache.extract import ExtractOptions, extract
from featcache.files import read_json
from featcache.journal import RowRecord
from featcache.sources import ImageRef
from featcache.tasks import PlannedImage, ShardTask
from featcache.worker import ShardDone, WorkerOptions, WorkProgress
from tests.support import feature_files


@pytest.fixture
def options(encoder_dir: Path, images_dir: Path, tmp_path: Path) -> ExtractOptions:
    """Ten images in shards of 2, one of them damaged."""
    (images_dir / "0003.png").write_bytes(b"no image")
    return ExtractOptions(
        model=str(encoder_dir), data=(images_dir,), out=tmp_path / "store.zarr",
        shard_images=2, batch_size=2, max_failures=0.5,
    )  # fmt: skip


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_processes_write_the_same_bytes(
    options: ExtractOptions, tmp_path: Path, codec: str
) -> None:
    one = extract(replace(options, codec=codec))
    seen = []
    two = extract(replace(options, codec=codec, out=tmp_path / "two.zarr", workers=2), seen.append)
    assert feature_files(one.path) == feature_files(two.path)
    assert (two.features, two.failures, two.work.done, two.work.failed) == (
        9, {"undecodable": 1}, 10, 1,
    )  # fmt: skip
    assert two.work.workers == 2 and two.work.lost == 0
    assert two.work.peak_ram_bytes > 50e6
    assert [p.total for p in seen if p.stage == "encode"][-1] == 10
    assert featcache.open(two.path).failures() == featcache.open(one.path).failures()


def test_channel_values_may_come_read_only(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray hands over what an actor returned; torch would warn, and a warning is an error."""
    calibrate = InlineExecutor.calibrate

    def read_only(executor: InlineExecutor, image_root: str) -> dict[str, np.ndarray]:
        measured = calibrate(executor, image_root)
        for values in measured.values():
            values.flags.writeable = False
        return measured

    monkeypatch.setattr(InlineExecutor, "calibrate", read_only)
    assert extract(replace(options, codec="int8")).features == 9


def test_an_encoder_that_cannot_be_loaded_is_the_users_line(options: ExtractOptions) -> None:
    with pytest.raises(EncoderError, match="unknown encoder 'sigclip'"):
        extract(replace(options, model="sigclip", workers=2))
    assert not options.out.exists()


def test_a_store_that_cannot_be_written_is_the_users_line(
    options: ExtractOptions, tmp_path: Path
) -> None:
    extract(replace(options, limit=2))
    (options.out / "features/-2/c/1").write_text("in the way of a folder")
    with pytest.raises(StoreError, match=r"cannot write \(Not a directory\)"):
        extract(replace(options, workers=2))
    (options.out / "features/-2/c/1").unlink()
    assert extract(options).features == 9


def die(*_: Any, **__: Any) -> Encoder:
    os._exit(3)


def raise_bug(*_: Any, **__: Any) -> Encoder:
    raise ZeroDivisionError("a bug")


def test_workers_that_only_die_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "DEATHS_WITHOUT_A_SHARD", 0)
    options = WorkerOptions(tmp_path, "none", load=die)
    with (
        ProcessExecutor(options, 1) as executor,
        pytest.raises(StoreError, match=r"2 workers in a row died .* exit code 3; every committed"),
    ):
        executor.describe()


def test_a_bug_in_a_worker_keeps_its_traceback(tmp_path: Path) -> None:
    options = WorkerOptions(tmp_path, "none", load=raise_bug)
    with (
        ProcessExecutor(options, 1) as executor,
        pytest.raises(RuntimeError, match=r"(?s)in raise_bug.*ZeroDivisionError: a bug"),
    ):
        executor.describe()


def test_which_executor(encoder_dir: Path, tmp_path: Path) -> None:
    options = WorkerOptions(tmp_path, str(encoder_dir))
    with open_executor("local", None, options) as executor:
        assert isinstance(executor, InlineExecutor) and executor.workers == 1
    with pytest.raises(ConfigError, match="unknown executor 'slurm'; known are local, ray"):
        open_executor("slurm", 1, options)


def test_a_task_is_sent_whole() -> None:
    here, there = ImageRef("/data", "a.png"), ImageRef("s3://bucket", "b.png")
    images = (PlannedImage(b"1" * 16, (here, there)), PlannedImage(b"2" * 16, ()))
    was = (RowRecord(1, "", (4, 6), {"-2": 7}), RowRecord())
    for task in (ShardTask(3, 2, images), ShardTask(0, 1, images[:1], was[:1])):
        assert pickle.loads(pickle.dumps(task)) == task


def test_the_tally_counts_what_a_lost_worker_had_committed() -> None:
    tally = Tally()
    tally.report(0, WorkProgress(10, 10, 1, {"encode": 2.0}, None, 500))
    tally.commit(0, ShardDone(0, WorkProgress(4, 4, 1, {"encode": 0.5}, None, 400)))
    tally.commit(1, ShardDone(1, WorkProgress(3, 3, 0, {"encode": 0.25}, (8, 4), 700)))
    assert tally.progress(2) == WorkProgress(13, 13, 1, {"encode": 2.25}, (8, 4), 700, 0, 2, 0)
    tally.lose(0)
    assert tally.progress(2) == WorkProgress(7, 7, 1, {"encode": 0.75}, (8, 4), 700, 0, 2, 1)
    tally.report(0, WorkProgress(1, 1, 0, {"encode": 1.0}))
    assert tally.progress(2).done == 8


# ------------------------------------------------------------------------------------------- ranks

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "node 1", "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0",
}  # fmt: skip


def test_a_rank_is_known_by_its_launchers_variables() -> None:
    assert rank_from(TORCHRUN) == Rank(3, 8, 1, 2, "torchrun-none-node-1-29500-0")
    assert rank_from(SRUN) == Rank(5, 16, 1, 1, "slurm-77-0")
    assert rank_from(SRUN | {"SLURM_RESTART_COUNT": "2"}).job == "slurm-77-0-2"  # type: ignore[union-attr]
    # On one machine torchrun's names repeat from run to run; its process does not.
    alone = rank_from(TORCHRUN | {"LOCAL_WORLD_SIZE": "8"})
    assert alone is not None and alone.job.endswith(f"-{os.getppid()}")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        # The batch script itself, outside of srun.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "77"},
    ],
)
def test_a_process_alone_is_no_rank(environment: dict[str, str]) -> None:
    assert rank_from(environment) is None


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_rank_would_do_all_shards_its_own_first(world: int) -> None:
    shards = [0, 1, 2, 5, 6, 7, 8, 9, 12]
    for index in range(world):
        rank = Rank(index, world, 0, 1, "job")
        order = [shards[place] for place in _order(shards, rank)]
        assert sorted(order) == shards
        own = [shard for shard in shards if shard % world == index]
        assert order[: len(own)] == own
    if world > 2:
        first_help = {
            index: next(
                shards[place]
                for place in _order(shards, Rank(index, world, 0, 1, "job"))
                if shards[place] % world != index
            )
            for index in range(world)
        }
        assert len({shard % world for shard in first_help.values()}) > 1


RANK_1 = Rank(1, 2, 1, 2, "job")


def test_rank_0s_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "BEAT_EVERY_S", 0.05)
    heard: list[Word] = []

    def on_wait() -> None:
        heard.append(Word(**read_json(tmp_path / "journal/jobs/job.json")))
        if heard[-1].beat >= 2:
            speaker.ready(3, "/images")

    with Speaker(tmp_path, RANK_1) as speaker:
        assert listen(tmp_path, RANK_1, on_wait) == Word(True, 3, "/images")
    assert [word.ready for word in heard] == [False] * len(heard)
    assert heard[-1].beat >= 2
    # Said, and not taken back by the end.
    assert listen(tmp_path, RANK_1, on_wait).ready


@pytest.mark.parametrize("error", [StoreError("the disk is full"), KeyboardInterrupt()])
def test_rank_0_says_that_it_failed(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), Speaker(tmp_path, RANK_1):
        raise error
    said = str(error) or type(error).__name__
    with pytest.raises(StoreError, match=f"rank 0 stopped: {said}"):
        listen(tmp_path, RANK_1, lambda: None)


def test_what_rank_0_cannot_say_does_not_hide_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match="the disk is full"), Speaker(tmp_path, RANK_1):
        monkeypatch.setattr(ranks, "publish_json", full)
        raise StoreError("the disk is full")


def test_a_rank_0_that_is_gone_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "FIRST_WORD_S", 0.2)
    monkeypatch.setattr(ranks, "SILENCE_S", 0.2)
    with pytest.raises(StoreError, match="has not heard of rank 0"):
        listen(tmp_path, RANK_1, lambda: None)
    ranks.tell(tmp_path, RANK_1, Word(beat=7))
    with pytest.raises(StoreError, match="has not heard of rank 0"):
        listen(tmp_path, RANK_1, lambda: None)


def test_workers_of_a_launcher_are_not_multiplied(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"this is rank 3 of 8: .* leave out --workers"):
        extract(replace(options, workers=2))


def test_rank_0_alone_does_the_work_of_all(
    options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(options)
    for name, value in (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    alone = extract(replace(options, out=tmp_path / "alone.zarr"))
    assert alone.features == 9
    assert feature_files(alone.path) == feature_files(options.out)


def test_a_rank_without_word_of_the_store_says_why_rank_0_stopped(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(options)
    rank = Rank(0, 8, 0, 2, "torchrun-none-node-1-29500-0")
    for name, value in (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match="do not match: codec"):
        extract(replace(options, codec="bf16"))
    with pytest.raises(StoreError, match=r"rank 0 stopped: .* do not match: codec"):
        listen(options.out, rank, pytest.fail)  # type: ignore[arg-type]


def test_a_rank_takes_its_share_of_the_machine(encoder_dir: Path, tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        options = WorkerOptions(tmp_path, str(encoder_dir))
        with RankExecutor(options, Rank(0, 2, 0, 1000, "job")) as executor:
            assert executor._worker.decode_threads == 1
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_load_is_what_makes_the_encoder(encoder_dir: Path, tmp_path: Path) -> None:
    made = []

    def load(name: str, **more: Any) -> Encoder:
        made.append(name)
        return load_encoder(name, **more)

    with InlineExecutor(WorkerOptions(tmp_path, str(encoder_dir), load=load)) as executor:
        assert executor.describe().num_patches == 9
    assert made == [str(encoder_dir)]
