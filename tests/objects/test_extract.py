"""Extraction into a bucket: the same bytes as on a disk, whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import featcache
from cli.console import run
from cli.featcache import group
from featcache import encode, layout, object_requests, sources
from featcache import extract as extraction
from featcache.errors import (
    ImageError,
    IncompleteStoreError,
    ManifestError,
    ObjectStoreError,
    StoreError,
)
from featcache.extract import ExtractOptions, extract
from featcache.journal import Plan
from featcache.manifests import read_manifest
from featcache.object_path import ObjectPath
from featcache.sources import ImageRef
from tests.support import write_captions, write_images
from tests.support_s3 import Fault, Proxy, Request, lasting, times


def main(command: list[str]) -> int:
    return run(group, command)


DATA = ("features/", "scales/", "channels/", "pooled/", "index/")


def options_for(encoder_dir: Path, folder: Path, out: Path | ObjectPath, **more) -> ExtractOptions:
    return ExtractOptions(
        model=str(encoder_dir), data=(folder,), out=out, shard_images=4, batch_size=2, **more
    )


def data_files(store: Path | ObjectPath) -> dict[str, bytes]:
    """Every file that holds values, by its path in the store."""
    names = (
        [name for name, _ in store.listing()]
        if isinstance(store, ObjectPath)
        else [path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()]
    )
    return {name: (store / name).read_bytes() for name in sorted(names) if name.startswith(DATA)}


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_a_bucket_holds_what_a_disk_holds(
    encoder_dir: Path, tmp_path: Path, bucket: ObjectPath, codec: str
) -> None:
    write_images(tmp_path / "images", 10)
    (tmp_path / "images" / "0003.png").write_bytes(b"no image")
    disk = options_for(encoder_dir, tmp_path / "images", tmp_path / "disk.zarr", codec=codec)
    disk = replace(disk, max_failures=1.0)
    there = replace(disk, out=bucket / "a folder/store.zarr")
    for limit in (5, None):  # then more of them, appended
        assert extract(replace(disk, limit=limit)).ok
        assert extract(replace(there, limit=limit)).ok
        expected = data_files(disk.out)
        assert len(expected) > 20
        assert data_files(there.out) == expected
    assert extract(there).new == 0


@pytest.mark.parametrize("part_bytes", [object_requests.PART_BYTES, 6_000])
def test_faults_on_the_way_change_nothing(
    encoder_dir: Path,
    tmp_path: Path,
    bucket: ObjectPath,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    part_bytes: int,
) -> None:
    """Refused, cut, lost and late answers, of single and of multipart uploads alike."""
    monkeypatch.setattr(object_requests, "PART_BYTES", part_bytes)
    write_images(tmp_path / "images", 6)
    disk = options_for(encoder_dir, tmp_path / "images", tmp_path / "disk.zarr", codec="int8")
    extract(disk)
    kinds = [
        Fault("refuse"), Fault("cut"), Fault("lose"), Fault("refuse", 500),
        Fault("stall", seconds=0.2),
    ]  # fmt: skip
    rng = random.Random(0)
    lock = threading.Lock()

    def sometimes(_: Request) -> Fault | None:
        with lock:
            return rng.choice(kinds) if rng.random() < 0.25 else None

    with proxy.failing(sometimes):
        assert extract(replace(disk, out=bucket / "store.zarr")).ok
    assert proxy.faults > 10
    assert any("uploadId" in request.path for request in proxy.seen) == (part_bytes < 10_000)
    assert data_files(bucket / "store.zarr") == data_files(tmp_path / "disk.zarr")


def test_an_outage_of_seconds_is_waited_for(
    encoder_dir: Path, tmp_path: Path, bucket: ObjectPath, proxy: Proxy
) -> None:
    write_images(tmp_path / "images", 4)
    options = options_for(encoder_dir, tmp_path / "images", bucket / "store.zarr")
    with proxy.failing(lasting(2.0, Fault("refuse"))):
        assert extract(options).features == 4
    assert proxy.faults > 3


@pytest.mark.slow
def test_a_minute_of_503_is_waited_for(
    encoder_dir: Path,
    tmp_path: Path,
    bucket: ObjectPath,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FEATCACHE_RETRY_S")
    write_images(tmp_path / "images", 4)
    options = options_for(encoder_dir, tmp_path / "images", bucket / "store.zarr")
    with proxy.failing(lasting(60.0, Fault("refuse"))):
        assert extract(options).features == 4
    assert proxy.faults > 10


def test_a_longer_outage_ends_in_one_line_and_the_next_run_goes_on(
    encoder_dir: Path,
    tmp_path: Path,
    bucket: ObjectPath,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEATCACHE_RETRY_S", "1")
    monkeypatch.setattr(encode, "WRITERS", 1)  # so that shards are published in order
    write_images(tmp_path / "images", 12)
    disk = options_for(encoder_dir, tmp_path / "images", tmp_path / "disk.zarr")
    extract(disk)
    options = replace(disk, out=bucket / "store.zarr")

    def second_shard(request: Request) -> Fault | None:
        return Fault("refuse") if "/c/1/0/0" in request.path else None

    with proxy.failing(second_shard), pytest.raises(ObjectStoreError) as caught:
        extract(options)
    assert re.search(r"s3://bucket.*/c/1/0/0: no good answer .*HTTP 503", str(caught.value))
    assert "run the same command again" in str(caught.value)
    with pytest.raises(IncompleteStoreError, match="1 of 3 shards"):
        featcache.open(options.out)
    with proxy.failing(lambda _: None):
        assert extract(options).new == 8
    assert not any(
        request.method == "PUT" and "features/-2/c/0/" in request.path for request in proxy.seen
    )
    assert data_files(options.out) == data_files(disk.out)


def test_a_killed_job_goes_on(
    encoder_dir: Path, tmp_path: Path, bucket: ObjectPath, proxy: Proxy
) -> None:
    write_images(tmp_path / "images", 24)
    disk = options_for(encoder_dir, tmp_path / "images", tmp_path / "disk.zarr")
    extract(disk)
    out = bucket / "store.zarr"
    command = [
        sys.executable, "-c", "from cli.featcache import main; main()",
        "extract", "--model", str(encoder_dir), "--out", str(out), "--data",
        str(tmp_path / "images"), "--shard-images", "4", "--batch-size", "2",
    ]  # fmt: skip
    third = threading.Event()

    def slow(request: Request) -> Fault | None:
        if "/c/3/0/0" in request.path:
            third.set()
            return Fault("stall", seconds=5)
        return None

    with proxy.failing(slow):
        job = subprocess.Popen(command, stderr=subprocess.PIPE)
        assert third.wait(60)
        job.send_signal(signal.SIGKILL)
        job.communicate()
    result = extract(replace(disk, out=out))
    assert 0 < result.new < 24
    assert data_files(out) == data_files(disk.out)


@pytest.mark.parametrize("kind", ["processes", "ranks"])
def test_several_workers_write_into_a_bucket(
    encoder_dir: Path, tmp_path: Path, bucket: ObjectPath, proxy: Proxy, kind: str
) -> None:
    write_images(tmp_path / "images", 24)
    disk = options_for(encoder_dir, tmp_path / "images", tmp_path / "disk.zarr")
    extract(disk)
    out = bucket / "store.zarr"
    rng, lock = random.Random(0), threading.Lock()

    def sometimes(_: Request) -> Fault | None:
        with lock:
            return rng.choice([Fault("refuse"), Fault("lose")]) if rng.random() < 0.1 else None

    with proxy.failing(sometimes):
        if kind == "processes":
            assert extract(replace(disk, out=out, workers=2)).ok
        else:
            command = [
                sys.executable, "-c", "from cli.featcache import main; main()", "extract",
                "--model", str(encoder_dir), "--data", str(tmp_path / "images"), "--out", str(out),
                "--shard-images", "4", "--batch-size", "2", "--device", "cpu",
            ]  # fmt: skip
            ranks = []
            for rank in ("0", "1"):
                env = {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": bucket.bucket[5:]}
                env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
                ranks.append(subprocess.Popen(command, env=os.environ | env))
            assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
            (log,) = (out / "journal/jobs").glob("*.log")
            assert "done in" in log.read_bytes().decode()
    assert proxy.faults > 5
    assert data_files(out) == data_files(disk.out)


def test_two_jobs_on_the_same_data_both_end_well(
    encoder_dir: Path, tmp_path: Path, bucket: ObjectPath
) -> None:
    write_images(tmp_path / "images", 8)
    disk = options_for(encoder_dir, tmp_path / "images", tmp_path / "disk.zarr")
    extract(disk)
    options = replace(disk, out=bucket / "store.zarr")
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(extract, options) for _ in range(2)]
    errors = [job.exception() for job in jobs]
    # The one that ends later may find that its work was done.
    assert sum(error is None for error in errors) >= 1
    assert all(error is None or "another job" in str(error) for error in errors)
    assert extract(options).features == 8
    expected = data_files(disk.out)
    found = data_files(options.out)
    assert {name for name in found if "index" not in name} == {
        name for name in expected if "index" not in name
    }
    assert all(found[name] == expected[name] for name in expected if "index" not in name)
    assert len([path for path in (options.out / "index").iterdir() if path.is_dir()]) == 1
    with featcache.open(options.out).reader() as reader:
        assert reader.read(np.arange(8)).isfinite().all()


@pytest.mark.parametrize("begun", [False, True])
def test_of_two_jobs_with_other_plans_one_is_refused(
    encoder_dir: Path,
    tmp_path: Path,
    bucket: ObjectPath,
    monkeypatch: pytest.MonkeyPatch,
    begun: bool,
) -> None:
    """The other one plans and begins while this one has looked at the store and not planned yet."""
    write_images(tmp_path / "images", 8)
    options = options_for(encoder_dir, tmp_path / "images", bucket / "store.zarr")
    if begun:
        extract(replace(options, limit=2))
    planning = extraction.plan_extraction

    def overtaken(*args, **kwargs):
        monkeypatch.setattr(extraction, "plan_extraction", planning)
        extract(replace(options, limit=4))
        return planning(*args, **kwargs)

    monkeypatch.setattr(extraction, "plan_extraction", overtaken)
    with pytest.raises(StoreError, match=r"another job has .* meanwhile; .*run the same command"):
        extract(options)
    whole = featcache.open(options.out)
    assert whole.num_images == 4
    assert extract(options).features == 8


def test_a_plan_is_never_overwritten(encoder_dir: Path, tmp_path: Path, bucket: ObjectPath) -> None:
    write_images(tmp_path / "images", 4)
    options = options_for(encoder_dir, tmp_path / "images", bucket / "store.zarr")
    extract(options)
    plan = Plan.load(options.out / layout.plan_path(1))
    plan.save(options.out)  # the same once more: another try of one request
    plan.image_root = "/elsewhere"
    with pytest.raises(StoreError, match="another job has planned generation 1"):
        plan.save(options.out)


def test_what_is_no_store_is_left_alone(
    encoder_dir: Path, tmp_path: Path, bucket: ObjectPath
) -> None:
    write_images(tmp_path / "images", 2)
    (bucket / "photos/1.jpg").write([b"a photo"])
    with pytest.raises(StoreError, match="is no feature store"):
        extract(options_for(encoder_dir, tmp_path / "images", bucket / "photos"))
    with pytest.raises(StoreError, match="is a file"):
        extract(options_for(encoder_dir, tmp_path / "images", bucket / "photos/1.jpg"))
    assert bucket.listing() == [("photos/1.jpg", 7)]


def test_images_and_data_out_of_a_bucket(
    encoder_dir: Path, tmp_path: Path, bucket: ObjectPath, proxy: Proxy
) -> None:
    names = write_images(tmp_path / "images", 6)
    (tmp_path / "images" / "0003.png").write_bytes(b"no image")
    disk = options_for(encoder_dir, tmp_path / "images", tmp_path / "disk.zarr", max_failures=1.0)
    extract(disk)
    for name in names:
        (bucket / "some/images" / name).write([(tmp_path / "images" / name).read_bytes()])
    (bucket / "some/notes.txt").write([b"not an image"])
    with proxy.failing(times(5, Fault("cut"), lambda request: request.path.endswith(".png"))):
        listed = extract(replace(disk, data=(bucket / "some",), out=tmp_path / "listed.zarr"))
    assert proxy.faults == 5
    assert (listed.images, listed.features, listed.failures) == (6, 5, {"undecodable": 1})
    store = featcache.open(tmp_path / "listed.zarr")
    assert sorted(store.index.keys()) == [f"images/{name}" for name in names]
    assert store.source["images"] == str(bucket / "some")

    captions = write_captions(tmp_path / "captions.jsonl", [*names, "gone.png"])
    (bucket / "captions.jsonl").write([captions.read_bytes()])
    told = replace(
        disk, data=(bucket / "captions.jsonl",), image_root=bucket / "some/images",
        out=bucket / "store.zarr",
    )  # fmt: skip
    assert extract(told).failures == {"undecodable": 1, "missing": 1}
    expected = {k: v for k, v in data_files(disk.out).items() if not k.startswith("index")}
    assert {k: v for k, v in data_files(told.out).items() if not k.startswith("index")} == expected
    ref = ImageRef(str(bucket / "some/images"), "gone.png")
    with pytest.raises(ImageError, match=rf"missing: {bucket}/some/images/gone.png"):
        ref.read()


def test_data_that_a_bucket_cannot_give(
    encoder_dir: Path, tmp_path: Path, bucket: ObjectPath
) -> None:
    names = write_images(tmp_path / "images", 3)
    for name in names:
        (bucket / "images" / name).write([(tmp_path / "images" / name).read_bytes()])
    (bucket / "shards.tar").write([bytes(10_240)])
    options = options_for(encoder_dir, tmp_path / "images", tmp_path / "store.zarr")
    for wrong, message in {
        bucket / "shards.tar": r"shards.tar: a .tar file is read from a disk",
        bucket / "nothing": r"nothing does not exist; check --data",
        tmp_path / "images": r"images is on a disk, the image root s3://.* is not; check --images",
    }.items():
        with pytest.raises(ManifestError, match=message):
            extract(replace(options, data=(wrong,), image_root=bucket / "images"))
    with pytest.raises(ManifestError, match=r"images lies outside of the image root"):
        extract(replace(options, data=(bucket / "images",), image_root=tmp_path))
    captions = write_captions(tmp_path / "captions.jsonl", names)
    mixed = replace(options, data=(captions,), image_root=bucket / "images")
    assert extract(mixed).features == 3


def test_patterns_in_a_bucket(tmp_path: Path, bucket: ObjectPath) -> None:
    write_images(tmp_path / "images", 1)
    (bucket / "images/0000.png").write([(tmp_path / "images" / "0000.png").read_bytes()])
    for name in ("a", "b", "{c}"):
        file = write_captions(tmp_path / "x.jsonl", [f"{name}.png"])
        (bucket / f"data/{name}.jsonl").write([file.read_bytes()])

    def keys(pattern: str) -> list[str]:
        manifest = read_manifest([f"{bucket}/{pattern}"])
        assert manifest.image_root == bucket / "data"
        return manifest.image_keys()

    assert keys("data/{b,a}.jsonl") == ["b.png", "a.png"]
    assert keys("data/*.jsonl") == ["a.png", "b.png", "{c}.png"]
    assert keys("data/{b,[a]}.json?") == ["b.png", "a.png"]
    assert keys("data/{c}.jsonl") == ["{c}.png"]  # an object of that very name
    everywhere = read_manifest([f"{bucket}/d*/a.jsonl"], bucket / "data")
    assert everywhere.image_keys() == ["a.png"]
    for wrong, message in {
        "data/{a,z}.jsonl": r"data/z.jsonl does not exist; check --data",
        "data/*.tar": r"data/\*.tar matches nothing; check --data",
        "d*/z.jsonl": r"z.jsonl matches nothing; check --data",
        "**/a.jsonl": r"\*\* is for disks",
    }.items():
        with pytest.raises(ManifestError, match=message):
            keys(wrong)
    with pytest.raises(ManifestError, match="a bucket is named as it is"):
        read_manifest(["s3://{a,b}/x.jsonl"])


def test_a_mixture_on_a_disk_may_name_files_in_a_bucket(tmp_path: Path, bucket: ObjectPath) -> None:
    for name in ("a", "b"):
        file = write_captions(tmp_path / "x.jsonl", [f"{name}0.png", f"{name}1.png"])
        (bucket / f"{name}.jsonl").write([file.read_bytes()])
    mixture = tmp_path / "mixture.yaml"
    listed = [
        {"json_path": f"{bucket}/a.jsonl", "sampling_strategy": "first:1"},
        {"json_path": f"{bucket}/{{b,a}}.jsonl"},
    ]
    mixture.write_text(json.dumps({"datasets": listed}))
    assert read_manifest([mixture]).image_keys() == ["a0.png", "b0.png", "b1.png", "a1.png"]
    mixture.write_text(json.dumps({"datasets": [{"json_path": "ftp://host/a.json"}]}))
    with pytest.raises(ManifestError, match=r"datasets\[0\]: json_path .*unknown scheme ftp://"):
        read_manifest([mixture])


def test_an_image_in_a_tar_of_a_bucket_says_so(bucket: ObjectPath) -> None:
    (bucket / "images/00000.tar").write([bytes(10_240)])
    ref = ImageRef(str(bucket / "images"), "00000.tar/0001.jpg")
    said = r"unreadable: s3:.*/00000.tar: images in it are read from a disk; copy it there"
    with pytest.raises(ImageError, match=said):
        ref.read()
    with pytest.raises(ImageError, match=r"missing: s3:.*00001.tar/0001.jpg does not exist"):
        ImageRef(str(bucket / "images"), "00001.tar/0001.jpg").read()


def test_a_store_on_a_disk_whose_images_went_to_a_bucket(
    encoder_dir: Path, tmp_path: Path, bucket: ObjectPath, capfd: pytest.CaptureFixture[str]
) -> None:
    names = write_images(tmp_path / "images", 4)
    options = options_for(encoder_dir, tmp_path / "images", tmp_path / "store.zarr")
    extract(options)
    before = data_files(options.out)
    for name in names:
        (bucket / "images" / name).write([(tmp_path / "images" / name).read_bytes()])
    shutil.rmtree(tmp_path / "images")
    shard = options.out / "features" / "-2" / "c" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    there = ["--images", f"{bucket}/images"]
    assert main(["verify", str(options.out), "--repair", *there]) == 0
    assert data_files(options.out) == before
    assert main(["verify", str(options.out), "--live", "4", *there]) == 0
    assert "4 images encoded again" in capfd.readouterr().err
    assert main(["verify", str(options.out), "--images", f"{bucket}/nothing"]) == 2
    assert "nothing is not a directory" in capfd.readouterr().err


def test_a_large_image_of_a_bucket_is_not_read(
    bucket: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bucket / "a.png").write([b"12345"])
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 4)
    with pytest.raises(ImageError, match=r"too_large: .* has 5 bytes"):
        ImageRef(str(bucket), "a.png").read()
    with pytest.raises(ImageError, match=r"unreadable: s3:.*/a\nb.png: is no name of an object"):
        ImageRef(str(bucket), "a\nb.png").read()


def test_refusals_are_one_line_each(
    encoder_dir: Path, tmp_path: Path, bucket: ObjectPath, capfd: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", 2)
    out = str(bucket / "store.zarr")
    assert main(["extract", "--model", str(encoder_dir), "--data", str(tmp_path / "images"),
                 "--out", out]) == 0  # fmt: skip
    assert "into a bucket, whose free space is not known" in capfd.readouterr().err
    assert main(["info", out]) == 0
    assert main(["failures", out]) == 0
    assert main(["diff", out, out]) == 0
    capfd.readouterr()
    for command in (["verify", out], ["gc", out], ["convert", out, str(tmp_path / "x.h5")]):
        assert main(command) == 1
        said = capfd.readouterr().err.strip().splitlines()
        assert re.match(rf"error: {out}: `featcache {command[0]}` works on a store on a disk; copy",
                        said[-1])  # fmt: skip
    assert main(["info", "ftp://host/store.zarr"]) == 2
    assert "unknown scheme ftp://" in capfd.readouterr().err
