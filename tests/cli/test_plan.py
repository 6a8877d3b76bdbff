"""`align plan`: what it prints and puts into the document."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from featcache.extract import ExtractOptions, extract
from tests.cli.conftest import Align

BASE = ("plan", "--model", "siglip2-so400m", "--llm", "Qwen/Qwen3-8B-Base", "--images", 558_128)


def test_what_it_says(align: Align) -> None:
    done = align(*BASE, "--runs", 8, "--disk-gbps", 4, "--json")
    assert done.code == 0
    found = done.document
    assert found["tflop"]["llm"] == pytest.approx(2.73, abs=0.005)
    assert found["compute_gain"] == pytest.approx(1.24, abs=0.005)
    assert found["bytes_per_image"] == 1_679_616
    assert found["live"]["limited_by"] == found["cached"]["limited_by"] == "GPU"
    assert found["cached"]["hours"] < found["live"]["hours"]
    assert found["pays"] and found["live"]["cost"] is None
    assert done.err.splitlines()[-1] == found["verdict"]
    assert "940.9 GB in 13,083 files, 4,361 shards" in done.err
    assert "1.24x from leaving out the encoder" in done.err


def test_every_number_that_goes_in_has_its_origin(align: Align) -> None:
    done = align(*BASE, "--disk-gbps", 4, "--gpus", 8, "--supervised-tokens", 12, "--json")
    inputs = done.document["inputs"]
    given = {name for name, each in inputs.items() if each["origin"] == "given"}
    assert given == {"gpus", "read_gbps", "supervised_tokens"}
    assert all(
        each["origin"].startswith("assumed: ") for name, each in inputs.items() if name not in given
    )
    assert inputs["cores"]["value"] == 8 * 16
    assert inputs["write_gbps"]["value"] == 4
    assert "assumed: peak of an H100 or H200" in done.err


def test_it_says_when_it_will_not_pay(align: Align) -> None:
    done = align(*BASE, "--disk-gbps", 0.1, "--json")
    assert done.code == 0
    assert not done.document["pays"] and done.document["break_even_runs"] is None
    assert "does not pay: reading 1.7 MB an image at 0.1 GB/s" in done.err.splitlines()[-1]
    once = align(*BASE, "--json").document
    assert not once["pays"] and once["break_even_runs"] == pytest.approx(1)


@pytest.mark.parametrize("images", [1, 100, 558_128, 10**9])
@pytest.mark.parametrize("gbps", [1e-5, 0.1, 4, 3000])
def test_figures_are_written_out(align: Align, images: int, gbps: float) -> None:
    options = ("--images", images, "--disk-gbps", gbps, "--gpus", 4096, "--cores", 10**6)
    said = align(*BASE, *options).err
    assert not re.search(r"\de[+-]\d|\b0\.0 ", said), said


def test_costs_with_prices_only(align: Align) -> None:
    done = align(*BASE, "--gpu-hour-price", 3, "--disk-price", 0.02, "--months", 2, "--json")
    found = done.document
    assert found["live"]["cost"] == pytest.approx(3 * found["live"]["hours"])
    stored = found["store_bytes"] / 1e9 * 0.04
    assert found["cached"]["cost"] == pytest.approx(3 * found["cached"]["hours"] + stored)
    assert "cost: " in done.err
    assert "cost: " not in align(*BASE).err


def test_the_mlp_connector_and_other_codecs(align: Align) -> None:
    found = align(*BASE, "--visual-tokens", 729, "--codec", "int4", "--json").document
    assert (found["connector"], found["visual_tokens"]) == ("mlp", 729)
    assert found["compute_gain"] == pytest.approx(1.03, abs=0.005)
    assert found["bytes_per_image"] == 729 * 576 + 4 * 729


def test_measured_numbers_take_the_place_of_assumed_ones(
    align: Align, images_dir: Path, tmp_path: Path
) -> None:
    """The shipped tiny encoder on ten images, and the store made of them."""
    store = tmp_path / "store.zarr"
    extract(ExtractOptions(model="tiny", data=(images_dir,), out=store))
    done = align(
        "plan", "--model", "tiny", "--llm", "tiny", "--images", 4000, "--device", "cpu",
        "--probe", images_dir, "--features", store, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    inputs = done.document["inputs"]
    measured = {name for name, each in inputs.items() if each["origin"].startswith("measured: ")}
    assert measured == {"encode_images_per_s", "decode_images_per_s", "read_gbps"}
    assert "encode_efficiency" not in inputs
    rate = done.document["extraction"]["limits"]["encoder"]
    assert rate == inputs["encode_images_per_s"]["value"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--model", "siglip2-so4m"), 2, "--model siglip2-so4m: not known by name; did you mean"),
        (("--model", "nothing"), 2, "nothing: not known by name; `featcache models` lists all"),
        (("--model", "siglip2-base-naflex"), 2, "training on such features is not supported yet"),
        (("--llm", "qwen3-9b"), 1, "--llm qwen3-9b: not known by name; did you mean qwen3-"),
        (("--codec", "int5"), 2, "unknown codec 'int5'"),
        (("--text-tokens", 8, "--supervised-tokens", 9), 2, "more than the sample's 8 text tokens"),
        (("--disk-price", 1), 2, "--disk-price and --months need --gpu-hour-price"),
        (("--probe", "/no/such/folder"), 2, "does not exist"),
        (("--features", "s3://b/x.zarr"), 2, "--features s3://b/x.zarr: only a disk is measured"),
    ],
)
def test_mistakes_are_one_line(align: Align, options: tuple, code: int, message: str) -> None:
    done = align(*BASE, *options)
    assert done.code == code
    assert message in done.err and done.err.count("\n") == 1
