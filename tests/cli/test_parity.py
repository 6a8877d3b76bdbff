"""`align parity` on a quick demo."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from featcache.codecs import LayerCodec

from .conftest import Align


def test_table_and_document(demo: Path, align: Align) -> None:
    store = demo / "store.zarr"
    done = align("parity", "--features", store, "--config", "demo", "-n", 3, "--json")
    assert done.code == 0
    document = done.document
    assert (document["asked"], document["compared"], document["agrees"]) == (3, 3, True)
    assert [each["what"] for each in document["comparisons"]] == ["features", "loss", "gradients"]
    assert set(document["comparisons"][1]) == {
        *("what", "of", "worst", "median", "allowed", "where", "agrees"),
    }
    assert "cached against live: 3 samples, 3 images, fp32; relative errors" in done.err
    assert f"features of {store}, layer -2" in done.err
    assert "most in core." in done.err
    assert f"{store}: fp16 costs 0.0002" in done.err
    assert done.err.endswith("they agree: what differs, the codec and the compute explain\n")


def test_of_a_run(demo: Path, align: Align) -> None:
    run = demo / "run"
    trained = align("parity", "--run", run, "-n", 2, "--json").document
    given = align("parity", "--run", run, "--features", demo / "store.zarr", "-n", 2, "--json")
    assert given.document == trained
    untrained = align("parity", "--features", demo / "store.zarr", "--config", "demo", "-n", "2")
    assert untrained.code == 0
    bf16 = align("parity", "--run", run, "-n", 2, "train.precision=bf16", "--json")
    assert bf16.code == 0 and bf16.document["precision"] == "bf16"


def test_what_disagrees_is_one_line(
    demo: Path, align: Align, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = LayerCodec.encode

    def off(self: LayerCodec, features):  # type: ignore[no-untyped-def]
        return encode(self, features * 1.01)

    monkeypatch.setattr(LayerCodec, "encode", off)
    done = align("parity", "--features", demo / "store.zarr", "--config", "demo", "-n", 2, "--json")
    assert done.code == 1 and done.document["agrees"] is False
    last = done.err.splitlines()[-1]
    assert last.startswith(
        f"error: the features of {demo}/store.zarr, layer -2 are not what its encoder gives: the "
        "store was made by other means than its fingerprint says (row "
    )
    assert last.endswith(")") and ": 0.0099, allowed 0.00" in last


def test_mistakes_are_one_line(demo: Path, tmp_path: Path, align: Align) -> None:
    none = align("parity", "-n", 2)
    assert none.code == 2 and "give --features STORE, or --run RUN" in none.err
    both = align("parity", "--run", demo / "run", "--config", "demo")
    assert both.code == 2 and "leave --config out" in both.err
    given = ("parity", "--features", demo / "store.zarr", "--config", "demo", "-n", 2)
    no_encoder = align(*given, "--encoder", tmp_path / "nowhere")
    assert no_encoder.code == 1 and len(no_encoder.err.splitlines()) == 1
    assert "nowhere" in no_encoder.err
    no_run = align("parity", "--run", tmp_path)
    assert no_run.code == 1 and "not a run's folder" in no_run.err


def test_images_gone(demo: Path, tmp_path: Path, align: Align) -> None:
    shutil.move(demo / "data" / "images", tmp_path / "images")
    try:
        done = align("parity", "--features", demo / "store.zarr", "--config", "demo", "-n", 2)
        moved = align(
            *("parity", "--features", demo / "store.zarr", "--config", "demo", "-n", 2),
            *("--images", tmp_path),
        )
    finally:
        shutil.move(tmp_path / "images", demo / "data" / "images")
    assert done.code == 1
    assert "note: not compared: sample train-000000: missing: row 0 (images/train-" in done.err
    assert done.err.splitlines()[-1] == (
        "error: none of 2 samples could be computed from its images, so nothing was compared; if "
        "they have moved, give --images DIR"
    )
    assert moved.code == 0
