"""WebDataset tars, img2dataset's output, parquet, saved datasets and LLaVA-NeXT's YAML."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

import featcache
from align.data.dataset import DataConfig, build_splits
from align.data.templates import TemplateConfig
from featcache.errors import ManifestError
from featcache.extract import ExtractOptions, extract
from featcache.join import StoreJoin
from featcache.manifests import Record, Turn, read_manifest
from featcache.mixtures import Sampling
from tests.support import feature_files, write_captions, write_images
from tests.support_inputs import hf_images, samples, write_parquet, write_tar

NAMES = [f"{i:04d}.png" for i in range(10)]
"""Of `images_dir`."""


def turns(caption: str, images: int = 1) -> tuple[Turn, ...]:
    return (Turn("human", "<image>\n" * images), Turn("gpt", caption))


def skipped(files: Sequence[Path], root: Path | None = None) -> list[tuple[str, str]]:
    return [(each.origin, each.reason) for each in read_manifest(files, root).skipped]


# --------------------------------------------------------------------------- tars


def test_webdataset_samples(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    members = [
        ("a/1.jpg", b"x"), ("a/1.txt", b" one \n"), ("a/1.cls", b"3"),
        ("2.left.png", b"x"), ("2.right.PNG", b"x"), ("2.caption", b"two"),
        ("3.jpg", b"x"), ("3.txt", b"unused"),
        ("3.json", json.dumps({"conversations": talk, "id": 7, "source": "web"}).encode()),
        ("4.jpg", b"x"), ("4.json", b'{"text": "four"}'),
        ("5.txt", b"no image"),
        ("6.jpg", b"x"), ("6.txt", b"  "),
        ("noext", b"x"), (".hidden.jpg", b"x"),
        ("7.jpg", b"x"), ("7.txt", b"\xff"),
        ("8.jpg", b"x"), ("8.json", b"{"),
        ("9.jpg", b"x"), ("9.json", b'{"status": "failed_to_resize"}'),
        ("b.jpg", b"x"), ("b.json", b"[1]"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "s.tar", members)
    manifest = read_manifest([path])
    assert manifest.image_root == tmp_path
    assert manifest.records == [
        Record("s.tar/a/1", ("s.tar/a/1.jpg",), turns("one"), None, "s.tar/a/1"),
        Record("s.tar/2", ("s.tar/2.left.png", "s.tar/2.right.PNG"), turns("two", 2), None,
               "s.tar/2"),
        Record("7", ("s.tar/3.jpg",), (Turn("human", "<image>\nWhat?"), Turn("gpt", "It.")), "web",
               "s.tar/3"),
        Record("s.tar/4", ("s.tar/4.jpg",), turns("four"), None, "s.tar/4"),
        Record("s.tar/6", ("s.tar/6.jpg",), (), None, "s.tar/6"),
        Record("s.tar/b", ("s.tar/b.jpg",), (), None, "s.tar/b"),
    ]  # fmt: skip
    assert [(each.origin, each.reason) for each in manifest.skipped] == [
        ("s.tar/7", "its .txt is not UTF-8 text"),
        ("s.tar/8", "its .json is malformed"),
        ("s.tar/9", "img2dataset could not get it: failed_to_resize"),
    ]


def test_patterns_of_tars(tmp_path: Path) -> None:
    for i in range(8, 12):
        write_tar(tmp_path / f"{i:05d}.tar", [(f"{i}.jpg", b"x")])
    braces = read_manifest([tmp_path / "{00008..00011}.tar"])
    assert braces.image_keys() == [f"{i:05d}.tar/{i}.jpg" for i in range(8, 12)]
    assert braces.image_root == tmp_path
    assert braces.files == (tmp_path / "{00008..00011}.tar",)
    assert read_manifest([tmp_path / "0*.tar"]).records == braces.records
    assert read_manifest([tmp_path / "000{11,08}.tar"]).image_keys() == [
        "00011.tar/11.jpg",
        "00008.tar/8.jpg",
    ]
    with pytest.raises(ManifestError, match=r"00012\.tar does not exist; check --data"):
        read_manifest([tmp_path / "{00008..00012}.tar"])
    with pytest.raises(ManifestError, match=r"1\*\.tar matches nothing; check --data"):
        read_manifest([tmp_path / "1*.tar"])
    with pytest.raises(ManifestError, match=r"\{a\.\.b\} is neither a range of numbers nor a list"):
        read_manifest([tmp_path / "{a..b}.tar"])


def test_a_pattern_over_folders_has_the_root_above_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", [("1.jpg", b"x")])
    manifest = read_manifest([tmp_path / "{a,b}" / "*.tar"])
    assert manifest.image_keys() == ["a/0.tar/1.jpg", "b/0.tar/1.jpg"]
    assert manifest.image_root == tmp_path


def test_a_file_named_like_a_pattern_is_meant_as_it_is(tmp_path: Path) -> None:
    write_tar(tmp_path / "[ab]{1,2}.tar", [("1.jpg", b"x")])
    assert read_manifest([tmp_path / "[ab]{1,2}.tar"]).image_keys() == ["[ab]{1,2}.tar/1.jpg"]


def test_all_damaged_tars_are_named_at_once(tmp_path: Path) -> None:
    for i in range(4):
        path = write_tar(tmp_path / f"{i}.tar", [("1.jpg", bytes(3000)), ("2.jpg", bytes(3000))])
        if i % 2:
            path.write_bytes(path.read_bytes()[:5000])
    for data in (tmp_path / "*.tar", tmp_path):
        with pytest.raises(ManifestError) as caught:
            read_manifest([data])
        told = str(caught.value)
        assert "1.tar is damaged or cut short after 2.jpg" in told
        assert "3.tar is damaged or cut short after 2.jpg" in told
        assert "0.tar" not in told


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_what_is_no_file_is_told(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ManifestError, match="is no regular file, or a link that leads nowhere"):
        read_manifest([tmp_path])
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(ManifestError, match="is no regular file, or a link that leads nowhere"):
        read_manifest([tmp_path])


def test_compressed_files_are_refused(tmp_path: Path) -> None:
    import gzip

    path = write_tar(tmp_path / "a.tar", [("1.jpg", b"x")])
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    for data in (tmp_path / "a.tar.gz", tmp_path):
        with pytest.raises(ManifestError, match=r"a\.tar\.gz is compressed.*decompress it first"):
            read_manifest([data])


# --------------------------------------------------------------------------- img2dataset


def img2dataset(folder: Path, images: Path, statuses: Sequence[str]) -> None:
    """One shard's metadata, as img2dataset writes them beside the shard, whatever its format."""
    write_parquet(
        folder / "00000.parquet",
        {"key": [f"{i:09d}" for i in range(len(statuses))], "status": list(statuses)},
    )
    (folder / "00000_stats.json").write_text("{}")


def test_img2dataset_as_tars(tmp_path: Path, images_dir: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_tar(out / "00000.tar", samples(images_dir, NAMES[:2]))
    img2dataset(out, images_dir, ["success", "failed_to_download", "success"])
    manifest = read_manifest([out])
    assert manifest.image_keys() == ["00000.tar/0000.png", "00000.tar/0001.png"]
    assert manifest.records[1].turns == turns("image 1")
    assert skipped([out]) == [
        ("00000.parquet[1]", "img2dataset could not get it: failed_to_download")
    ]


def test_img2dataset_as_files(tmp_path: Path, images_dir: Path) -> None:
    out = tmp_path / "out"
    (out / "00000").mkdir(parents=True)
    for name, data in samples(images_dir, NAMES[:2]):
        (out / "00000" / name).write_bytes(data)
    img2dataset(out, images_dir, ["success", "success", "failed_to_resize"])
    manifest = read_manifest([out])
    assert manifest.image_keys() == ["00000/0000.png", "00000/0001.png"]
    assert manifest.records[1].turns == turns("image 1")
    assert skipped([out]) == [
        ("00000.parquet[2]", "img2dataset could not get it: failed_to_resize")
    ]


def test_img2dataset_as_parquet(tmp_path: Path, images_dir: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    data = (images_dir / NAMES[0]).read_bytes()
    columns = {
        "caption": ["a", "b"],
        "status": ["success", "failed_to_download"],
        "jpg": pa.array([data, None], pa.binary()),
    }
    write_parquet(out / "00000.parquet", columns)
    (out / "00000_stats.json").write_text("{}")
    (record,) = read_manifest([out]).records
    assert (record.images, record.turns) == (("00000.parquet/0",), turns("a"))
    assert skipped([out]) == [
        ("00000.parquet[1]", "img2dataset could not get it: failed_to_download")
    ]


def test_files_beside_images(tmp_path: Path) -> None:
    for name in ("a.1.jpg", "a.2.jpg", "b.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "a.2.txt").write_text("two")
    (tmp_path / "b.json").write_text('{"caption": "bee"}')
    (tmp_path / "other.json").write_text("{")
    said = {record.images[0]: record.turns for record in read_manifest([tmp_path]).records}
    assert said == {"a.1.jpg": (), "a.2.jpg": turns("two"), "b.jpg": turns("bee")}


def test_a_folder_of_tars_and_images_is_ambiguous(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x")])
    with pytest.raises(ManifestError, match=r"holds both image files .*0000\.png.* and tars"):
        read_manifest([tmp_path])


# --------------------------------------------------------------------------- parquet, datasets


def test_parquet(tmp_path: Path, images_dir: Path) -> None:
    talk = [[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]] * 3
    columns = {
        "image": hf_images(images_dir, [NAMES[0], None, NAMES[2]]),
        "conversations": talk,
        "id": [1, 2, 3],
        "source": ["a", "b", "c"],
        "embedding": pa.array([b"x"] * 3, pa.binary()),
    }
    path = write_parquet(tmp_path / "a.parquet", columns, group_rows=2)
    manifest = read_manifest([path])
    assert [(r.id, r.images, r.source, r.origin) for r in manifest.records] == [
        ("1", ("a.parquet/0",), "a", "a.parquet[0]"),
        ("2", (), "b", "a.parquet[1]"),
        ("3", ("a.parquet/2",), "c", "a.parquet[2]"),
    ]
    assert manifest.records[0].turns == (Turn("human", "<image>\nWhat?"), Turn("gpt", "It."))


def test_parquet_with_lists_of_images_and_without_text(tmp_path: Path, images_dir: Path) -> None:
    column = hf_images(images_dir, NAMES[:3])
    many = pa.ListArray.from_arrays([0, 2, 2, 3], column)
    path = write_parquet(tmp_path / "a.parquet", {"images": many})
    assert [record.images for record in read_manifest([path]).records] == [
        ("a.parquet/0/0", "a.parquet/0/1"),
        (),
        ("a.parquet/2/0",),
    ]
    binary = write_parquet(tmp_path / "b.parquet", {"png": pa.array([b"x"] * 7, pa.binary())})
    assert read_manifest([binary]).image_keys() == [f"b.parquet/{i}" for i in range(7)]


def test_no_image_bytes_are_read_for_a_manifest(tmp_path: Path) -> None:
    blobs = [os.urandom(1 << 20) for _ in range(20)]
    images = pa.array([{"bytes": blob, "path": "a.jpg"} for blob in blobs])
    path = write_parquet(tmp_path / "a.parquet", {"image": images, "caption": ["a"] * 20})

    def read_chars() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read_chars()
    assert len(read_manifest([path]).records) == 20
    assert read_chars() - before < 1 << 20


def test_parquet_without_or_with_too_many_image_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"caption": ["a"], "hash": pa.array([b"x"])})
    with pytest.raises(ManifestError, match=r"a\.parquet has no column of images"):
        read_manifest([path])
    with pytest.raises(ManifestError, match="no parquet files with a column of images"):
        read_manifest([tmp_path])
    both = {"bytes": pa.array([b"x"]), "content": pa.array([b"x"])}
    with pytest.raises(
        ManifestError, match=r"several columns of images \(bytes, content\); rename"
    ):
        read_manifest([write_parquet(tmp_path / "b.parquet", both)])


def test_a_saved_dataset_and_its_splits(tmp_path: Path, images_dir: Path) -> None:
    table = pa.table({"image": hf_images(images_dir, NAMES[:4]), "text": list("abcd")})
    whole = datasets.Dataset(table).cast_column("image", datasets.Image())
    whole.save_to_disk(str(tmp_path / "one"))
    chosen = whole.select([3, 1])  # an indices mapping, which only `datasets` knows
    datasets.DatasetDict({"train": whole, "test": chosen}).save_to_disk(str(tmp_path / "many"))
    manifest = read_manifest([tmp_path / "one"])
    assert manifest.image_root == tmp_path
    assert [(r.images, r.turns) for r in manifest.records] == [
        ((f"one/{i}",), turns(text)) for i, text in enumerate("abcd")
    ]
    manifest = read_manifest([tmp_path / "many"])
    assert manifest.image_keys() == [
        "many/test/0",
        "many/test/1",
        *(f"many/train/{i}" for i in range(4)),
    ]
    assert manifest.records[0].turns == turns("d")
    from featcache.sources import ImageRef

    found = [ImageRef(str(tmp_path), key).read() for key in ("many/test/0", "one/2")]
    assert found == [(images_dir / NAMES[i]).read_bytes() for i in (3, 2)]


def test_a_damaged_dataset(tmp_path: Path, images_dir: Path) -> None:
    table = pa.table({"image": hf_images(images_dir, NAMES)})
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    (data,) = (tmp_path / "saved").glob("*.arrow")
    data.write_bytes(data.read_bytes()[:-2000])
    with pytest.raises(ManifestError, match=r"saved is a damaged dataset: .*save it again"):
        read_manifest([tmp_path / "saved"])
    data.unlink()
    with pytest.raises(ManifestError, match=r"saved is a damaged dataset: .*save it again"):
        read_manifest([tmp_path / "saved"])


# --------------------------------------------------------------------------- mixtures


def mixture(folder: Path, text: str) -> Path:
    (folder / "mix.yaml").write_text(text)
    return folder / "mix.yaml"


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", list(range(10))),
        ("first:3", [0, 1, 2]),
        ("end:2", [8, 9]),
        ("first:25%", [0, 1, 2]),
        ("end:1%", [9]),
        ("first:99", list(range(10))),
        ("end:99", list(range(10))),
    ],
)
def test_llava_next_yaml(tmp_path: Path, strategy: str, expected: list[int]) -> None:
    write_captions(tmp_path / "a.jsonl", NAMES)
    path = mixture(
        tmp_path, f"datasets:\n  - json_path: a.jsonl\n    sampling_strategy: {strategy!r}\n"
    )
    assert read_manifest([path]).image_keys() == [NAMES[i] for i in expected]


def test_random_samples_are_the_same_every_time_and_nested(tmp_path: Path) -> None:
    chosen = [Sampling("random", n).choose(range(1000)) for n in (10, 100, 1000)]
    assert [len(each) for each in chosen] == [10, 100, 1000]
    assert set(chosen[0]) < set(chosen[1])
    assert all(each == sorted(each) for each in chosen)
    assert chosen[0] == Sampling("random", 1, percent=True).choose(range(1000))
    assert chosen[0] == [100, 124, 183, 198, 421, 544, 723, 730, 756, 921]  # for ever


def test_a_mixture_of_several_kinds_of_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(
            json.dumps([{"image": f"{name}{i}.png", "conversations": []} for i in range(3)])
        )
    write_tar(tmp_path / "c.tar", [("1.jpg", b"x"), ("2.jpg", b"x")])
    path = mixture(
        tmp_path,
        """
datasets:
  - json_path: "{a,b}.json"
    sampling_strategy: end:1
  - json_path: c.tar
""",
    )
    manifest = read_manifest([path])
    assert manifest.image_keys() == ["a2.png", "b2.png", "c.tar/1.jpg", "c.tar/2.jpg"]
    assert manifest.files == (path,)
    # The braces alone, as LLaVA-NeXT takes them for its data_path.
    assert len(read_manifest([tmp_path / "{a,b}.json"]).records) == 6


def test_where_a_relative_json_path_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "cwd").mkdir()
    path = mixture(tmp_path / "lists", "datasets: [{json_path: a.jsonl}]")
    monkeypatch.chdir(tmp_path / "cwd")
    with pytest.raises(ManifestError, match=r"lists/a\.jsonl does not exist"):
        read_manifest([path])
    write_captions(tmp_path / "cwd" / "a.jsonl", NAMES[:1])
    assert read_manifest([path]).image_keys() == NAMES[:1]
    write_captions(tmp_path / "lists" / "a.jsonl", NAMES[:2])
    with pytest.raises(ManifestError, match=r"'a\.jsonl' is both .*write it as an absolute path"):
        read_manifest([path])
    monkeypatch.chdir(tmp_path / "lists")
    assert read_manifest([path]).image_keys() == NAMES[:2]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("datasets: [", "mix.yaml cannot be read as YAML"),
        ("- a", 'mix.yaml has no list "datasets"'),
        ("datasets: []", 'mix.yaml has no list "datasets"'),
        ("datasets: [a.json]", r"mix.yaml: datasets\[0\] has no json_path"),
        ("datasets: [{json_path: a, sampling: all}]", "unknown key 'sampling'; known are"),
        *(
            (f"datasets: [{{json_path: a, sampling_strategy: {value}}}]", f"'?{value}'? is not one")
            for value in ("first", "first:0", "last:3", "random:-1", "first:101%", "3")
        ),
    ],
)
def test_a_yaml_that_cannot_be_understood(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ManifestError, match=told):
        read_manifest([mixture(tmp_path, text)])


# --------------------------------------------------------------------------- extraction


Write = Callable[[Path, Path], Path]


def as_tar(folder: Path, images: Path) -> Path:
    return write_tar(folder / "a.tar", samples(images, NAMES))


def as_pattern(folder: Path, images: Path) -> Path:
    return as_img2dataset(folder, images) / "{00000..00001}.tar"


def as_mixture(folder: Path, images: Path) -> Path:
    as_img2dataset(folder, images)
    return mixture(folder, "datasets: [{json_path: 'out/{00000..00001}.tar'}]")


def as_parquet(folder: Path, images: Path) -> Path:
    columns = {"image": hf_images(images, NAMES), "caption": [f"image {i}" for i in range(10)]}
    return write_parquet(folder / "a.parquet", columns)


def as_dataset(folder: Path, images: Path) -> Path:
    table = pa.table(
        {"image": hf_images(images, NAMES), "caption": [f"image {i}" for i in range(10)]}
    )
    datasets.Dataset(table).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def as_img2dataset(folder: Path, images: Path) -> Path:
    (folder / "out").mkdir()
    for shard in range(2):
        members = samples(images, NAMES[5 * shard : 5 * shard + 5])
        write_tar(folder / "out" / f"{shard:05d}.tar", members)
    return folder / "out"


@pytest.fixture
def options(encoder_dir: Path, images_dir: Path, tmp_path: Path) -> ExtractOptions:
    return ExtractOptions(
        model=str(encoder_dir),
        data=(images_dir,),
        out=tmp_path / "store.zarr",
        shard_images=4,
        batch_size=3,
    )


@pytest.mark.parametrize(
    "write", [as_tar, as_pattern, as_mixture, as_parquet, as_dataset, as_img2dataset]
)
def test_the_same_bytes_from_every_kind_of_input(
    write: Write, options: ExtractOptions, images_dir: Path, tmp_path: Path
) -> None:
    extract(options)
    data = write(tmp_path, images_dir)
    inside = replace(options, data=(data,), out=tmp_path / "inside.zarr")
    assert extract(inside).new == 10
    assert feature_files(inside.out) == feature_files(options.out)
    # Every image is there already: by another key, and by none that must be encoded again.
    both = extract(replace(inside, out=options.out))
    assert (both.new, both.features) == (0, 10)
    store = featcache.open(options.out)
    keys = read_manifest([data]).image_keys()
    np.testing.assert_array_equal(store.rows(keys), store.rows(NAMES))
    # and training finds them with their captions.
    splits = build_splits(
        DataConfig(eval_ratio=0, max_samples=3),
        TemplateConfig(name="caption"),
        StoreJoin([store]),
    )
    assert [sample.record.images[0] for sample in splits.train] == keys[:3]
    assert all(sample.record.turns[1].text.startswith("image ") for sample in splits.train)


def test_repair_and_live_find_images_inside_of_a_tar(
    options: ExtractOptions, images_dir: Path, tmp_path: Path
) -> None:
    from featcache.live import compare_live
    from featcache.repair import repair

    inside = replace(options, data=(as_tar(tmp_path, images_dir),))
    extract(inside)
    before = feature_files(inside.out)
    shard = inside.out / "features/-2/c/1/0/0"
    shard.write_bytes(shard.read_bytes()[:4096] + bytes(100))
    report = repair(inside.out)
    assert not report.problems
    assert feature_files(inside.out) == before
    live = compare_live(inside.out, 10)
    assert (live.compared, live.wrong) == (10, ())


def test_an_image_of_a_tar_that_went_away_is_told(
    options: ExtractOptions, images_dir: Path, tmp_path: Path
) -> None:
    tar = as_tar(tmp_path, images_dir)
    listed = write_captions(
        tmp_path / "a.jsonl", ["a.tar/0001.png", "a.tar/none.png", "b.tar/0001.png"]
    )
    result = extract(replace(options, data=(listed,), image_root=tmp_path, max_failures=1))
    assert result.failures == {"missing": 2}
    assert result.first_failure is not None
    assert result.first_failure.detail == f"{tar} holds no none.png"


def test_a_row_of_the_wrong_tar_is_never_used(
    options: ExtractOptions, images_dir: Path, tmp_path: Path
) -> None:
    """A tar that changes between scan and encoding is read by its digest, like any file."""
    from featcache.encode import load_pixels
    from featcache.encoders import load_encoder
    from featcache.layout import Status
    from featcache.repair import sources_of
    from featcache.tasks import PlannedImage

    tar = as_tar(tmp_path, images_dir)
    inside = replace(options, data=(tar,))
    extract(inside)
    write_tar(tar, samples(images_dir, list(reversed(NAMES))))
    store = featcache.open(inside.out)
    sources = sources_of(store.info, store.plans, None)
    encoder = load_encoder(options.model, layers=("-2",))
    image = PlannedImage(store.index.digests[0].tobytes(), *sources.refs(0, 1))
    assert load_pixels(encoder, image).status == Status.OK  # found by its name
    write_tar(tar, [(name, b"other") for name in NAMES])
    assert load_pixels(encoder, image).status == Status.CHANGED
    assert torch.isfinite(store.reader().read(np.arange(3)).float()).all()
