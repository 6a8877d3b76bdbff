"""What the store's features do to each other: each test was a bug when they first met."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import featcache
from cli.console import run
from cli.featcache import group
from featcache import layout
from featcache.codecs.scaled import Int8Codec
from featcache.convert import convert
from featcache.errors import CorruptStoreError, StoreError
from featcache.extract import ExtractOptions, extract
from featcache.gc import collect
from featcache.hdf5 import writing
from featcache.journal import locked
from featcache.layout import StoreInfo
from featcache.live import compare_live
from featcache.repair import repair
from featcache.verify import verify
from tests.support import Killed, Publications, feature_files, write_captions, write_images

COUNT = 6


@pytest.fixture
def options(encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExtractOptions:
    """6 images in shards of 4 and batches of 2; not extracted yet."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    write_images(tmp_path / "images", COUNT)
    return ExtractOptions(
        model=str(encoder_dir), data=(write_captions(tmp_path / "c.jsonl", names()),),
        image_root=tmp_path / "images", out=tmp_path / "store.zarr", shard_images=4, batch_size=2,
        max_failures=1.0,
    )  # fmt: skip


def names() -> list[str]:
    return [f"{i:04d}.png" for i in range(COUNT)]


def spoil(path: Path, at: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_a_reader_knows_that_a_file_was_replaced(options: ExtractOptions) -> None:
    """A row that it has checked, and that was dropped since, is no row once the file is reopened;
    nor is it in a batch that was begun before this was noticed."""
    extract(options)
    store = featcache.open(options.out)
    with store.reader(threads=1) as reader:
        rows = store.rows(["0000.png"])
        reader.read(rows)
        assert options.image_root is not None
        shutil.copy(options.image_root / "0001.png", options.image_root / "0000.png")
        extract(options)
        assert collect(options.out).rows == 1
        reader.read(rows)  # it has the old file open
        for files in reader._reads._files:
            files.close()
        begun = [reader.begin(rows) for _ in range(2)]
        for reading in begun:
            with pytest.raises(CorruptStoreError, match="not the bytes that were written"):
                reading.result()
        with pytest.raises(CorruptStoreError, match="not the bytes that were written"):
            reader.read(rows)
        reader.read(store.rows(["0002.png"]))


@pytest.mark.parametrize("codec", ["fp16", "int4"])
@pytest.mark.parametrize("damage", ["data", "record"])
def test_extraction_keeps_the_good_rows_of_a_damaged_shard(
    options: ExtractOptions, codec: str, damage: str
) -> None:
    """Although their images are gone; a row that is really lost is tried again later."""
    options = replace(options, codec=codec)
    extract(options)
    whole = feature_files(options.out)
    assert options.image_root is not None
    kept = options.image_root.rename(options.image_root.with_name("kept"))
    options.image_root.mkdir()
    shard = options.out / "features/-2/c/0/0/0"
    pitch = featcache.open(options.out).spec.geometry("-2").pitch_bytes
    if damage == "data":
        shard.write_bytes(shard.read_bytes()[: 3 * pitch])  # slot 3, and the shard index
    else:
        (options.out / "journal/commit-00000000.json").unlink()
    result = extract(options)
    lost = damage == "data"
    assert result.failures == ({"missing": 1} if lost else {})
    store = featcache.open(options.out)
    assert store.rows(names()).tolist() == [0, 1, 2, -1 if lost else 3, 4, 5]
    with store.reader() as reader:
        reader.read(np.array([0, 1, 2, 4, 5]))
    assert verify(options.out).ok
    assert lost or feature_files(options.out) == whole
    options.image_root.rmdir()
    kept.rename(options.image_root)
    assert extract(options).failures == {}
    assert extract(options).new == 0


@pytest.mark.parametrize("status", ["missing", "changed"])
def test_a_damaged_shard_gets_the_images_that_are_back(
    options: ExtractOptions, status: str
) -> None:
    """An extraction that mends a shard also encodes what a repair could not find: in one run."""
    extract(options)
    whole = feature_files(options.out)
    assert options.image_root is not None
    image, shard = options.image_root / "0001.png", options.out / "features/-2/c/0/0/0"
    pitch = featcache.open(options.out).spec.geometry("-2").pitch_bytes
    content = image.read_bytes()
    spoil(shard, pitch)
    if status == "missing":
        image.unlink()
    else:
        image.write_bytes(b"another")
    repair(options.out)
    assert [failure.reason for failure in featcache.open(options.out).failures()] == [status]
    image.write_bytes(content)
    os.truncate(shard, pitch)
    result = extract(options)
    assert (result.new, result.failures) == (4, {})
    assert feature_files(options.out) == whole


def test_an_extraction_after_a_stopped_repair_loses_nothing(
    options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(options)
    spoil(options.out / "features/-2/c/0/0/0")
    assert options.image_root is not None
    kept = {f"{i:04d}.png" for i in (0, 1)}  # the bad row's batch
    for name in set(names()) - kept:
        (options.image_root / name).unlink()
    publications = Publications(monkeypatch)
    once = shutil.copytree(options.out, tmp_path / "once.zarr")
    assert repair(once).ok
    for last in range(publications.count):
        store = shutil.copytree(options.out, tmp_path / f"{last}.zarr")
        with publications.stopped(after=last), pytest.raises(Killed):
            repair(store)
        assert extract(replace(options, out=store)).failures == {}
        assert repair(store).ok
        assert feature_files(store) == feature_files(once)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_calibration_waits_for_images(options: ExtractOptions, codec: str) -> None:
    """First nothing is found, then nothing can be decoded, then there are images."""
    options = replace(options, codec=codec)
    root = options.image_root
    assert root is not None
    images = {name: (root / name).read_bytes() for name in names()}
    for name in names():
        (root / name).unlink()
    assert extract(options).failures == {"missing": COUNT}
    assert verify(options.out).ok
    for name in names():
        (root / name).write_bytes(b"no image " + name.encode())
    assert extract(options).failures == {"undecodable": COUNT}
    assert verify(options.out).ok
    store = featcache.open(options.out)
    with store.reader() as reader:
        assert reader.read(np.zeros(0, np.int64)).shape == (0, 9, 24)
    assert convert(options.out, options.out.with_name("none.h5")).ok
    for name, data in images.items():
        (root / name).write_bytes(data)
    assert extract(options).failures == {}
    assert verify(options.out).ok
    fresh = replace(options, out=options.out.with_name("fresh.zarr"))
    extract(fresh)
    for place in ("channels/-2", "journal/copy/channels/-2"):
        assert (options.out / place / "c/0/0").read_bytes() == (
            fresh.out / "channels/-2/c/0/0"
        ).read_bytes()
        shutil.rmtree(options.out / place)
    assert repair(options.out).ok


CODECS = ["fp16", "bf16", "int8", "fp8", "int4"]


@pytest.mark.parametrize("before", CODECS)
def test_a_converted_store_agrees_with_a_live_encoder(
    options: ExtractOptions, tmp_path: Path, before: str
) -> None:
    extract(replace(options, codec=before))
    for codec in CODECS:
        out = tmp_path / f"{codec}.zarr"
        convert(options.out, out, codec)
        report = compare_live(out, COUNT)
        assert (report.wrong, report.compared) == ((), COUNT), codec
        again = tmp_path / f"{codec}-fp16.zarr"
        convert(out, again, "fp16")
        assert compare_live(again, COUNT).wrong == ()


def test_repair_of_a_converted_store_says_what_it_does(
    options: ExtractOptions, tmp_path: Path
) -> None:
    extract(options)
    out = tmp_path / "small.zarr"
    convert(options.out, out, "int8")
    spoil(out / "features/-2/c/0/0/0")
    report = repair(out)
    assert report.ok
    assert report.notes == (
        "row 0 (0000.png) was encoded from its image; the store was converted, so its other rows "
        "also carry the rounding of fp16",
    )
    assert compare_live(out, COUNT).wrong == ()
    for place in ("channels/-2", "journal/copy/channels/-2"):
        shutil.rmtree(out / place)
    report = repair(out)
    assert "it was measured on features in fp16, not on images" in str(report.problems[0])


def test_a_stopped_conversion_goes_on_only_with_the_same_channel_values(
    options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are measured by each run, on as many threads as it has."""
    extract(options)
    out = tmp_path / "small.zarr"
    with Publications(monkeypatch).stopped(at="commit-00000001"), pytest.raises(Killed):
        convert(options.out, out, "int8")
    measure = Int8Codec.calibrate
    monkeypatch.setattr(Int8Codec, "calibrate", lambda self, values: measure(self, values) * 1.5)
    assert convert(options.out, out, "int8").resumed == 0
    rows = np.arange(COUNT)
    with featcache.open(out).reader() as small, featcache.open(options.out).reader() as exact:
        wanted = exact.read(rows, torch.float32)
        error = (small.read(rows, torch.float32) - wanted).norm() / wanted.norm()
    assert error < 0.02


def test_a_store_that_is_being_written_is_not_replaced(
    options: ExtractOptions, tmp_path: Path
) -> None:
    extract(options)
    out = tmp_path / "other.zarr"
    convert(options.out, out)
    before = feature_files(out)
    with locked(out), pytest.raises(StoreError, match="another process is writing"):
        convert(options.out, out, "int8", force=True)
    assert feature_files(out) == before
    convert(options.out, out, "int8", force=True)
    assert featcache.open(out).info.codec == "int8"


@pytest.mark.parametrize("name", ["store.zarr", "store.h5"])
def test_a_link_is_written_where_it_leads(
    options: ExtractOptions, tmp_path: Path, name: str
) -> None:
    extract(options)
    (tmp_path / "disk").mkdir()
    link = tmp_path / f"link-{name}"
    link.symlink_to(tmp_path / "disk" / name)
    for codec in ("fp16", "int8"):
        convert(options.out, link, codec, force=True)
        assert link.is_symlink()
        assert featcache.open(tmp_path / "disk" / name).info.codec == codec
    assert [path.name for path in (tmp_path / "disk").iterdir()] == [name]


def test_a_file_that_another_process_has_just_finished(
    options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened before it got its name, and locked after."""
    extract(options)
    out = tmp_path / "store.h5"
    convert(options.out, out)
    before = out.read_bytes()
    opened = os.open

    def late(path: Path, *more: int) -> int:
        if Path(path).name == ".partial-store.h5":
            return opened(out, os.O_RDWR)  # what the partial file has become
        return opened(path, *more)

    monkeypatch.setattr(os, "open", late)
    with (
        pytest.raises(StoreError, match="another process is writing"),
        writing(out, featcache.open(options.out).spec, COUNT),
    ):
        raise AssertionError
    assert out.read_bytes() == before


def test_live_of_a_damaged_store_is_one_document(
    options: ExtractOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(options)
    spoil(options.out / "index/00000001/status/c/0")
    assert run(group, ["verify", str(options.out), "--live", "2", "--json"]) == 1
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert len(lines) == 1
    assert document["problems"][0]["where"].startswith("index/00000001/status")
    assert "is damaged" in document["live"]["error"]


def test_a_description_with_nan_is_a_damaged_one(options: ExtractOptions) -> None:
    extract(options)
    path = options.out / "zarr.json"
    path.write_text(path.read_text().replace('"generation": 1', '"generation": NaN'))
    with pytest.raises(CorruptStoreError, match="--repair"):
        StoreInfo.load(options.out)
    assert repair(options.out).ok
    with pytest.raises(StoreError, match="name too long"):
        StoreInfo.load(options.out.with_name("x" * 300))
    assert layout.FORMAT_VERSION == 3


def test_a_foreign_zarr_group_is_left_as_it_is(options: ExtractOptions) -> None:
    options.out.mkdir()
    (options.out / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    with pytest.raises(StoreError, match="does not describe a feature store"):
        extract(options)
    with pytest.raises(StoreError, match="does not describe a feature store"):
        repair(options.out)
    assert [path.name for path in options.out.rglob("*")] == ["zarr.json"]


@pytest.mark.parametrize("command", ["info", "failures", "verify", "gc", "convert", "diff"])
def test_a_path_that_cannot_be(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [str(tmp_path / "other")] if command in ("convert", "diff") else []
    assert run(group, [command, "x" * 300, *other, "--json"]) == 1
    assert "name too long" in json.loads(capsys.readouterr().out)["error"]
