"""Collections: what they free, what stays, and a stop at every single publication of one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import featcache
from cli import console
from cli.featcache import group
from featcache.convert import convert
from featcache.errors import CorruptStoreError, IncompleteStoreError, StoreError
from featcache.extract import ExtractOptions, extract
from featcache.files import seal_of
from featcache.gc import GcResult, collect
from featcache.journal import Commit, Journal, locked
from featcache.layout import Status
from featcache.reader import FeatureReader
from tests.support import Killed, Publications, feature_files, write_images

COUNT = 10
CHANGED = [1, 3, 4, 5, 6, 7]
"""Images whose bytes change: one of a shard, its last, and all four of the second."""


@pytest.fixture(params=["fp16", "int8"])
def options(
    request: pytest.FixtureRequest, encoder_dir: Path, images_dir: Path, tmp_path: Path
) -> ExtractOptions:
    """Ten images in shards of 4, six of which have changed since: rows 12 to 17."""
    options = ExtractOptions(
        model=str(encoder_dir), data=(images_dir,), out=tmp_path / "store.zarr",
        shard_images=4, batch_size=3, codec=request.param, layers=("-2", "last"),
    )  # fmt: skip
    extract(options)
    write_images(tmp_path / "before" / "new", COUNT, seed=5)
    for i in CHANGED:
        (images_dir / f"{i:04d}.png").replace(tmp_path / "before" / f"{i:04d}.png")
        (tmp_path / "before" / "new" / f"{i:04d}.png").replace(images_dir / f"{i:04d}.png")
    assert extract(options).new == len(CHANGED)
    return options


def features(root: Path) -> dict[str, torch.Tensor]:
    """Of every key and layer, each row checked against its checksum."""
    store = featcache.open(root)
    keys = sorted(store.index.keys())
    assert len(keys) >= COUNT and (store.rows(keys) >= 0).all()
    found = {}
    for layer in store.layers:
        with store.reader(layer) as reader:
            values = reader.read(store.rows(keys))
            assert values.isfinite().all()
            found |= {f"{layer} {key}": value for key, value in zip(keys, values, strict=True)}
    return found


def require_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def seals_hold(root: Path) -> bool:
    """Whether every data file is the one that its commit record vouches for."""
    records = [Commit.load(root, shard) for shard in range(Journal.load(root).num_shards)]
    assert None not in records
    return all(
        seal_of(root / path) == seal for commit in records if commit
        for path, seal in commit.files.items()
    )  # fmt: skip


def test_what_a_collection_frees(options: ExtractOptions) -> None:
    before = features(options.out)
    rows = featcache.open(options.out).rows([f"{i:04d}.png" for i in range(COUNT)])
    sizes = {name: len(data) for name, data in feature_files(options.out).items()}
    expected = GcResult(rows=6, shards=2, freed_bytes=6 * 2 * 4096)
    assert collect(options.out, dry_run=True) == expected
    assert features(options.out).keys() == before.keys()
    seen: list[tuple[int, int]] = []
    result = collect(options.out, on_progress=lambda *at: seen.append(at))
    assert result == expected
    assert seen == [(0, 2), (1, 2), (2, 2)]
    store = featcache.open(options.out)
    require_equal(features(options.out), before)
    assert store.rows([f"{i:04d}.png" for i in range(COUNT)]).tolist() == rows.tolist()
    assert {name: len(data) for name, data in feature_files(options.out).items()} == sizes
    assert np.flatnonzero(store.index.status == Status.DROPPED).tolist() == CHANGED
    assert (store.num_rows, store.num_images, store.failures()) == (18, COUNT, [])
    assert seals_hold(options.out)
    with store.reader() as reader, pytest.raises(StoreError, match="row 1 has no features"):
        reader.read(np.array([1]))
    assert collect(options.out) == GcResult()


def test_other_tools_read_nan_where_rows_were_dropped(options: ExtractOptions) -> None:
    import zarr

    collect(options.out)
    zarrs = zarr.open_group(options.out, mode="r")
    scaled = featcache.open(options.out).codec.scaled
    dropped = [row in CHANGED or row in (10, 11) for row in range(18)]
    for name in (
        *(("scales" if scaled else "features") + f"/{n}" for n in ("-2", "last")),
        "pooled",
    ):
        values = zarrs[name][:].astype(np.float32).reshape(18, -1)
        assert np.isnan(values).all(1).tolist() == dropped
        assert np.isnan(values).any(1).tolist() == dropped


def test_a_reader_open_meanwhile(options: ExtractOptions) -> None:
    store = featcache.open(options.out)
    rows = store.rows(sorted(store.index.keys()))
    readers: list[FeatureReader] = [store.reader(), store.reader()]
    before = readers[0].read(rows)
    collect(options.out)
    for reader in readers:
        with reader:
            assert torch.equal(reader.read(rows), before)


def test_a_dropped_row_is_never_read_as_something_else(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run that opened the store before the image changed, and has checked the row already."""
    monkeypatch.setattr("featcache.open_files._MOST", 1)
    store = featcache.open(options.out)
    with store.reader(threads=1) as reader:
        reader.read(np.arange(10))
        collect(options.out)
        with pytest.raises(CorruptStoreError, match="row 1 are not the bytes that were written"):
            reader.read(np.array([0, 1]))


def test_bytes_that_come_back_get_a_new_row(options: ExtractOptions, tmp_path: Path) -> None:
    collect(options.out)
    shutil.copy(tmp_path / "before" / "0004.png", options.data[0] / "0004.png")
    assert extract(options).new == 1
    assert featcache.open(options.out).rows(["0004.png"]).tolist() == [20]
    features(options.out)
    assert collect(options.out).rows == 1
    assert extract(options).new == 0


def test_nothing_to_free(options: ExtractOptions) -> None:
    collect(options.out)
    before = {path: path.stat().st_mtime_ns for path in options.out.rglob("*") if path.is_file()}
    assert collect(options.out) == GcResult()
    after = {path: path.stat().st_mtime_ns for path in options.out.rglob("*") if path.is_file()}
    assert {path.name for path in after if after[path] != before.get(path)} <= {"lock"}


@pytest.mark.parametrize("options", ["int8"], indirect=True)  # has every kind of file
def test_a_stop_at_any_publication_loses_nothing(
    options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = features(options.out)
    dirty = shutil.copytree(options.out, tmp_path / "dirty.zarr")
    publications = Publications(monkeypatch)
    collect(options.out)
    total = publications.count
    whole = feature_files(options.out)
    # Two records twice; twice two layers and pooled (and scales); the index and the root.
    assert total > 2 * 2 + 2 * 3 + 10
    # From now on all image files are gone, but for one whose bytes are as they were at first.
    shutil.rmtree(options.data[0])
    options.data[0].mkdir()
    shutil.copy(tmp_path / "before" / "0003.png", options.data[0])
    for last in range(total):
        root = Path(shutil.copytree(dirty, tmp_path / f"{last}.zarr"))
        with publications.stopped(after=last), pytest.raises(Killed):
            collect(root)
        # Whoever reads the store meanwhile, and whoever extracts.
        require_equal(features(root), before)
        again = Path(shutil.copytree(root, tmp_path / f"{last}-again.zarr"))
        result = extract(replace(options, out=again))
        assert result.failures == {}
        assert featcache.open(again).rows(["0003.png"])[0] == (20 if result.new else 3)
        others = {key for key in before if "0003.png" not in key}
        for _ in range(2):
            kept = features(again)
            require_equal({key: kept[key] for key in others}, {key: before[key] for key in others})
            collect(again)
        assert seals_hold(again)
        shutil.rmtree(again)
        # The next collection ends where an undisturbed one does.
        collect(root)
        require_equal(features(root), before)
        assert feature_files(root) == whole
        assert seals_hold(root)
        assert not list(root.rglob(".partial-*"))
        assert collect(root) == GcResult()
        shutil.rmtree(root)


def test_a_shard_with_damaged_live_rows_is_left_alone(
    options: ExtractOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    path = options.out / "features/last/c/0/0/0"
    damaged = bytearray(path.read_bytes())
    damaged[2 * 4096 + 5] ^= 1
    path.write_bytes(damaged)
    before = feature_files(options.out)
    assert console.run(group, ["gc", str(options.out), "--json"]) == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["rows"], document["shards"], document["damaged"]) == (4, 1, {"0": [2]})
    assert "shard 0 was left alone, 1 of its rows are damaged (first: row 2)" in err
    assert f"`featcache verify {options.out} --repair` mends them" in err
    after = feature_files(options.out)
    assert {name for name in after if after[name] != before[name]} == {
        name for name in after if "/c/1/" in f"/{name}/"
    }
    damaged[2 * 4096 + 5] ^= 1
    path.write_bytes(damaged)
    assert collect(options.out).rows == 2
    assert collect(options.out) == GcResult()


def test_damage_of_a_dead_row_does_not_matter(options: ExtractOptions) -> None:
    path = options.out / "features/last/c/1/0/0"
    damaged = bytearray(path.read_bytes())
    damaged[5] ^= 1
    path.write_bytes(damaged)
    assert collect(options.out).rows == 6
    assert seals_hold(options.out)


def test_an_unfinished_store_and_a_busy_one(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(options.out), pytest.raises(StoreError, match="another process is writing"):
        collect(options.out)
    write_images(options.data[0] / "more", 2, seed=3)
    publications = Publications(monkeypatch)
    with publications.stopped(at="commit-"), pytest.raises(Killed):
        extract(options)
    for dry_run in (False, True):
        with pytest.raises(IncompleteStoreError, match="1 of 6 shards are to be written"):
            collect(options.out, dry_run=dry_run)
    with pytest.raises(StoreError, match="no such directory"):
        collect(options.out / "none")
    assert not (options.out / "none").exists()


@pytest.mark.parametrize("options", ["int8"], indirect=True)  # has every kind of file
def test_an_hdf5_file_is_refused(options: ExtractOptions, tmp_path: Path) -> None:
    convert(options.out, tmp_path / "store.h5")
    with pytest.raises(StoreError, match=r"store\.h5 is an HDF5 file.*`featcache convert` that"):
        collect(tmp_path / "store.h5", dry_run=True)


def test_an_old_index_is_brought_up_to_date_before_rows_go(
    options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an extraction stopped before its index, keys there still mean the rows of before."""
    write_images(options.data[0] / "tmp", 1, seed=77)
    (options.data[0] / "tmp" / "0000.png").replace(options.data[0] / "0000.png")
    publications = Publications(monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("featcache.extract.compile_index", raise_killed)
        extract(options)
    dirty = shutil.copytree(options.out, tmp_path / "dirty.zarr")
    assert featcache.open(dirty).rows(["0000.png"]).tolist() == [0]
    publications.count = 0
    assert collect(options.out).rows == len(CHANGED) + 1
    for last in range(publications.count):
        root = Path(shutil.copytree(dirty, tmp_path / f"{last}.zarr"))
        with publications.stopped(after=last), pytest.raises(Killed):
            collect(root)
        features(root)
        shutil.rmtree(root)


def raise_killed(*_: object) -> None:
    raise Killed
