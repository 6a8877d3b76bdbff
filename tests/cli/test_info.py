"""`featcache info` and `featcache failures` on stores in every state."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cli.console import run
from cli.failures import lines
from cli.featcache import group
from featcache import encode
from featcache.errors import FeatcacheError
from featcache.extract import ExtractOptions, extract
from featcache.files import publish_json, with_checksum
from featcache.gc import collect
from featcache.journal import Failure
from tests.support import Killed, Publications, write_captions, write_images


@pytest.fixture
def options(encoder_dir: Path, images_dir: Path, tmp_path: Path) -> ExtractOptions:
    """Ten images in shards of 4, and one that is not there."""
    names = [*(f"{i:04d}.png" for i in range(10)), "none.png"]
    return ExtractOptions(
        model=str(encoder_dir), data=(write_captions(tmp_path / "data.jsonl", names),),
        image_root=images_dir, out=tmp_path / "store.zarr", shard_images=4, max_failures=1.0,
        layers=("-2", "last"), codec="int8",
    )  # fmt: skip


@pytest.fixture
def info(options: ExtractOptions, capsys: pytest.CaptureFixture[str]):
    def run_info() -> tuple[dict, str]:
        capsys.readouterr()
        assert run(group, ["info", str(options.out), "--json"]) == 0
        out, err = capsys.readouterr()
        return json.loads(out), err

    return run_info


def test_what_info_says(options: ExtractOptions, info, tmp_path: Path) -> None:
    extract(options)
    document, err = info()
    assert (document["finished"], document["pending"], document["generations"]) == (True, 0, 1)
    assert document["failures"] == {"missing": 1}
    # 9 patches x 24 in 8 bits, a float32 a patch; two layers; 24 pooled values in fp16.
    assert document["bytes_per_image"] == 2 * (9 * 24 + 9 * 4) + 24 * 2
    assert document["bits"] == 8 + 32 / 24
    assert document["shards"] == {"committed": 3, "planned": 3}
    assert document["bytes"] == sum(document["bytes_by_part"].values())
    assert set(document["bytes_by_part"]) == {
        "features", "scales", "pooled", "index", "journal", "other",
    }  # fmt: skip
    assert document["bytes_by_part"]["features"] == sum(
        path.stat().st_size for path in (options.out / "features").rglob("*") if path.is_file()
    )
    assert "int8, 9.333 bits a value, 552 B an image" in err
    assert "1 missing" in err

    write_images(tmp_path / "new", 1, seed=5)
    (tmp_path / "new" / "0000.png").replace(tmp_path / "images" / "0002.png")
    extract(options)
    document, err = info()
    assert document["unreferenced"] == {"rows": 1, "bytes": 2 * 4096}
    assert "gc" in err and "frees them" in err
    assert collect(options.out).freed_bytes == 2 * 4096
    after, _ = info()
    assert (after["dropped_rows"], after["unreferenced"]["rows"], after["images"]) == (1, 0, 10)
    freed = document["bytes_by_part"]["features"] - after["bytes_by_part"]["features"]
    assert 0 < freed <= 2 * 4096


def test_an_unfinished_store(
    options: ExtractOptions, info, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "WRITERS", 1)  # so that shards are published in order
    publications = Publications(monkeypatch)
    with publications.stopped(at="commit-00000001"), pytest.raises(Killed):
        extract(options)
    document, err = info()
    assert (document["finished"], document["images"], document["pending"]) == (False, 4, 6)
    assert document["shards"] == {"committed": 1, "planned": 3}
    assert document["shape"] == [10, 9, 24]
    assert "6 images to be encoded; run the same `featcache extract` command again" in err
    extract(options)
    assert options.image_root is not None
    write_images(options.image_root / "more", 2, seed=3)
    more = replace(options, data=(options.image_root,))
    with publications.stopped(at="commit-"), pytest.raises(Killed):
        extract(more)
    document, err = info()
    assert (document["finished"], document["images"], document["pending"]) == (True, 10, 2)
    assert document["shards"] == {"committed": 3, "planned": 4}
    assert "2 images to be encoded" in err


def test_a_store_stopped_before_its_first_plan(
    options: ExtractOptions, info, monkeypatch: pytest.MonkeyPatch
) -> None:
    publications = Publications(monkeypatch)
    with publications.stopped(at="plan-"), pytest.raises(Killed):
        extract(options)
    document, _ = info()
    assert (document["finished"], document["shards"]["planned"], document["images"]) == (
        False, 0, 0,
    )  # fmt: skip


def test_lineage_and_missing_source(options: ExtractOptions, info) -> None:
    extract(options)
    root = json.loads((options.out / "zarr.json").read_text())
    attributes = root["attributes"]["featcache"]
    attributes["source"] = {
        "converted_from": {"codec": "bf16", "converted_from": {"codec": "fp16"}}
    }
    root["attributes"]["featcache"] = with_checksum(attributes)
    publish_json(options.out / "zarr.json", root)
    document, err = info()
    assert document["converted_from"] == ["bf16", "fp16"]
    assert re.search(r"^converted from +bf16, fp16$", err, re.MULTILINE)


def test_failures_by_reason(options: ExtractOptions, capsys: pytest.CaptureFixture[str]) -> None:
    assert options.image_root is not None
    for name in ("0001.png", "0002.png"):
        (options.image_root / name).write_bytes(b"no image")
    extract(options)
    capsys.readouterr()
    store = str(options.out)
    assert run(group, ["failures", store, "--json"]) == 0
    out, err = capsys.readouterr()
    assert [failure["key"] for failure in json.loads(out)["failures"]] == [
        "0001.png", "0002.png", "none.png",
    ]  # fmt: skip
    assert err.startswith("2 undecodable\n1 missing\n")
    assert err.endswith("\n3 images without features\n")
    assert run(group, ["failures", store, "--reason", "missing", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [failure["key"] for failure in json.loads(out)["failures"]] == ["none.png"]
    assert "0001.png" not in err
    assert "1 of 3 images without features" in err
    assert run(group, ["failures", store, "--reason", "overflow"]) == 0
    assert run(group, ["failures", store, "--reason", "mising"]) == 2
    assert "unknown reason 'mising'; did you mean 'missing'?" in capsys.readouterr().err


def test_details_are_cut_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_: os.terminal_size((40, 20)))
    found = [Failure("a.png", "missing", "x" * 50), Failure("\x1b[2J.png", "too_large", "short")]
    assert lines(found, terminal=False) == [
        f"a.png        missing    {'x' * 50}",
        "\\x1b[2J.png  too_large  short",
    ]
    on_terminal = lines(found, terminal=True)
    assert on_terminal[0] == f"a.png        missing    {'x' * 15}…"
    assert [len(line) for line in on_terminal] == [40, 29]
    long = [Failure("k" * 70, "missing", "gone")]
    assert lines(long, terminal=True)[0].startswith("k" * 70 + "  missing")


def test_a_large_ledger_is_not_slow() -> None:
    found = [Failure(f"{i:09d}.jpg", "missing", "no such file") for i in range(100_000)]
    start = time.perf_counter()
    assert len(lines(found, terminal=True)) == 100_000
    assert time.perf_counter() - start < 5  # 0.2 s measured


def test_what_is_no_store(tmp_path: Path) -> None:
    from featcache.summary import summarize

    with pytest.raises(FeatcacheError, match="no such directory"):
        summarize(tmp_path / "none.zarr")
