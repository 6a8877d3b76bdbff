"""Verification, repair and the live check, case by case. Random damage is in tests/faults."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image
from transformers import SiglipVisionModel

import featcache
from align.bench.synthetic import write_store
from benchmarks.bench_verify import measure
from cli.console import run
from cli.featcache import group
from featcache import encode, encoders, extract, layout, live, repair
from featcache.codecs import CODECS
from featcache.encoders import Encoder, Preprocessing
from featcache.errors import FingerprintMismatch, StoreError
from featcache.extract import ExtractOptions
from featcache.files import seal_of
from featcache.journal import Commit
from featcache.live import COMPUTE_NOISE, compare_live
from featcache.store import Store
from featcache.verify import verify
from tests.support import Killed, Publications, feature_files, write_images

COUNT = 11
BROKEN = "0004.png"


@pytest.fixture(params=["fp16", "int8"])
def options(request: pytest.FixtureRequest, encoder_dir: Path, tmp_path: Path) -> ExtractOptions:
    """11 images in shards of 4 and batches of 2, two layers, one image broken; extracted."""
    write_images(tmp_path / "images", COUNT)
    (tmp_path / "images" / BROKEN).write_bytes(b"not an image")
    options = ExtractOptions(
        model=str(encoder_dir), data=(tmp_path / "images",), out=tmp_path / "store.zarr",
        layers=("-2", "last"), codec=request.param, shard_images=4, batch_size=2, max_failures=0.1,
    )  # fmt: skip
    extract.extract(options)
    return options


def spoil(path: Path, at: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def counted_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that encoders get from now on."""
    sizes: list[int] = []
    encode = Encoder.encode

    def counted(self: Encoder, pixels: torch.Tensor) -> encoders.Encoded:
        sizes.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(Encoder, "encode", counted)
    return sizes


def without_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Encoder:
        raise AssertionError("no encoder is needed")

    monkeypatch.setattr(repair, "load_encoder", refuse)


def state(root: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in root.rglob("*")
    }


# ------------------------------------------------------------------------------------- verification


def test_a_whole_store(options: ExtractOptions) -> None:
    before = state(options.out)
    report = verify(options.out)
    assert (report.problems, report.notes) == ((), ())
    assert (report.generations, report.shards, report.rows, report.images) == (1, 3, 11, 10)
    sizes = [path.stat().st_size for path in options.out.glob("features/*/c/*/0/0")]
    assert len(sizes) == 6
    assert report.nbytes == sum(sizes) + sum(
        path.stat().st_size
        for pattern in ("pooled/c/*/0", "scales/*/c/*/0")
        for path in options.out.glob(pattern)
    )
    assert state(options.out) == before


def test_a_problem_names_file_shard_rows_and_keys(options: ExtractOptions) -> None:
    path = "features/last/c/1/0/0"
    spoil(options.out / path, 2 * 4096 + 7)  # slot 2 of shard 1
    (problem,) = verify(options.out).problems
    assert (problem.where, problem.shard, problem.rows, problem.keys) == (
        path, 1, (6,), ("0006.png",)
    )  # fmt: skip
    assert str(problem) == (
        f"{path}: is not what was written (its checksum differs); bad rows: 6 (0006.png)"
    )


@pytest.mark.parametrize("where", ["padding", "index", "failed row"])
def test_damage_outside_the_rows_needs_no_encoder(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole = feature_files(options.out)
    if where == "failed row":
        spoil(options.out / "pooled/c/1/0", 3)  # slot 0 of shard 1 is BROKEN
    else:
        spoil(options.out / "features/-2/c/1/0/0", -2 if where == "index" else 4096 + 4095)
    (problem,) = verify(options.out).problems
    assert problem.rows == ()
    assert problem.what.endswith("; every row is whole")
    without_encoder(monkeypatch)
    report = repair.repair(options.out)
    assert report.ok
    assert report.mended == (problem,)
    assert feature_files(options.out) == whole


def test_infinite_values_under_a_right_checksum(options: ExtractOptions) -> None:
    """Whoever wrote them, also wrote their checksums."""
    if options.codec == "fp16":
        path, at = "features/-2/c/0/0/0", 4096
        value = np.array([np.inf], np.float16).tobytes()
    else:
        path, at = "scales/-2/c/0/0", 9 * 4
        value = np.array([np.nan], np.float32).tobytes()
    raw = bytearray((options.out / path).read_bytes())
    raw[at : at + len(value)] = value
    (options.out / path).write_bytes(raw)
    commit = Commit.load(options.out, 0)
    assert commit is not None
    codes = (options.out / "features/-2/c/0/0/0").read_bytes()[4096:]
    checksum = xxhash.xxh3_64(codes[: 9 * 24 * (2 if options.codec == "fp16" else 1)])
    if options.codec == "int8":
        checksum.update(bytes(raw[9 * 4 : 2 * 9 * 4]))
    commit.rows[1].checksums["-2"] = checksum.intdigest()
    commit.files[path] = seal_of(options.out / path)
    commit.save(options.out)
    first = verify(options.out).problems[0]
    assert first.what == "values that are not finite were stored; bad rows: 1 (0001.png)"
    assert repair.repair(options.out).ok
    with featcache.open(options.out).reader() as reader:
        assert reader.read(np.array([1])).isfinite().all()


def test_what_a_stopped_run_left_is_no_problem(
    options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images" / "more", 6, seed=4)
    monkeypatch.setattr(encode, "WRITERS", 1)  # so that shards are published in order
    publications = Publications(monkeypatch)
    with publications.stopped(at="commit-00000004"), pytest.raises(Killed):
        extract.extract(options)
    report = verify(options.out)
    assert report.ok
    assert report.notes[-1].startswith("1 planned shards are not there yet")
    assert any(".partial-" in note for note in report.notes)
    assert repair.repair(options.out).ok
    assert not list(options.out.rglob(".partial-*"))
    assert extract.extract(options).new == 2


def test_a_store_that_is_being_written(options: ExtractOptions) -> None:
    with (options.out / "journal/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for check in (verify, repair.repair):
            with pytest.raises(StoreError, match="another process is writing"):
                check(options.out)


def test_what_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "store.h5").write_bytes(b"\x89HDF")
    with pytest.raises(StoreError, match=r"store\.h5 is a file"):
        verify(tmp_path / "store.h5")
    with pytest.raises(StoreError, match=r"not a feature store \(no such directory\)"):
        verify(tmp_path / "none")
    with pytest.raises(StoreError, match="not a feature store"):
        repair.repair(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store.h5"]


# ------------------------------------------------------------------------------------------- repair


def test_only_batches_with_a_bad_row_are_encoded(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = feature_files(options.out)
    spoil(options.out / "features/-2/c/0/0/0", 4096)  # slot 1: with slot 0 in a batch
    spoil(options.out / "pooled/c/1/0", 48)  # slot 1: with BROKEN, so alone in its batch
    sizes = counted_batches(monkeypatch)
    assert repair.repair(options.out).ok
    assert sorted(sizes) == [1, 2]
    assert feature_files(options.out) == whole
    assert verify(options.out).ok


def test_a_bad_row_without_image_costs_no_good_row(options: ExtractOptions, tmp_path: Path) -> None:
    (tmp_path / "images/0005.png").unlink()
    (tmp_path / "images/0006.png").unlink()  # gone too, but its features are whole
    before = feature_files(options.out)
    spoil(options.out / "features/-2/c/1/0/0", 4096)  # row 5
    report = repair.repair(options.out)
    assert (report.ok, report.problems, report.notes) == (False, (), ())
    (lost,) = report.lost
    assert lost.startswith("row 5 (0005.png) was damaged and has no features any more: missing: ")
    store = featcache.open(options.out)
    assert store.rows(["0005.png", "0006.png", "0007.png"]).tolist() == [-1, 6, 7]
    assert {failure.reason for failure in store.failures()} == {"undecodable", "missing"}
    with store.reader() as reader:
        reader.read(np.array([6, 7]))
    assert verify(options.out).ok
    after = feature_files(options.out)
    assert {path for path in before if before[path] != after[path]} <= {
        "features/-2/c/1/0/0", "features/last/c/1/0/0", "pooled/c/1/0", "scales/-2/c/1/0",
        "scales/last/c/1/0",
    }  # fmt: skip


def test_a_lost_commit_record_is_told_by_the_index(
    options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, failures = feature_files(options.out), featcache.open(options.out).failures()
    (options.out / "journal/commit-00000001.json").unlink()
    shutil.rmtree(tmp_path / "images")
    without_encoder(monkeypatch)
    assert repair.repair(options.out).ok
    assert feature_files(options.out) == whole
    assert featcache.open(options.out).failures() == failures


def test_without_record_index_and_image_a_shard_stays_as_it_is(
    options: ExtractOptions, tmp_path: Path
) -> None:
    whole = feature_files(options.out)
    (options.out / "journal/commit-00000000.json").unlink()
    shutil.rmtree(options.out / "index")
    image = tmp_path / "images/0002.png"
    image.rename(tmp_path / "elsewhere.png")
    report = repair.repair(options.out)
    assert not report.ok
    assert report.problems[0].where == "journal/commit-00000000.json"
    assert "1 of its images cannot be found to encode them again (first: missing" in str(
        report.problems[0]
    )
    assert feature_files(options.out) == whole
    (tmp_path / "elsewhere.png").rename(image)
    assert repair.repair(options.out).ok
    assert feature_files(options.out) == whole


def test_the_encoder_must_be_the_stores(
    options: ExtractOptions, encoder_dir: Path, tmp_path: Path
) -> None:
    """Without it, what needs none is mended all the same; with another folder's name it works."""
    moved = shutil.copytree(encoder_dir, tmp_path / "moved")
    noisy = shutil.copytree(encoder_dir, tmp_path / "noisy")
    add_noise(noisy, 0.01)
    whole = feature_files(options.out)
    spoil(options.out / "features/-2/c/0/0/0")
    (options.out / "journal/zarr.json").unlink()
    report = repair.repair(options.out, model=str(noisy))
    assert [problem.where for problem in report.mended] == ["journal/zarr.json"]
    assert "it cannot be mended" in str(report.problems[0])
    assert "encoder.weights" in str(report.problems[0])
    with pytest.raises(FingerprintMismatch, match=r"encoder\.weights"):
        compare_live(options.out, 1, model=str(noisy))
    assert repair.repair(options.out, model=str(moved)).ok
    assert feature_files(options.out) == whole


def test_lost_channel_values_are_measured_again(encoder_dir: Path, tmp_path: Path) -> None:
    """To the same bytes, or not at all."""
    write_images(tmp_path / "images", 6)
    options = ExtractOptions(
        model=str(encoder_dir), data=(tmp_path / "images",), out=tmp_path / "store.zarr",
        codec="int8", shard_images=4, batch_size=2,
    )  # fmt: skip
    extract.extract(options)
    whole = feature_files(options.out)
    for place in ("channels/-2", "journal/copy/channels/-2"):
        shutil.rmtree(options.out / place)
    image = (tmp_path / "images/0003.png").rename(tmp_path / "elsewhere.png")
    report = repair.repair(options.out)
    assert [problem.where for problem in report.problems] == [
        "channels/-2", "journal/copy/channels/-2"
    ]  # fmt: skip
    assert "measured again, it comes out otherwise" in str(report.problems[0])
    assert not (options.out / "channels/-2").exists()
    image.rename(tmp_path / "images/0003.png")
    assert repair.repair(options.out).ok
    assert feature_files(options.out) == whole


def test_images_that_were_moved(options: ExtractOptions, tmp_path: Path) -> None:
    whole = feature_files(options.out)
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    spoil(options.out / "features/-2/c/0/0/0")
    assert repair.repair(options.out, images=moved).notes == ()
    assert feature_files(options.out) == whole
    assert compare_live(options.out, 3, images=moved).compared == 3


def test_random_weights_are_encoded_again(options: ExtractOptions, tmp_path: Path) -> None:
    random = replace(options, random_weights=True, out=tmp_path / "random.zarr")
    extract.extract(random)
    whole = feature_files(random.out)
    spoil(random.out / "features/-2/c/0/0/0")
    assert repair.repair(random.out).ok
    assert feature_files(random.out) == whole


def test_a_stop_at_any_publication_of_a_repair(
    options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = feature_files(options.out)
    rows = featcache.open(options.out).rows([f"{i:04d}.png" for i in range(COUNT)]).tolist()
    spoil(options.out / "features/-2/c/0/0/0")
    (options.out / "journal/commit-00000001.json").write_bytes(b"{")
    (options.out / "pooled/c/2/0").unlink()
    (options.out / "journal/copy/plan-00000001.npz").unlink()
    (options.out / "journal/copy/zarr.json").unlink()
    (options.out / "index/00000001/checksums/zarr.json").unlink()
    with (options.out / "zarr.json").open("a") as file:
        file.write(" ")  # the values are whole, the bytes are not; the copy of it is gone
    damaged = options.out
    publications = Publications(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # most of the time, and nothing to this test
    shutil.copytree(damaged, tmp_path / "once.zarr")
    assert repair.repair(tmp_path / "once.zarr").ok
    total = publications.count
    assert total > 10
    for last in range(total):
        store = shutil.copytree(damaged, tmp_path / f"{last}.zarr")
        with publications.stopped(after=last), pytest.raises(Killed):
            repair.repair(store)
        assert repair.repair(store).ok
        assert feature_files(store) == whole
        assert verify(store).ok
        assert featcache.open(store).rows([f"{i:04d}.png" for i in range(COUNT)]).tolist() == rows
        assert not list(store.rglob(".partial-*"))
        shutil.rmtree(store)


# --------------------------------------------------------------------------------------------- live


def add_noise(folder: Path, relative: float) -> None:
    """Noise of so much of each weight's own spread."""
    model = SiglipVisionModel.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.numel() > 1:
                noise = torch.randn(weight.shape, generator=generator)
                weight += relative * weight.std() * noise
    model.save_pretrained(folder)


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("model", ["random", "tiny"])
def test_a_live_encoding_agrees(encoder_dir: Path, tmp_path: Path, codec: str, model: str) -> None:
    """Batches of one against the stored batches of 16.

    Largest relative L2 error of an image that was measured, over both layers, both encoders and 40
    images, and the smallest tolerance there: fp16 6.6e-5 of 3.6e-4, bf16 6.1e-6 of 9.4e-4, int8
    1.6e-7 of 1.4e-3, fp8 1.6e-7 of 3.1e-3, int4 1.2e-7 of 5.8e-3; pooled 7.4e-7 of 3.1e-4. (In
    the scaled codecs no code flipped, and what is left is the noise in the patch scales.)
    """
    write_images(tmp_path / "images", 40)
    options = ExtractOptions(
        model=str(encoder_dir) if model == "random" else model, data=(tmp_path / "images",),
        out=tmp_path / "store.zarr", layers=("-2", "last"), codec=codec,
    )  # fmt: skip
    extract.extract(options)
    report = compare_live(options.out, 1000)
    assert (report.asked, report.compared, report.wrong) == (40, 40, ())
    assert set(report.worst) == {"-2", "last", "pooled"}
    for name, worst in report.worst.items():
        assert worst <= report.tolerance[name] / 2
    fewer = compare_live(options.out, 3, seed=1)
    assert (fewer.asked, fewer.compared) == (3, 3)


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("how", ["interpolation", "layer", "noise"])
def test_a_store_made_by_other_means_is_caught(
    encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, how: str
) -> None:
    """The fingerprint is the encoder's as it should be; the features are not."""
    write_images(tmp_path / "images", 6)
    options = ExtractOptions(
        model=str(encoder_dir), data=(tmp_path / "images",), out=tmp_path / "store.zarr",
        codec=codec,
    )  # fmt: skip
    with monkeypatch.context() as tampered:
        if how == "interpolation":

            def resize(self: Preprocessing, image: Image.Image) -> np.ndarray:
                return np.array(image.resize(self.size, Image.Resampling.BICUBIC))

            from featcache import fingerprint as module

            stated = module.pixel_probe(encoders.load_encoder(str(encoder_dir)).preprocessing)
            tampered.setattr(module, "pixel_probe", lambda _: stated)
            tampered.setattr(Preprocessing, "resize", resize)
        else:
            honest = encoders.load_encoder(str(encoder_dir))
            other = honest
            if how == "noise":
                noisy = shutil.copytree(encoder_dir, tmp_path / "noisy")
                add_noise(noisy, 0.01)
                other = encoders.load_encoder(str(noisy))
            else:
                other = encoders.load_encoder(str(encoder_dir), layers=("-3",))
            forward = other._forward

            def encode(_: Encoder, pixels: torch.Tensor) -> encoders.Encoded:
                encoded = forward(pixels)
                return encoders.Encoded(
                    {"-2": next(iter(encoded.features.values()))}, encoded.pooled
                )

            tampered.setattr(Encoder, "encode", torch.inference_mode()(encode))
        extract.extract(options)
    assert verify(options.out).ok
    report = compare_live(options.out, 4)
    assert report.compared == 4
    assert sum("layer -2" in line for line in report.wrong) == 4
    assert "against a live encoding" in report.wrong[0]


def test_images_that_are_gone_are_not_compared(options: ExtractOptions, tmp_path: Path) -> None:
    (tmp_path / "images/0003.png").unlink()
    write_images(tmp_path / "other", 1, seed=9)
    shutil.copy(tmp_path / "other/0000.png", tmp_path / "images/0005.png")
    report = compare_live(options.out, 100)
    assert (report.asked, report.compared) == (10, 8)
    assert [line.split(":")[0:2] for line in report.not_compared] == [
        ["row 3 (0003.png)", " missing"],
        ["row 5 (0005.png)", " changed"],
    ]


def test_an_error_is_told_beside_the_tolerance_of_its_own_image(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images have tolerances of their own: the smallest of all says nothing of another's error."""
    stored = live._stored

    def off(store: Store, row: int) -> dict[str, torch.Tensor]:
        error, bound = (0.1, 0.2) if row == 0 else (0.01, 0.015)
        monkeypatch.setattr(live, "tolerance", lambda *_: bound)
        return {name: values * (1 + error) for name, values in stored(store, row).items()}

    monkeypatch.setattr(live, "_stored", off)
    report = compare_live(options.out, 100)
    assert report.wrong == ()
    for name, worst in report.worst.items():
        assert (worst, report.tolerance[name]) == pytest.approx((0.01, 0.015), rel=0.05)


def test_a_seed_below_zero_is_wrong_usage(
    options: ExtractOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(group, ["verify", str(options.out), "--live", "1", "--seed", "-1"]) == 2
    assert "'--seed': -1 is not in the range x>=0" in capsys.readouterr().err


def test_tolerance_follows_noise_and_codec() -> None:
    values = torch.randn(1, 9, 24, generator=torch.Generator().manual_seed(0))
    exact = live.tolerance(values, values, 1e-5)
    halves = live.tolerance(values, values.half().float(), 1e-5)
    bytes_ = live.tolerance(values, (values * 32).round() / 32, 1e-5)
    assert exact == pytest.approx(4e-5)
    assert exact < halves < bytes_ < live.tolerance(values, values, COMPUTE_NOISE["bfloat16"])


def test_the_benchmark_runs(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store.zarr", 20, num_patches=16, width=32, shard_images=8)
    rows = measure(store, rounds=1)
    assert {row["x"] for row in rows} == {1, 2}
    assert all(row["p50"] > 0 and row["ceiling"] > 0 for row in rows)


# ---------------------------------------------------------------------------------------------- cli


def test_the_command(
    options: ExtractOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(options.out)

    def command(*argv: str) -> tuple[int, dict, str]:
        capsys.readouterr()
        code = run(group, ["verify", store, *argv, "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]), err

    code, document, err = command("--live", "2")
    assert (code, document["ok"], document["problems"]) == (0, True, [])
    assert document["live"]["compared"] == 2
    assert f"{store}: 10 images in 3 shards of 1 generation," in err
    assert "live: 2 images encoded again; largest relative error: layer -2: " in err

    spoil(options.out / "features/-2/c/0/0/0")
    code, document, err = command()
    assert (code, document["ok"], len(document["problems"])) == (1, False, 1)
    assert document["problems"][0]["rows"] == [0]
    assert "problem: features/-2/c/0/0/0: is not what was written" in err
    assert f"error: 1 problem; `featcache verify {store} --repair` mends all" in err
    assert "Traceback" not in err

    code, document, err = command("--repair")
    assert (code, document["ok"], len(document["mended"])) == (0, True, 1)
    assert "mended: features/-2/c/0/0/0" in err
    assert command()[0] == 0

    shutil.rmtree(tmp_path / "images")
    code, document, err = command("--live", "2")
    assert (code, document["live"]["compared"]) == (1, 0)
    assert "error: no image could be encoded again" in err

    shutil.rmtree(options.out / "journal")
    code, document, err = command("--repair")
    assert code == 1
    assert "error: " in err and "could not be mended" in err
    assert layout.plan_path(1) in err
