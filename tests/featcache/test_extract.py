"""Extraction as a whole: resume, append, ledger, refusals. Kills are in tests/faults."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipVisionModel

import featcache
from featcache import writer
from featcache.encode import STAGES
from featcache.errors import (
    ConfigError,
    CorruptStoreError,
    FingerprintMismatch,
    ManifestError,
    StoreError,
)
from featcache.extract import (
    BOOKKEEPING_BYTES_PER_ROW,
    ExtractOptions,
    ExtractProgress,
    ExtractResult,
    Preflight,
    extract,
)
from featcache.layout import StoreInfo
from featcache.live import compare_live
from featcache.object_path import ObjectPath
from featcache.worker import WorkProgress
from tests.support import Killed, Publications, feature_files, write_captions, write_images


@pytest.fixture
def options(encoder_dir: Path, images_dir: Path, tmp_path: Path) -> ExtractOptions:
    """Ten images in shards of 4, batches of 3."""
    return ExtractOptions(
        model=str(encoder_dir),
        data=(images_dir,),
        out=tmp_path / "store.zarr",
        shard_images=4,
        batch_size=3,
    )


def features_of(store: Path, keys: list[str]) -> torch.Tensor:
    opened = featcache.open(store)
    with opened.reader() as reader:
        return reader.read(opened.rows(keys))


def test_what_an_extraction_reports(options: ExtractOptions) -> None:
    seen: list[ExtractProgress] = []
    result = extract(options, seen.append)
    (preflight,) = [p.preflight for p in seen if p.preflight is not None]
    assert replace(preflight, free_bytes=0) == Preflight(
        images=10,
        nbytes=10 * 4096 + 3 * (68 + 4 * 24 * 2) + 10 * BOOKKEEPING_BYTES_PER_ROW,
        free_bytes=0,
        speed=None,
    )
    assert result.work.peak_ram_bytes > 50e6
    assert (result.work.done, result.work.own, result.work.failed) == (10, 10, 0)
    assert 0 < result.encoding_s < result.seconds
    assert replace(result, seconds=0, encoding_s=0, work=WorkProgress()) == ExtractResult(
        path=options.out,
        images=10,
        features=10,
        new=10,
        failures={},
        first_failure=None,
        skipped={},
        preflight=preflight,
        seconds=0,
        encoding_s=0,
        work=WorkProgress(),
        ok=True,
    )
    assert [(p.stage, p.done, p.total) for p in seen] == [
        ("scan", 0, 10),
        ("scan", 10, 10),
        *(("encode", done, 10) for done in (0, 3, 4, 7, 8, 10, 10)),
    ]
    assert tuple(seen[-1].work.seconds) == STAGES
    assert all(seconds > 0 for seconds in seen[-1].work.seconds.values())


@pytest.mark.parametrize("threads", [1, 5])
def test_bytes_do_not_depend_on_the_number_of_threads(
    options: ExtractOptions, tmp_path: Path, threads: int
) -> None:
    extract(options)
    other = replace(options, out=tmp_path / "other.zarr", decode_threads=threads)
    extract(other)
    assert feature_files(options.out) == feature_files(other.out)


def test_a_rerun_touches_nothing(options: ExtractOptions) -> None:
    extract(options)

    def state() -> dict[Path, int]:
        root = options.out / "zarr.json"
        return {
            p: p.stat().st_mtime_ns for p in options.out.rglob("*") if p.is_file() and p != root
        }

    before = state()
    result = extract(replace(options, shard_images=None, batch_size=7))
    assert (result.new, result.features) == (0, 10)
    assert {p: t for p, t in state().items() if p.name != "lock"} == {
        p: t for p, t in before.items() if p.name != "lock"
    }


def test_resume_keeps_the_batches_of_the_plan(options: ExtractOptions) -> None:
    """Whatever --batch-size says now: last bits may depend on the batch."""
    extract(options)
    whole = feature_files(options.out)
    (options.out / "journal/commit-00000001.json").unlink()
    shutil.rmtree(options.out / "index")  # which could stand in for it
    seen: list[ExtractProgress] = []
    assert extract(replace(options, batch_size=1), seen.append).new == 4
    assert [p.done for p in seen if p.stage == "encode"] == [0, 3, 4, 4]
    assert feature_files(options.out) == whole


def test_resume_notices_a_file_that_went_away(options: ExtractOptions) -> None:
    extract(options)
    whole = feature_files(options.out)
    (options.out / "pooled/c/1/0").unlink()
    (options.out / "features/-2/c/2/0/0").write_bytes(b"short")
    assert extract(options).new == 6
    assert feature_files(options.out) == whole


def test_other_pictures_under_the_same_keys_are_refused(
    options: ExtractOptions, tmp_path: Path
) -> None:
    extract(options)
    write_images(tmp_path / "other", 3, seed=9)
    with pytest.raises(
        StoreError, match=r"3 image keys of the store, first '0000\.png', are other"
    ):
        extract(replace(options, data=(tmp_path / "other",)))
    # Not even after a harmless extraction from there.
    write_images(tmp_path / "third" / "more", 1, seed=3)
    assert extract(replace(options, data=(tmp_path / "third",))).ok
    shutil.copy(tmp_path / "other" / "0001.png", tmp_path / "third")
    with pytest.raises(StoreError, match="1 image keys of the store, first '0001"):
        extract(replace(options, data=(tmp_path / "third",)))


def test_a_moved_folder_may_have_changed_pictures(options: ExtractOptions, tmp_path: Path) -> None:
    extract(options)
    moved = options.data[0].rename(tmp_path / "moved")
    write_images(tmp_path / "new", 1, seed=9)
    (tmp_path / "new" / "0000.png").replace(moved / "0000.png")
    assert extract(replace(options, data=(moved,))).new == 1


@pytest.mark.parametrize("name", ["store.h5", "Store.HDF5"])
def test_an_hdf5_file_is_made_by_convert(
    options: ExtractOptions, tmp_path: Path, name: str
) -> None:
    said = rf"extract writes Zarr; name it .*/{name.split('.')[0]}\.zarr and make an HDF5 file"
    with pytest.raises(ConfigError, match=said):
        extract(replace(options, out=tmp_path / name))
    assert not (tmp_path / name).exists()


def test_a_bucket_alone_is_no_store(options: ExtractOptions) -> None:
    with pytest.raises(
        ConfigError, match=r"a store needs a name in its bucket: s3://b/store\.zarr"
    ):
        extract(replace(options, out=ObjectPath("s3://b")))


def test_a_store_by_a_relative_model_is_verified_and_continued_from_elsewhere(
    options: ExtractOptions, encoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(encoder_dir.parent)
    extract(replace(options, model=f"./{encoder_dir.name}", limit=4))
    monkeypatch.chdir("/")
    assert extract(options).new == 6
    assert compare_live(options.out, 4).compared == 4


def test_unfinished_shards_are_finished_from_where_they_were_planned(
    options: ExtractOptions, tmp_path: Path
) -> None:
    extract(options)
    whole = feature_files(options.out)
    (options.out / "journal/commit-00000000.json").unlink()
    write_images(tmp_path / "elsewhere" / "b", 2, seed=9)
    result = extract(replace(options, data=(tmp_path / "elsewhere",)))
    assert (result.new, result.features, result.failures) == (6, 2, {})
    after = feature_files(options.out)
    assert {name: after[name] for name in whole} == whole
    assert featcache.open(options.out).failures() == []


@pytest.mark.parametrize("lost", [(0,), (1, 2), (0, 1, 2)])
def test_resume_writes_the_shards_without_commit_record(
    options: ExtractOptions, lost: tuple[int, ...]
) -> None:
    extract(options)
    whole = feature_files(options.out)
    for shard in lost:
        (options.out / f"journal/commit-{shard:08d}.json").unlink()
    (options.out / "features/-2/c/0/0/0").write_bytes(b"torn")
    (options.out / "features/-2/c/0/0/.partial-0-99").write_bytes(b"left by a killed run")
    if 0 not in lost:
        (options.out / "journal/commit-00000000.json").write_text('{"torn')
    result = extract(options)
    assert result.new == sum(min(4, 10 - 4 * shard) for shard in {0, *lost})
    assert feature_files(options.out) == whole
    assert not list(options.out.rglob(".partial-*"))


def test_append_encodes_only_what_is_new(options: ExtractOptions, images_dir: Path) -> None:
    extract(options)
    before = feature_files(options.out)
    old = features_of(options.out, ["0000.png", "0009.png"])
    write_images(images_dir / "more", 3, seed=1)
    shutil.copy(images_dir / "0002.png", images_dir / "copy-of-2.png")
    result = extract(options)
    assert (result.images, result.features, result.new) == (14, 14, 3)
    after = feature_files(options.out)
    assert {name: after[name] for name in before} == before
    assert torch.equal(features_of(options.out, ["0000.png", "0009.png"]), old)
    store = featcache.open(options.out)
    assert store.rows(["0002.png", "copy-of-2.png", "more/0000.png"]).tolist() == [2, 2, 12]
    assert (store.num_rows, store.num_images) == (15, 13)
    with pytest.raises(StoreError, match="row 10 has no features"), store.reader() as reader:
        reader.read(np.array([10]))


def test_an_open_store_survives_an_append(options: ExtractOptions, images_dir: Path) -> None:
    extract(options)
    store = featcache.open(options.out)
    with store.reader() as reader:
        before = reader.read(np.arange(10))
        write_images(images_dir / "more", 5, seed=1)
        extract(options)
        assert torch.equal(reader.read(np.arange(10)), before)
    assert store.rows(["0005.png", "more/0000.png"]).tolist() == [5, -1]


def test_an_image_whose_bytes_changed_is_encoded_again(
    options: ExtractOptions, images_dir: Path
) -> None:
    extract(options)
    before = features_of(options.out, ["0003.png"])
    write_images(images_dir / "tmp", 1, seed=5)
    (images_dir / "tmp" / "0000.png").replace(images_dir / "0003.png")
    assert extract(options).new == 1
    assert featcache.open(options.out).rows(["0003.png"]).tolist() == [12]
    assert not torch.equal(features_of(options.out, ["0003.png"]), before)


def test_files_renamed_while_a_run_was_stopped(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan knows rows by digest; where the bytes are now, the newest scan knows."""
    publications = Publications(monkeypatch)
    with publications.stopped(at="commit-"), pytest.raises(Killed):
        extract(options)
    images = options.data[0]
    shutil.copy(images / "0009.png", images / "copy.png")
    for name in ("0000", "0001", "0002", "0009"):
        (images / f"{name}.png").rename(images / f"moved-{name}.png")
    (images / "0003.png").rename(images / "swap")
    (images / "0004.png").rename(images / "0003.png")
    (images / "swap").rename(images / "0004.png")
    result = extract(options)
    assert (result.images, result.features, result.failures) == (11, 11, {})
    keys = ["moved-0000.png", "0003.png", "0004.png", "copy.png", "moved-0009.png"]
    assert featcache.open(options.out).rows(keys).tolist() == [0, 4, 3, 9, 9]


def test_an_old_commit_record_does_not_vouch_for_a_rewritten_shard(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(options)
    (options.out / "features/-2/c/0/0/0").unlink()
    (options.data[0] / "0001.png").unlink()
    data = write_captions(options.out.parent / "c.jsonl", [f"{i:04d}.png" for i in range(10)])
    named = replace(options, data=(data,), image_root=options.data[0])
    publications = Publications(monkeypatch)
    with publications.stopped(at="commit-00000000"), pytest.raises(Killed):
        extract(named)
    assert extract(named).failures == {"missing": 1}
    assert featcache.open(options.out).rows(["0000.png", "0001.png"]).tolist() == [0, -1]


def test_arrays_are_as_long_as_the_plans_say(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(replace(options, limit=2))
    publications = Publications(monkeypatch)
    with publications.stopped(at="plan-"), pytest.raises(Killed):
        extract(options)
    extract(replace(options, limit=2))
    metadata = json.loads((options.out / "features/-2/zarr.json").read_text())
    assert metadata["shape"][0] == featcache.open(options.out).num_rows == 2


def test_a_reason_follows_the_file(options: ExtractOptions) -> None:
    path = options.data[0] / "0009.png"
    data = write_captions(options.out.parent / "c.jsonl", [f"{i:04d}.png" for i in range(10)])
    named = replace(options, data=(data,), image_root=options.data[0])

    def swap(progress: ExtractProgress) -> None:
        if (progress.stage, progress.done) == ("scan", 10):
            path.write_bytes(b"other")

    assert extract(named, swap).failures == {"changed": 1}
    path.unlink()
    assert extract(named).failures == {"missing": 1}


def test_an_index_replaced_while_a_store_is_opened(
    options: ExtractOptions, images_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(options)
    write_images(images_dir / "more", 1, seed=1)
    load = StoreInfo.load

    def late(root: Path) -> StoreInfo:
        info = load(root)
        monkeypatch.setattr(StoreInfo, "load", load)
        extract(options)
        return info

    monkeypatch.setattr(StoreInfo, "load", late)
    assert featcache.open(options.out).num_images == 11


def test_a_damaged_plan_is_one_line(options: ExtractOptions) -> None:
    extract(options)
    (options.out / "journal/plan-00000001.npz").write_bytes(b"")
    with pytest.raises(CorruptStoreError, match=r"plan-00000001\.npz is damaged"):
        extract(options)


def test_moving_the_images_changes_nothing(options: ExtractOptions, tmp_path: Path) -> None:
    """No mtimes, no absolute paths: the digest is the identity."""
    extract(options)
    moved = shutil.copytree(options.data[0], tmp_path / "moved", copy_function=shutil.copyfile)
    assert extract(replace(options, data=(moved,))).new == 0


def test_the_ledger_accounts_for_every_image(options: ExtractOptions, tmp_path: Path) -> None:
    images = options.data[0]
    (images / "0000.png").write_bytes(b"")
    whole = (images / "0001.png").read_bytes()
    (images / "0001.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (16_384, 11_000)).save(images / "0002.png")  # over Pillow's 178,956,970 pixels
    Image.new("F", (4, 4)).save(images / "0003.tiff")
    (images / "0003.png").unlink()
    names = ["0000.png", "0001.png", "0002.png", "0003.tiff", "none.png", "0005.png"]
    data = write_captions(tmp_path / "captions.jsonl", names)
    result = extract(replace(options, data=(data,), image_root=images))
    assert not result.ok
    assert (result.images, result.features) == (6, 1)
    assert result.failures == {"undecodable": 3, "too_large": 1, "missing": 1}
    assert result.first_failure is not None
    assert (result.first_failure.key, result.first_failure.reason) == ("0000.png", "undecodable")
    store = featcache.open(options.out)
    assert {f.key: f.reason for f in store.failures()} == {
        "0000.png": "undecodable",
        "0001.png": "undecodable",
        "0002.png": "too_large",
        "0003.tiff": "undecodable",
        "none.png": "missing",
    }
    allowed = extract(replace(options, data=(data,), image_root=images, max_failures=0.9))
    assert (allowed.ok, allowed.new) == (True, 0)
    (images / "none.png").write_bytes(whole)
    assert extract(replace(options, data=(data,), image_root=images)).failures == {
        "undecodable": 3,
        "too_large": 1,
    }
    assert featcache.open(options.out).rows(["none.png"])[0] >= 0


def test_a_file_that_changes_under_the_extraction_is_no_silent_mix(
    options: ExtractOptions,
) -> None:
    """The plan holds the digest; other bytes at encoding time are a ledger entry, mended by the
    next run."""
    path = options.data[0] / "0009.png"
    original = path.read_bytes()

    def swap(progress: ExtractProgress) -> None:
        if (progress.stage, progress.done) == ("scan", 10):
            path.write_bytes((options.data[0] / "0000.png").read_bytes())

    assert extract(options, swap).failures == {"changed": 1}
    path.write_bytes(original)
    assert extract(options).failures == {}
    assert featcache.open(options.out).rows(["0009.png"]).tolist() == [12]


def test_all_images_missing_is_a_store_that_says_so(options: ExtractOptions) -> None:
    data = write_captions(options.out.parent / "captions.jsonl", ["a.png", "b.png"])
    result = extract(replace(options, data=(data,), image_root=options.data[0]))
    assert (result.ok, result.features, result.failures) == (False, 0, {"missing": 2})
    store = featcache.open(options.out)
    assert (store.num_rows, store.rows(["a.png"]).tolist()) == (0, [-1])


def test_fp16_overflow_is_an_error_and_bf16_its_cure(
    options: ExtractOptions, encoder_dir: Path, tmp_path: Path
) -> None:
    loud = shutil.copytree(encoder_dir, tmp_path / "loud")
    model = SiglipVisionModel.from_pretrained(encoder_dir)
    with torch.no_grad():
        model.encoder.layers[0].mlp.fc2.bias[3] = 1e5
    model.save_pretrained(loud)
    result = extract(replace(options, model=str(loud), max_failures=1.0))
    assert (result.ok, result.failures) == (False, {"overflow": 10})
    assert "use --codec bf16 (layer -2)" in featcache.open(options.out).reason("0000.png")
    bf16 = replace(options, model=str(loud), codec="bf16", out=tmp_path / "bf16.zarr")
    assert extract(bf16).ok


def test_another_encoder_is_refused_field_by_field(
    options: ExtractOptions, encoder_dir: Path, tmp_path: Path
) -> None:
    extract(options)
    with pytest.raises(FingerprintMismatch) as caught:
        extract(replace(options, random_weights=True))
    assert "encoder.weights: 'xxh3_128:" in str(caught.value)
    assert "encoder.revision" not in str(caught.value)  # the weights decide
    with pytest.raises(FingerprintMismatch, match=r"codec: 'fp16' in .* 'bf16' in this command"):
        extract(replace(options, codec="bf16"))
    with pytest.raises(FingerprintMismatch, match=r"features\.layers"):
        extract(replace(options, layers=("-1",)))
    with pytest.raises(ConfigError, match="has 4 images a shard, not 8; leave --shard-images"):
        extract(replace(options, shard_images=8))
    moved = shutil.copytree(encoder_dir, tmp_path / "renamed")
    assert extract(replace(options, model=str(moved))).new == 0


def test_a_full_disk_stops_with_one_line_and_a_rerun_finishes(
    options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = replace(options, out=tmp_path / "reference.zarr")
    extract(reference)
    publish = writer.publish

    def full(path: Path, parts: object) -> int:
        if path.parts[-3:] == ("1", "0", "0"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return publish(path, parts)

    monkeypatch.setattr(writer, "publish", full)
    with pytest.raises(StoreError, match="the disk is full; every committed shard is safe"):
        extract(options)
    monkeypatch.undo()
    assert extract(options).new < 10
    assert feature_files(options.out) == feature_files(reference.out)


def test_what_cannot_fit_is_refused_before_work(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match=r"needs 0\.0 GB more"):
        extract(options)


def test_dry_run_writes_nothing(options: ExtractOptions) -> None:
    result = extract(replace(options, dry_run=True))
    assert (result.images, result.new) == (10, 10)
    assert not options.out.exists()


def test_two_extractions_at_once(options: ExtractOptions) -> None:
    """The second is refused while the first runs; the kernel drops the lock with the process."""
    seen = []

    def second(progress: ExtractProgress) -> None:
        if not seen:
            with pytest.raises(StoreError, match="another process is writing"):
                extract(options)
            seen.append(progress)

    assert extract(options, second).ok
    assert seen


def test_out_that_is_something_else(options: ExtractOptions, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="is a file; choose another --out"):
        extract(replace(options, out=tmp_path / "file"))
    options.out.mkdir()
    (options.out / "thesis.tex").touch()
    with pytest.raises(StoreError, match="exists and is no feature store"):
        extract(options)
    assert [path.name for path in options.out.iterdir()] == ["thesis.tex"]


def test_commit_records_say_what_happened(options: ExtractOptions) -> None:
    extract(options)
    record = json.loads((options.out / "journal/commit-00000002.json").read_text())
    assert record["shard"] == 2
    assert record["status"] == [0, 0, 1, 1]
    assert tuple(record["seconds"]) == STAGES
    assert record["files"]["features/-2/c/2/0/0"]["nbytes"] == 2 * 4096 + 68


def test_records_without_images(options: ExtractOptions, tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text('{"id": 1, "caption": "no image"}\n')
    with pytest.raises(ManifestError, match="no record names an image; nothing to extract"):
        extract(replace(options, data=(data,)))
    assert not options.out.exists()


def test_skipped_records_are_counted_by_reason(options: ExtractOptions, tmp_path: Path) -> None:
    data = tmp_path / "some.jsonl"
    lines = [
        {"image": "0000.png", "caption": "a"},
        *({"image": "0001.png", "caption": ""} for _ in range(3)),
        {"image": "0001.png"},
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = extract(replace(options, data=(data,), image_root=options.data[0]))
    assert result.skipped == {
        "the caption is empty": (3, "some.jsonl:2"),
        'has neither "caption" nor "conversations"': (1, "some.jsonl:5"),
    }


def test_limit(options: ExtractOptions) -> None:
    assert extract(replace(options, limit=5)).images == 5
    assert extract(options).new == 5


@pytest.mark.parametrize(
    ("shard_bytes", "images"), [(9 * 24 * 2 * 5 + 1, 5), (1, 1), (1 << 30, 128)]
)
def test_a_shard_of_a_new_store_has_no_more_than_so_many_bytes(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, images: int
) -> None:
    """A ConvNeXt's 106 MB an image would make 14 GB of 128."""
    monkeypatch.setattr("featcache.extract.DEFAULT_SHARD_BYTES", shard_bytes)
    extract(replace(options, shard_images=None))
    assert StoreInfo.load(options.out).shard_images == images
    monkeypatch.setattr("featcache.extract.DEFAULT_SHARD_BYTES", 1 << 40)
    assert extract(replace(options, shard_images=None)).new == 0  # the store's own goes on
