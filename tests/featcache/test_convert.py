"""Conversion between forms and codecs: equal bytes, honest refusals, nothing half there."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import zarr
from transformers import SiglipVisionModel

import featcache
from align.bench.synthetic import write_store
from cli.console import run
from cli.featcache import group
from featcache.codecs import CALIBRATION_IMAGES, CODECS, get_codec
from featcache.convert import ConvertProgress, convert
from featcache.encode import calibration_order
from featcache.errors import ConfigError, CorruptStoreError, FeatcacheError, StoreError
from featcache.extract import ExtractOptions, extract
from featcache.files import PARTIAL
from featcache.live import compare_live
from featcache.repair import repair
from featcache.store import Store
from featcache.summary import summarize
from featcache.verify import verify
from tests.support import Killed, Publications, feature_files, write_captions, write_images

BROKEN = "0004.png"


def options_of(encoder: Path, images: Path, out: Path, **others: object) -> ExtractOptions:
    options = ExtractOptions(
        model=str(encoder),
        data=(images,),
        out=out,
        layers=("-2", "last"),
        shard_images=4,
        batch_size=3,
        max_failures=1.0,
    )
    return replace(options, **others)


def three_generations(encoder: Path, folder: Path, **others: object) -> Path:
    """15 images, one of them broken, in generations of 5, 6 and 4, whose last shards are short;
    and a row that no key means any more."""
    write_images(folder / "images", 11)
    (folder / "images" / BROKEN).write_bytes(b"not an image")
    options = options_of(encoder, folder / "images", folder / "store.zarr", **others)
    extract(replace(options, limit=5))
    extract(options)
    write_images(folder / "images" / "more", 3, seed=1)
    write_images(folder / "tmp", 1, seed=2)
    (folder / "tmp" / "0000.png").replace(folder / "images" / "0002.png")
    extract(options)
    return options.out


@pytest.fixture(scope="session")
def stores(encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{codec: a Zarr store}."""
    return {
        codec: three_generations(encoder_dir, tmp_path_factory.mktemp(codec), codec=codec)
        for codec in CODECS
    }


@pytest.fixture(scope="session")
def fp16(stores: dict[str, Path]) -> Path:
    return stores["fp16"]


@pytest.fixture(scope="session")
def fp16_h5(fp16: Path) -> Path:
    convert(fp16, fp16.with_suffix(".h5"))
    return fp16.with_suffix(".h5")


def files_of(store: Path) -> dict[str, bytes]:
    """Every file of a Zarr store, by path."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and path.name not in ("lock", "writers")
    }


def all_of(path: Path) -> dict[str, object]:
    """Everything that a store says, by its own reader."""
    store = Store(path)
    rows = np.flatnonzero(store.index.status == 0)
    said: dict[str, object] = {
        "info": store.info,
        "keys": dict(zip(store.index.keys(), store.rows(store.index.keys()).tolist(), strict=True)),
        "failures": store.failures(),
        "plans": [store.form.plan(n + 1)[1] for n in range(store.info.generation)],
        "commits": [store.form.commit(n).render() for n in range(summarize(store.path).planned)],
        **{name: getattr(store.index, name).tobytes() for name in ("status", "sizes", "digests")},
    }
    for layer in store.layers:
        with store.reader(layer, threads=1, depth=1) as reader:
            stored = reader.read_stored(rows)
        said[layer] = stored.codes.view(torch.uint8).numpy().tobytes()
        if stored.scales is not None and stored.layer.channels is not None:
            said[f"{layer}.scales"] = stored.scales.numpy().tobytes()
            said[f"{layer}.channels"] = stored.layer.channels.numpy().tobytes()
    return said


# ----------------------------------------------------------------------------------- the same codec


@pytest.mark.parametrize("codec", CODECS)
def test_there_and_back_is_the_same_store(
    stores: dict[str, Path], codec: str, tmp_path: Path, encoder_dir: Path
) -> None:
    source = stores[codec]
    result = convert(source, tmp_path / "a.h5")
    assert (result.ok, result.images, result.codec, result.finer) == (True, 14, codec, False)
    assert all_of(tmp_path / "a.h5") == all_of(source)
    convert(tmp_path / "a.h5", tmp_path / "b.hdf5")
    convert(tmp_path / "b.hdf5", tmp_path / "c.zarr")
    assert files_of(tmp_path / "c.zarr") == files_of(source)

    images = shutil.copytree(source.parent / "images", tmp_path / "images")
    options = options_of(encoder_dir, images, tmp_path / "c.zarr", codec=codec)
    assert extract(options).new == 0
    before = feature_files(tmp_path / "c.zarr")
    write_images(images / "yet more", 2, seed=7)
    assert extract(options).new == 2
    after = feature_files(tmp_path / "c.zarr")
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("shard_images", [1, 3, 64])
@pytest.mark.parametrize("codec", ["bf16", "int4"])
def test_any_size_of_shard(
    encoder_dir: Path, tmp_path: Path, shard_images: int, codec: str
) -> None:
    source = three_generations(encoder_dir, tmp_path, shard_images=shard_images, codec=codec)
    convert(source, tmp_path / "a.h5")
    assert all_of(tmp_path / "a.h5") == all_of(source)
    convert(tmp_path / "a.h5", tmp_path / "b.zarr")
    assert files_of(tmp_path / "b.zarr") == files_of(source)


def test_zarr_to_zarr_is_a_checked_copy(fp16: Path, tmp_path: Path) -> None:
    convert(fp16, tmp_path / "copy")
    assert files_of(tmp_path / "copy") == files_of(fp16)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_store_without_pooled_outputs(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", 11, 9, 24, 4)
    convert(source, tmp_path / "b.h5")
    convert(tmp_path / "b.h5", tmp_path / "c.zarr")
    assert files_of(tmp_path / "c.zarr") == files_of(source)
    with h5py.File(tmp_path / "b.h5") as file:
        assert "pooled" not in file


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_a_store_without_rows(encoder_dir: Path, tmp_path: Path, codec: str) -> None:
    data = write_captions(tmp_path / "c.jsonl", ["a.png", "b.png"])
    source = tmp_path / "a.zarr"
    extract(options_of(encoder_dir, data, source, codec=codec))
    convert(source, tmp_path / "b.h5")
    assert all_of(tmp_path / "b.h5") == all_of(source)
    convert(tmp_path / "b.h5", tmp_path / "c.zarr")
    assert files_of(tmp_path / "c.zarr") == files_of(source)
    convert(source, tmp_path / "other.h5", "bf16")
    store = Store(tmp_path / "other.h5")
    assert (store.num_rows, store.rows(["a.png"]).tolist()) == (0, [-1])
    with store.reader() as reader:
        assert reader.read(np.array([], np.int64)).shape == (0, 9, 24)


def test_a_plan_that_is_not_finished_stays_behind(
    encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The open store is that of the last generation that was."""
    write_images(tmp_path / "images", 5)
    options = options_of(encoder_dir, tmp_path / "images", tmp_path / "a.zarr")
    extract(options)
    said = all_of(options.out)
    write_images(tmp_path / "images" / "more", 5, seed=1)
    with (
        Publications(monkeypatch).stopped(at="commit-00000003"),
        pytest.raises(Killed),
    ):
        extract(options)
    convert(options.out, tmp_path / "b.h5")
    assert {**all_of(tmp_path / "b.h5"), "commits": None} == {**said, "commits": None}
    convert(tmp_path / "b.h5", tmp_path / "c.zarr")
    assert extract(replace(options, out=tmp_path / "c.zarr")).new == 5


# ------------------------------------------------------------------------------------ another codec


@pytest.mark.parametrize("target", CODECS)
@pytest.mark.parametrize("origin", ["bf16", "int8"])
def test_another_codec(
    stores: dict[str, Path], origin: str, target: str, tmp_path: Path, encoder_dir: Path
) -> None:
    if origin == target:
        return
    source = stores[origin]
    result = convert(source, tmp_path / "a.zarr", target)
    convert(source, tmp_path / "b.h5", target)
    assert (result.lost, result.codec_from, result.codec) == ({}, origin, target)
    assert all_of(tmp_path / "a.zarr") == all_of(tmp_path / "b.h5")
    convert(tmp_path / "b.h5", tmp_path / "c.zarr")
    assert files_of(tmp_path / "c.zarr") == files_of(tmp_path / "a.zarr")

    old, new = Store(source), Store(tmp_path / "a.zarr")
    assert new.fingerprint == {**old.fingerprint, "codec": target}
    assert new.source == {**old.source, "converted_from": {"codec": origin}}
    assert new.failures() == old.failures()
    np.testing.assert_array_equal(new.index.status, old.index.status)
    rows = np.flatnonzero(old.index.status == 0)
    for layer in old.layers:
        with old.reader(layer) as before, new.reader(layer) as after:
            features, stored = before.read(rows, torch.float32), after.read_stored(rows)
        again, problems = new.layer_codec(layer).encode(features)
        assert problems == [None] * len(rows)
        assert torch.equal(again.codes, stored.codes)
        if again.scales is not None and stored.scales is not None:
            assert torch.equal(again.scales, stored.scales)

    images = shutil.copytree(source.parent / "images", tmp_path / "images")
    options = options_of(encoder_dir, images, tmp_path / "a.zarr", codec=target)
    assert extract(options).new == 0
    write_images(images / "yet more", 2, seed=7)
    assert extract(options).new == 2
    assert Store(tmp_path / "a.zarr").source["converted_from"] == {"codec": origin}


def test_how_codes_were_made_is_kept_from_first_to_last(fp16: Path, tmp_path: Path) -> None:
    convert(fp16, tmp_path / "a.h5", "int8")
    assert convert(tmp_path / "a.h5", tmp_path / "b.zarr", "bf16").finer
    lineage = {"codec": "int8", "converted_from": {"codec": "fp16"}}
    assert Store(tmp_path / "b.zarr").source["converted_from"] == lineage


def test_a_codec_is_calibrated_on_the_rows_that_extraction_takes(tmp_path: Path) -> None:
    count = CALIBRATION_IMAGES + 9
    source = write_store(tmp_path / "a.zarr", count, 3, 8, 4)
    convert(source, tmp_path / "b.h5", "int8")
    store = Store(source)
    rows = calibration_order(count)[:CALIBRATION_IMAGES]
    assert rows[:3] != [0, 1, 2]
    with store.reader() as reader:
        measured = get_codec("int8").calibrate(reader.read(np.array(rows), torch.float32))
    channels = Store(tmp_path / "b.h5").layer_codec("-2").channels
    assert measured is not None and channels is not None
    assert torch.equal(channels, measured)


def test_a_row_without_features_is_passed_over_in_calibrating(fp16: Path, tmp_path: Path) -> None:
    """The first plan has five images, of which one is broken, and one lost its key later."""
    convert(fp16, tmp_path / "b.h5", "int8")
    store = Store(fp16)
    assert store.index.status[:5].tolist() == [0, 0, 0, 0, 2]
    with store.reader("last") as reader:
        measured = get_codec("int8").calibrate(reader.read(np.arange(4), torch.float32))
    channels = Store(tmp_path / "b.h5").layer_codec("last").channels
    assert measured is not None and channels is not None
    assert torch.equal(channels, measured)


@pytest.mark.parametrize("name", ["b.zarr", "b.h5"])
def test_what_a_codec_cannot_store_is_a_ledger_entry(
    encoder_dir: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    loud = shutil.copytree(encoder_dir, tmp_path / "loud")
    model = SiglipVisionModel.from_pretrained(encoder_dir)
    with torch.no_grad():
        model.encoder.layers[0].mlp.fc2.bias[3] = 1e5
    model.save_pretrained(loud)
    write_images(tmp_path / "images", 6)
    source = tmp_path / "a.zarr"
    extract(options_of(loud, tmp_path / "images", source, codec="bf16"))
    out = tmp_path / name
    assert run(group, ["convert", str(source), str(out), "--codec", "fp16", "--json"]) == 1
    said = capsys.readouterr()
    assert "6 overflow: images that fp16 cannot store; `featcache failures" in said.err
    assert json.loads(said.out)["lost"] == {"overflow": 6}
    store = Store(out)
    assert "beyond fp16's range; use --codec bf16 (layer -2)" in store.reason("0000.png")
    assert store.num_images == 0
    assert store.sizes.tolist() == Store(source).sizes.tolist()


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["b.zarr", "b.h5"])
def test_what_is_there_is_replaced_only_by_force(
    fp16: Path, fp16_h5: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / name
    convert(fp16, out, "int8")
    before = all_of(out)
    with pytest.raises(StoreError, match=r"exists; choose another place, or replace it with --for"):
        convert(fp16_h5, out)
    assert all_of(out) == before
    convert(fp16_h5, out, force=True)
    assert all_of(out) == all_of(fp16)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_is_never_replaced(fp16: Path, fp16_h5: Path, tmp_path: Path) -> None:
    for source, out in (
        (fp16, fp16),
        (fp16_h5, fp16_h5),
        (fp16, fp16 / "a.h5"),
        (fp16, fp16.parent),
    ):
        with pytest.raises(StoreError, match="is, holds or is inside the store to convert"):
            convert(source, out, force=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis.h5").write_text("chapter one")
    with pytest.raises(StoreError, match="exists and is no Zarr store of featcache; choose ano"):
        convert(fp16, tmp_path / "thesis", force=True)
    with pytest.raises(StoreError, match="exists and is no HDF5 file"):
        convert(fp16, tmp_path / "thesis.h5", force=True)
    assert (tmp_path / "thesis.h5").read_text() == "chapter one"
    zarr.create_group(tmp_path / "foreign.zarr", attributes={"of": "another program"})
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["a"] = [1, 2]
    for name in ("foreign.zarr", "foreign.h5"):
        with pytest.raises(StoreError, match=rf"{name} exists and is no .* of featcache"):
            convert(fp16, tmp_path / name, force=True)
        assert (tmp_path / name).exists()
    for name in ("circle", "circle.h5"):
        (tmp_path / name).symlink_to(name)
        with pytest.raises(StoreError, match=rf"{name}: cannot write \(Too many levels of symb"):
            convert(fp16, tmp_path / name, force=True)
        assert (tmp_path / name).is_symlink()


@pytest.mark.parametrize("name", ["b.zarr", "b.h5"])
def test_what_cannot_fit_is_refused_before_work(
    fp16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match=r"needs 0\.0 GB more .* free some space, or choose anoth"):
        convert(fp16, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_an_unknown_codec(fp16: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown codec 'fp61'"):
        convert(fp16, tmp_path / "a.h5", "fp61")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["b.zarr", "b.h5"])
def test_two_conversions_to_one_place(fp16: Path, tmp_path: Path, name: str) -> None:
    seen = []

    def second(progress: ConvertProgress) -> None:
        if progress.done and not seen:
            with pytest.raises(StoreError, match="another process is writing"):
                convert(fp16, tmp_path / name)
            seen.append(progress)

    convert(fp16, tmp_path / name, on_progress=second)
    assert seen
    assert all_of(tmp_path / name) == all_of(fp16)


# --------------------------------------------------------------------------------- damage and kills


@pytest.mark.parametrize("name", ["b.zarr", "b.h5"])
def test_a_damaged_row_stops_the_conversion(fp16: Path, tmp_path: Path, name: str) -> None:
    source = shutil.copytree(fp16, tmp_path / "a.zarr")
    shard = source / "features/last/c/2/0/0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:4096] + b"\xff" + whole[4097:])
    with pytest.raises(
        CorruptStoreError, match=r"c/2/0/0: the features of row 9 .* verify .*a\.zarr --repair"
    ):
        convert(source, tmp_path / name)
    assert not (tmp_path / name).exists()
    shard.write_bytes(whole)
    assert convert(source, tmp_path / name).resumed == (5 if name == "b.zarr" else 0)
    assert all_of(tmp_path / name) == all_of(fp16)
    assert {path.name for path in tmp_path.iterdir()} == {"a.zarr", name}


def test_every_kill_of_a_conversion_to_zarr_is_taken_up(
    fp16: Path, fp16_h5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publications = Publications(monkeypatch)
    whole, out = files_of(fp16), tmp_path / "b.zarr"
    after, resumed = 0, set()
    while True:
        try:
            with publications.stopped(after=after):
                convert(fp16_h5, out)
        except Killed:
            assert not out.exists()
            resumed.add(convert(fp16_h5, out).resumed)
            assert files_of(out) == whole
            shutil.rmtree(out)
            after += 7
            continue
        break
    assert {0, 4, 9, 15} <= resumed


def test_a_stopped_conversion_of_another_codec_is_swept(
    fp16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "b.zarr"
    with Publications(monkeypatch).stopped(at="commit-00000002"), pytest.raises(Killed):
        convert(fp16, out, "int8")
    assert convert(fp16, out, "fp16").resumed == 0
    assert files_of(out) == files_of(fp16)


def test_a_killed_conversion_to_hdf5_leaves_nothing_under_the_name(
    fp16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "b.h5"
    with Publications(monkeypatch).stopped(after=0), pytest.raises(Killed):
        convert(fp16, out)
    assert [path.name for path in tmp_path.iterdir()] == [f"{PARTIAL}b.h5"]
    convert(fp16, out)
    assert [path.name for path in tmp_path.iterdir()] == ["b.h5"]
    assert all_of(out) == all_of(fp16)


def test_a_process_killed_while_it_writes_hdf5(fp16: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from featcache.convert import convert\n"
        "def kill(progress):\n    if progress.done >= 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), on_progress=kill)"
    )
    out = tmp_path / "b.h5"
    done = subprocess.run([sys.executable, "-c", code, fp16, out], capture_output=True)
    assert done.returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == [f"{PARTIAL}b.h5"]
    with pytest.raises(FeatcacheError):
        featcache.open(tmp_path / f"{PARTIAL}b.h5")
    convert(fp16, out)
    assert all_of(out) == all_of(fp16)


def same_or_one_line(path: Path, whole: dict[str, object]) -> bool:
    """Whether the file still says what it said; else it must be refused in one line."""
    try:
        said = all_of(path)
    except FeatcacheError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return False
    assert said == whole
    return True


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_changed_bytes_are_found(stores: dict[str, Path], tmp_path: Path, codec: str) -> None:
    """40 anywhere, and 40 in the structure of the file, which is libhdf5's to read."""
    path = tmp_path / "a.h5"
    convert(stores[codec], path)
    whole, content = all_of(path), path.read_bytes()
    with h5py.File(path) as file:
        places: list[tuple[int, int]] = []
        file.visititems(
            lambda _, found: (
                isinstance(found, h5py.Dataset)
                and found.id.get_offset() is not None
                and places.append((found.id.get_offset(), found.id.get_storage_size()))
            )
        )
    values = {at for start, length in places for at in range(start, start + length)}
    structure = [at for at in range(len(content)) if at not in values]
    rng = np.random.default_rng(0)
    chosen = [*rng.integers(len(content), size=40), *rng.choice(structure, 40)]
    found = 0
    for at in map(int, chosen):
        changed = bytearray(content)
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        same = same_or_one_line(path, whole)
        assert same or not verified(path)
        found += not same
    assert found > 10


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_the_structure_holds_no_text_without_a_checksum(
    stores: dict[str, Path], tmp_path: Path, codec: str
) -> None:
    """A size of 0 in a global heap keeps libhdf5 busy for ever; texts of any length lie in one."""
    convert(stores[codec], tmp_path / "a.h5")
    assert b"GCOL" not in (tmp_path / "a.h5").read_bytes()
    with h5py.File(tmp_path / "a.h5") as file:
        assert json.loads(file.attrs["featcache"])["codec"] == codec


def verified(path: Path) -> bool:
    try:
        report = verify(path)
    except FeatcacheError:
        return False
    assert all("\n" not in str(problem) for problem in report.problems)
    return report.ok


@pytest.mark.parametrize("codec", CODECS)
def test_verify_of_an_hdf5_file(stores: dict[str, Path], tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a.h5"
    convert(stores[codec], path)
    report, of_folder = verify(path), verify(stores[codec])
    assert report.ok and report.nbytes
    counts = ("generations", "shards", "rows", "images")
    assert [getattr(report, n) for n in counts] == [getattr(of_folder, n) for n in counts]
    outcome = compare_live(path, 3)
    assert (outcome.compared, outcome.wrong) == (3, ())
    assert set(outcome.worst) == {"-2", "last", "pooled"}

    content = bytearray(path.read_bytes())
    row_bytes = Store(path).layer_codec("last").code_bytes
    with h5py.File(path) as file:
        features, pooled = (file[name].id.get_offset() for name in ("features/last", "pooled"))
        width = file["pooled"].dtype.itemsize * file["pooled"].shape[1]
    content[features + 2 * row_bytes + 7] ^= 1  # row 2, of shard 0
    content[pooled + 9 * width] ^= 1  # row 9, of shard 2
    path.write_bytes(content)
    report = verify(path)
    assert [(p.where, p.rows, p.keys, p.cure) for p in report.problems] == [
        ("shard 0", (2,), ("0002.png",), ""),
        ("shard 2", (9,), ("0006.png",), ""),
    ]
    assert report.images == of_folder.images - 2
    with pytest.raises(StoreError, match=r"is an HDF5 file, which cannot be mended; take another"):
        repair(path)
    path.write_bytes(content[:-1])
    (problem,) = verify(path).problems
    assert "it ends before" in str(problem) or "damaged" in str(problem)


def test_verify_of_an_hdf5_file_by_the_command(
    fp16_h5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(group, ["verify", str(fp16_h5), "--live", "2"]) == 0
    shown = capsys.readouterr().err
    assert "14 images in 5 shards of 3 generations" in shown and "whole" in shown
    path = tmp_path / "a.h5"
    path.write_bytes(fp16_h5.read_bytes()[:-5000])
    assert run(group, ["verify", str(path)]) == 1
    shown = capsys.readouterr().err
    assert "error: 1 problem; nothing can mend that; take another copy, or make it again" in shown


def test_a_truncated_file_is_found(fp16_h5: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    whole, content = all_of(fp16_h5), fp16_h5.read_bytes()
    for length in (*np.linspace(0, len(content) - 1, 23).astype(int).tolist(), 8, 96):
        path.write_bytes(content[:length])
        assert not same_or_one_line(path, whole)


def test_a_damaged_file_cannot_be_converted(fp16_h5: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    content = bytearray(fp16_h5.read_bytes())
    with h5py.File(fp16_h5) as file:
        content[file["features/-2"].id.get_offset() + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptStoreError, match=r"of row 0 \(of shard 0, 1 rows\) are not the byt"):
        convert(path, tmp_path / "b.zarr")
    with (
        featcache.open(path).reader() as reader,
        pytest.raises(CorruptStoreError, match=r"row 0 are not .* take another copy of the file"),
    ):
        reader.read(np.array([0]))


def test_a_foreign_or_repacked_hdf5_file(fp16_h5: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = np.arange(3)
    with pytest.raises(StoreError, match="is an HDF5 file without features of featcache"):
        featcache.open(tmp_path / "foreign.h5")
    path = tmp_path / "packed.h5"
    shutil.copy(fp16_h5, path)
    with h5py.File(path, "r+") as file:
        values = file["features/-2"][:]
        del file["features/-2"]
        file.create_dataset("features/-2", data=values, chunks=(1, 9, 24), compression="gzip")
    with pytest.raises(CorruptStoreError, match=r"features/-2 is chunked or compressed.*h5repack"):
        featcache.open(path).reader()


# ---------------------------------------------------------------------------------- living together


def test_other_handles_on_the_file_do_not_matter(fp16_h5: Path) -> None:
    rows = np.array([0, 9])
    with h5py.File(fp16_h5) as file, featcache.open(fp16_h5).reader() as reader:
        assert torch.equal(reader.read(rows), torch.from_numpy(file["features/-2"][:][rows]))


def test_a_closed_store_leaves_no_file_open(fp16_h5: Path) -> None:
    def count() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    for _ in range(3):
        store = featcache.open(fp16_h5)
        with store.reader() as reader:
            reader.read(np.array([0, 9]))
    del store, reader
    assert count() == before


def test_many_feature_files_in_the_description(fp16: Path, tmp_path: Path) -> None:
    """HDF5 attributes in the object header end at 64 KB."""
    source = shutil.copytree(fp16, tmp_path / "a.zarr")
    store = Store(source)
    store.info.source["data"] = [f"/data/{i:06d}.jsonl" for i in range(10_000)]
    store.info.save(source)
    convert(source, tmp_path / "b.h5")
    assert Store(tmp_path / "b.h5").info == store.info


def test_the_commands(fp16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b.h5"
    assert run(group, ["convert", str(fp16), str(out), "--codec", "int8"]) == 0
    said = capsys.readouterr().err
    assert "14 images in int8" in said
    assert "the features keep the rounding of fp16; int8 adds its own" in said
    assert run(group, ["info", str(out), "--json"]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["shards"] == {"committed": 5, "planned": 5}
    assert document["bytes"] == out.stat().st_size
    assert re.search(r"converted from +fp16\n", shown.err)
    assert run(group, ["failures", str(out)]) == 0
    assert "1 images without features" in capsys.readouterr().err
    assert run(group, ["convert", str(out), str(tmp_path / "c.zarr"), "--codec", "fp16"]) == 0
    assert "fp16 does not bring back what that lost" in capsys.readouterr().err


PEAK_BYTES = """
import sys
from pathlib import Path
import torch
import zarr
torch.set_num_threads(1)
from featcache.convert import convert
source, out, codec = sys.argv[1:]
convert(Path(source), Path(out), codec)
# ru_maxrss would be at least that of the process that started this one.
lines = Path("/proc/self/status").read_text().splitlines()
print(next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize(("name", "codec"), [("b.h5", "fp16"), ("b.zarr", "bf16")])
def test_memory_does_not_grow_with_the_number_of_images(
    tmp_path: Path, name: str, codec: str
) -> None:
    def peak_bytes(images: int) -> int:
        source = write_store(tmp_path / f"{images}.zarr", images, 64, 512, shard_images=16)
        done = subprocess.run(
            [sys.executable, "-c", PEAK_BYTES, source, tmp_path / f"{images}-{name}", codec],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return int(done.stdout)

    few, many = peak_bytes(100), peak_bytes(700)
    features_bytes = 600 * 64 * 512 * 2
    # 39 MB more features were written; measured growth, of 79 MB even: 0.8 MB.
    assert many - few < features_bytes / 6
