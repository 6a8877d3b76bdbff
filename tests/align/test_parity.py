"""Cached against live on stores that are right, and on stores that are not what they say."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config import RunConfig
from align.connectors.sva import SvaConfig
from align.errors import DataError
from align.parity import ParityReport, compare
from align.run import Run, assemble, load_run
from align.trainer import train
from featcache.codecs import CODECS, StoredFeatures
from featcache.convert import convert
from featcache.encoders import Encoded, Encoder
from featcache.encoders.encoder import Pixels
from featcache.errors import ConfigError, EncoderError, FingerprintMismatch
from featcache.extract import ExtractOptions, extract
from featcache.join import JoinReader
from featcache.store import Store

MakeConfig = Callable[..., RunConfig]


def of_store(config: RunConfig, *stores: Path, count: int = 5, **given: Any) -> ParityReport:
    run = assemble(config, list(stores), Path())
    try:
        return compare(run, count, **given)
    finally:
        run.close()


def whats(report: ParityReport) -> list[tuple[str, bool]]:
    return [(each.what, each.agrees) for each in report.comparisons]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("codec", CODECS)
def test_a_good_store_agrees(
    world: Path, tmp_path: Path, make_config: MakeConfig, codec: str, precision: str
) -> None:
    data = (world / "captions.jsonl",)
    out = tmp_path / "store.zarr"
    extract(ExtractOptions(str(world / "siglip"), data, out, world / "images", codec=codec))
    report = of_store(make_config(f"train.precision={precision}"), out)
    assert report.agrees and report.not_compared == ()
    assert (report.asked, report.compared, report.images, report.precision) == (5, 5, 5, precision)
    assert whats(report) == [("features", True), ("loss", True), ("gradients", True)]
    (rounding,) = report.roundings
    assert rounding.codec == codec
    # docs/codecs.md: half a step of fp16 and bf16, at most.
    most = {"fp16": 2**-11, "bf16": 2**-8, "int8": 0.02, "fp8": 2**-4, "int4": 0.2}[codec]
    assert most / 20 < rounding.error < most
    loss, gradients = report.comparisons[1:]
    if codec == precision == "bf16":  # rounded to the same bf16 on the way into the connector
        assert loss.worst == gradients.worst == 0
    else:
        assert loss.worst > 0 and 0 < gradients.median <= gradients.worst


def test_samples_are_spread_over_the_store_and_always_the_same(
    store: Store, make_config: MakeConfig
) -> None:
    first, second = (of_store(make_config(), store.path, count=3) for _ in range(2))
    assert first == second
    assert of_store(make_config(), store.path, count=1000).compared == 32  # all to train on


def test_a_converted_store(store: Store, tmp_path: Path, make_config: MakeConfig) -> None:
    """What the codec before has rounded is explained."""
    convert(store.path, tmp_path / "int8.zarr", codec="int8")
    report = of_store(make_config(), tmp_path / "int8.zarr")
    assert report.agrees
    assert report.comparisons[0].worst > 0
    convert(store.path, tmp_path / "store.h5")
    report = of_store(make_config(), tmp_path / "store.h5")
    assert report.agrees
    assert report.comparisons[1:] == of_store(make_config(), store.path).comparisons[1:]


def test_two_stores_and_several_images(
    world: Path, store: Store, tmp_path: Path, make_config: MakeConfig, extract_again: Any
) -> None:
    other = extract_again(tmp_path, seed=5)
    config = make_config("data.multi_image_ratio=1")
    config.connector = SvaConfig(width=16, side=4, depth=1, heads=2)
    report = of_store(config, store.path, other)
    assert report.agrees
    assert (report.compared, report.images) == (5, 10)
    assert [each.of for each in report.comparisons[:2]] == [
        f"{store.path}, layer -2",
        f"{other}, layer -2",
    ]
    with pytest.raises(ConfigError, match="--encoder: 1 are given for 2 stores"):
        of_store(config, store.path, other, encoders=[str(world / "siglip")])


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_of_something_else_is_found(
    world: Path,
    tmp_path: Path,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    codec: str,
) -> None:
    """Its fingerprint is right; its features are 2 % off, less than int4 rounds."""
    plain = Encoder.encode

    def off(self: Encoder, pixels: Pixels) -> Encoded:
        encoded = plain(self, pixels)
        features = {
            name: each + 0.02 * each.std() * torch.randn_like(each)
            for name, each in encoded.features.items()
        }
        return replace(encoded, features=features)

    out = tmp_path / "store.zarr"
    data = (world / "captions.jsonl",)
    torch.manual_seed(0)
    with monkeypatch.context() as tampered:
        tampered.setattr(Encoder, "encode", off)
        extract(ExtractOptions(str(world / "siglip"), data, out, world / "images", codec=codec))
    report = of_store(make_config(), out)
    assert not report.agrees
    assert whats(report)[0] == ("features", False)
    assert 0.01 < report.comparisons[0].worst < 0.2


def test_what_only_the_reading_breaks_is_found(
    store: Store, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patches in another order: no connector may take them for the image."""
    plain = JoinReader.read_stored

    def rolled(self: JoinReader, rows: Any) -> tuple[StoredFeatures, ...]:
        return tuple(replace(each, codes=each.codes.roll(1, 1)) for each in plain(self, rows))

    monkeypatch.setattr(JoinReader, "read_stored", rolled)
    report = of_store(make_config("connector.position=learned"), store.path)
    assert not report.comparisons[0].agrees


def test_what_only_the_model_breaks_is_found(
    store: Store, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right features, decoded by the model for the wrong type: loss and gradients tell."""
    plain = StoredFeatures.decode
    run = assemble(make_config(), [store.path], Path())
    forward = run.model.visual

    def coarse(features: Any, sizes: Any) -> torch.Tensor:
        return forward(
            [
                plain(each).to(torch.bfloat16) if isinstance(each, StoredFeatures) else each
                for each in features
            ],
            sizes,
        )

    monkeypatch.setattr(run.model, "visual", coarse)
    report = compare(run, 5)
    run.close()
    assert [agrees for _, agrees in whats(report)] == [True, False, False]


def test_a_run(store: Store, tmp_path: Path, make_config: MakeConfig) -> None:
    """Its own trained connector."""
    train(make_config(), [store.path], tmp_path / "run")
    run: Run = load_run(tmp_path / "run")
    report = compare(run, 4)
    run.close()
    assert report.agrees
    assert report.comparisons[1:] != of_store(make_config(), store.path, count=4).comparisons[1:]


def test_images_that_are_gone(world: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    images = tmp_path / "images"
    shutil.copytree(world / "images", images)
    data = (world / "captions.jsonl",)
    out = tmp_path / "store.zarr"
    extract(ExtractOptions(str(world / "siglip"), data, out, images))
    (images / "001.png").unlink()
    shutil.copy(images / "003.png", images / "002.png")
    report = of_store(make_config("data.eval_ratio=0"), out, count=1000)
    gone, changed = report.not_compared
    assert "sample s1: missing: row 1 (001.png): " in gone
    assert "sample s2: changed: row 2 (002.png): " in changed
    assert report.agrees and report.compared == 38
    shutil.rmtree(images)
    images.mkdir()
    report = of_store(make_config(), out)
    assert (report.compared, report.comparisons, report.agrees) == (0, (), False)
    assert of_store(make_config(), out, images=world / "images").agrees


def test_encoders_that_cannot_be(
    world: Path, store: Store, tmp_path: Path, make_config: MakeConfig, extract_again: Any
) -> None:
    extract_again(tmp_path, seed=5)
    with pytest.raises(FingerprintMismatch, match="--encoder NAME"):
        of_store(make_config(), store.path, encoders=[str(tmp_path / "siglip")])
    with pytest.raises(EncoderError, match="nowhere"):
        of_store(make_config(), store.path, encoders=[str(tmp_path / "nowhere")])
    shutil.copytree(world / "siglip", tmp_path / "moved")
    assert of_store(make_config(), store.path, encoders=[str(tmp_path / "moved")]).agrees
    run = assemble(make_config(), [store.path], Path())
    run.splits.train.clear()
    with pytest.raises(DataError, match="is empty"):
        compare(run)
