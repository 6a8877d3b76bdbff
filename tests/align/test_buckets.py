"""Training from a bucket: the same run as from a disk, through a local tier of any size."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from align.config import RunConfig
from align.errors import RunError
from align.evaluate import evaluate
from align.live import caption_images
from align.report import write_report
from align.run import load_run, load_speaker
from align.tracking import NoticeEvent
from align.trainer import train
from featcache.object_path import ObjectPath
from featcache.store import Store
from tests.align.test_trainer import metrics, weights
from tests.support_s3 import Fault, Proxy, times

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def there(store: Store, world: Path, bucket: ObjectPath) -> ObjectPath:
    """The session's store, its data and its images in a bucket."""
    assert isinstance(store.path, Path)
    for folder, place in ((store.path, "store.zarr"), (world / "images", "images")):
        for path in folder.rglob("*"):
            if path.is_file():
                target = bucket / place / path.relative_to(folder).as_posix()
                target.write([path.read_bytes()])
    (bucket / "captions.jsonl").write([(world / "captions.jsonl").read_bytes()])
    return bucket


def test_the_same_run_as_from_a_disk(
    store: Store,
    there: ObjectPath,
    world: Path,
    make_config: MakeConfig,
    tmp_path: Path,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = train(make_config("train.sample_every=3"), [store.path], tmp_path / "disk")
    config = make_config(
        "train.sample_every=3",
        f"train.cache_dir={tmp_path / 'tier'}",
        "train.cache_gb=0.00002",  # 12 of 40 images
        f"data.files=[{there}/captions.jsonl]",
        f"data.images={there}/images",
    )
    told = []
    with proxy.failing(times(10, Fault("cut"), lambda request: "/c/" in request.path)):
        found = train(config, [there / "store.zarr"], tmp_path / "run", on_event=told.append)
    assert proxy.faults == 10
    assert (found.loss, found.eval_loss) == (expected.loss, expected.eval_loss)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "disk")
    assert all(
        (value == weights(tmp_path / "disk")[name]).all()
        for name, value in weights(tmp_path / "run").items()
    )
    notices = [event.text for event in told if isinstance(event, NoticeEvent)]
    assert sum(f"from {there}/store.zarr through {tmp_path}/tier" in each for each in notices) == 1

    # From any other folder, and with another tier.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "tier")
    run = load_run(tmp_path / "run", overrides=["train.cache_gb=1"])
    evaluate(run)
    speaker = load_speaker(tmp_path / "run")
    name = next((world / "images").iterdir()).name
    (said,) = caption_images(speaker, [world / "images" / name])
    assert caption_images(speaker, [there / "images" / name]) == [said]
    page = write_report(tmp_path / "run").read_text()
    assert "data:image/png;base64" in page


def test_a_run_whose_store_is_gone_says_so(
    there: ObjectPath, make_config: MakeConfig, tmp_path: Path
) -> None:
    train(make_config("train.steps=1"), [there / "store.zarr"], tmp_path / "run")
    (there / "store.zarr").remove_tree()
    with pytest.raises(RunError, match=r"its store s3://.*store.zarr is gone"):
        load_run(tmp_path / "run")
