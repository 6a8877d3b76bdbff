"""A run and the store it was trained from: what may happen to the store, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import featcache
from align.checkpoint import find_checkpoint
from align.config import RunConfig, load_config
from align.data.collate import Batch
from align.errors import CheckpointError, RunError
from align.evaluate import evaluate
from align.live import caption_images
from align.run import load_run, load_speaker
from align.tracking import read_metrics
from align.trainer import train
from featcache.codecs import CODECS, StoredFeatures
from featcache.convert import convert
from featcache.errors import ConfigError, FingerprintMismatch
from featcache.extract import ExtractOptions, extract
from featcache.files import with_checksum
from featcache.fingerprint import flatten
from featcache.store import Store

MakeConfig = Callable[..., RunConfig]
SCALED = [name for name, codec in CODECS.items() if codec.scaled]


@pytest.fixture
def folder(world: Path, tmp_path: Path) -> Path:
    """images/ and captions.jsonl, free to be changed."""
    shutil.copytree(world / "images", tmp_path / "data" / "images")
    shutil.copy(world / "captions.jsonl", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def add(world: Path, folder: Path) -> Callable[..., Path]:
    """Extracts a file of `folder` into a store of its parent; again, to append."""

    def run(data: str = "captions.jsonl", out: str = "store.zarr", codec: str = "fp16") -> Path:
        model, store = str(world / "siglip"), folder.parent / out
        extract(ExtractOptions(model, (folder / data,), store, folder / "images", codec=codec))
        return store

    return run


def state_of(run: Path) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The losses logged and the newest weights."""
    logged = [(line["kind"], line["loss"]) for line in read_metrics(run / "metrics.jsonl")]
    return logged, load_file(find_checkpoint(run / "checkpoints").path / "connector.safetensors")


def assert_same(a: Path, b: Path) -> None:
    """Bit for bit."""
    (logged, weights), (others, other_weights) = state_of(a), state_of(b)
    assert logged == others
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def drop_last_checkpoint(run: Path) -> None:
    """As if the run had been killed before its end."""
    shutil.rmtree(find_checkpoint(run / "checkpoints").path)


def held_out(run: Path, **given: Any) -> list[str]:
    return [sample.record.id for sample in load_run(run, **given).splits.val]


# ---------------------------------------------------------------------------- a store that grows


def test_what_is_appended_later_is_no_part_of_a_run(
    add: Callable[..., Path], folder: Path, make_config: MakeConfig
) -> None:
    """The store's own data files are those of its latest extraction; a run keeps the ones that it
    was started with, for --resume with the same words and for evaluation.
    """
    store, run = add(), folder.parent / "run"
    train(make_config(), [store], run)
    train(make_config(), [store], folder.parent / "whole")
    before = held_out(run)
    lines = (folder / "captions.jsonl").read_text().splitlines()[:9]
    more = [{**json.loads(line), "id": f"more{i}"} for i, line in enumerate(lines)]
    (folder / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in more))
    add("more.jsonl")
    assert featcache.open(store).source["data"] == [str(folder / "more.jsonl")]
    assert held_out(run) == before
    drop_last_checkpoint(run)
    train(make_config(), [store], run, resume=True)
    assert_same(run, folder.parent / "whole")


def test_a_data_file_that_grows_is_noticed(
    add: Callable[..., Path], folder: Path, make_config: MakeConfig
) -> None:
    """Half of what would be held out of the longer file has been trained on."""
    store, run = add(), folder.parent / "run"
    train(make_config(), [store], run)
    data = folder / "captions.jsonl"
    old = data.read_text()
    lines = [json.loads(line) for line in old.splitlines()]
    more = [json.dumps({**line, "id": f"more{i}"}) + "\n" for i, line in enumerate(lines)]
    data.write_text(old + "".join(more))
    add()
    with pytest.raises(CheckpointError) as caught:
        load_run(run)
    message = str(caught.value)
    assert message.startswith(
        f"{run}: the records in {data} are not those that it was started with, so what would be "
        "held out of them now may have been trained on: data.division: '"
    )
    assert message.endswith(
        "give it the same file again, or name a file to evaluate on in data.val_files of "
        f"{run / 'config.yaml'}"
    )
    with pytest.raises(CheckpointError, match="other training samples: train: 32 -> 64; "):
        train(make_config(), [store], run, resume=True)

    # Both cures.
    held = folder / "held.jsonl"
    held.write_text("".join(more[:5]))
    data.write_text(old)
    others = [f"data.val_files=[{held}]"]
    assert held_out(run, overrides=others) == [f"more{i}" for i in range(5)]
    assert len(held_out(run)) == 8


def test_data_that_have_moved(
    add: Callable[..., Path], folder: Path, make_config: MakeConfig
) -> None:
    store, run = add(), folder.parent / "run"
    train(make_config(), [store], run)
    moved = folder.rename(folder.parent / "moved")
    there = make_config(f"data.files=[{moved / 'captions.jsonl'}]", f"data.images={moved}/images")
    assert train(there, [store], run, resume=True).step == 6
    assert len(evaluate(load_run(run)).captions) == 8  # at the place that the resume has named
    assert load_config(run / "config.yaml").data == there.data


def test_a_store_that_has_moved(
    add: Callable[..., Path], folder: Path, make_config: MakeConfig
) -> None:
    store, run = add(), folder.parent / "run"
    train(make_config(), [store], run)
    moved = store.rename(folder.parent / "moved.zarr")
    with pytest.raises(RunError) as caught:
        load_run(run)
    assert str(caught.value) == (
        f"{run}: its store {store} is gone; if it has moved, give --features STORE "
        "(`align caption` needs none)"
    )
    assert len(held_out(run, features=[moved])) == 8


def test_images_that_have_changed_since(
    add: Callable[..., Path], folder: Path, make_config: MakeConfig
) -> None:
    """Their keys mean other pictures now; the old features come back with the old bytes."""
    store, run = add(), folder.parent / "run"
    config = make_config("data.eval_ratio=0", "train.eval_every=0")
    train(config, [store], run)
    train(config, [store], folder.parent / "whole")
    drop_last_checkpoint(run)
    image = folder / "images" / "005.png"
    old = image.read_bytes()
    Image.new("RGB", (30, 30), "pink").save(image)
    add()
    with pytest.raises(CheckpointError) as caught:
        train(config, [store], run, resume=True)
    assert (
        "cannot be resumed: image files of its training samples have changed" in f"{caught.value}"
    )
    assert "bring the old files back and run `featcache extract` again" in f"{caught.value}"
    image.write_bytes(old)
    add()
    train(config, [store], run, resume=True)
    assert_same(run, folder.parent / "whole")


# ------------------------------------------------------------------------ other features, or codes


def test_channel_values_of_another_store(
    add: Callable[..., Path], folder: Path, make_config: MakeConfig
) -> None:
    """Stores that were begun with other images round otherwise: no resume, but an evaluation."""
    store, run = add(codec="int8"), folder.parent / "run"
    train(make_config(), [store], run)
    lines = (folder / "captions.jsonl").read_text().splitlines(keepends=True)
    (folder / "some.jsonl").write_text("".join(lines[:4]))
    add("some.jsonl", "other.zarr", "int8")
    other = add(out="other.zarr", codec="int8")
    config = make_config(f"data.files=[{folder}/captions.jsonl]")
    with pytest.raises(CheckpointError, match=r"has other channel values of its codec int8 than"):
        train(config, [other], run, resume=True)
    assert len(held_out(run, features=[other])) == 8


def test_features_that_were_rounded_by_another_codec_on_the_way(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    """fp16 made from int4 is not fp16, though every field of the fingerprint is equal."""
    convert(store.path, tmp_path / "small.zarr", "int4")
    convert(tmp_path / "small.zarr", tmp_path / "back.zarr", "fp16")
    train(make_config(), [store.path], tmp_path / "run")
    message = r"features.converted_from: None in .*run, \{'codec': 'int4', .* in .*back.zarr; use"
    with pytest.raises(FingerprintMismatch, match=message):
        load_run(tmp_path / "run", features=[tmp_path / "back.zarr"])
    with pytest.raises(FingerprintMismatch, match=message):
        train(make_config(), [tmp_path / "back.zarr"], tmp_path / "run", resume=True)
    with pytest.raises(FingerprintMismatch, match=r"codec: 'fp16' in .*, 'int4' in .*small.zarr;"):
        load_run(tmp_path / "run", features=[tmp_path / "small.zarr"])


def edited(store: Path, out: Path, field: str, value: Any) -> Path:
    """A copy whose fingerprint has another value in one field, sealed again."""
    shutil.copytree(store, out)
    document = json.loads((out / "zarr.json").read_text())
    part = document["attributes"]["featcache"]
    *parents, last = ["fingerprint", *field.split(".")]
    for name in parents:
        part = part[name]
    part[last] = value
    sealed = with_checksum(document["attributes"]["featcache"])
    document["attributes"]["featcache"] = sealed
    (out / "zarr.json").write_text(json.dumps(document))
    return out


def test_every_field_that_decides_a_feature_is_enforced(
    store: Store, make_config: MakeConfig, tmp_path: Path
) -> None:
    """By `align eval` and --resume; the others may differ."""
    run = tmp_path / "run"
    train(make_config(), [store.path], run)
    harmless = {"encoder.name", "encoder.revision"}
    fields = [name for name, _ in flatten(store.info.fingerprint)]
    assert len(fields) > 25
    for field in fields:
        other = edited(store.path, tmp_path / "edited.zarr", field, "another")
        if field in harmless or field.startswith("versions."):
            assert load_run(run, features=[other]).step == 6
            assert train(make_config(), [other], run, resume=True).step == 6
        else:
            with pytest.raises(FingerprintMismatch, match=rf"{field}: .*'another' in .*edited"):
                load_run(run, features=[other])
            with pytest.raises(FingerprintMismatch, match=rf"{field}: .*'another' in .*edited"):
                train(make_config(), [other], run, resume=True)
        shutil.rmtree(other)


# -------------------------------------------------------------------------- codecs, through it all


@pytest.mark.parametrize("codec", list(CODECS))
def test_training_from_codes_is_training_from_what_they_stand_for(
    add: Callable[..., Path],
    folder: Path,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    codec: str,
) -> None:
    """Decoded in the step, or floats from the start, in fp32: the same bits."""
    store = add(codec=codec)
    stored = folder.parent / "stored"
    train(make_config("connector.dropout=0.1"), [store], stored)
    assert find_checkpoint(stored / "checkpoints").state()["features"][0]["codec"]["name"] == codec
    move = Batch.to
    seen = []

    def of_floats(batch: Batch, device: torch.device) -> Batch:
        (stored,) = batch.features
        assert isinstance(stored, StoredFeatures)
        seen.append(stored.codes.dtype)
        return move(replace(batch, features=(stored.decode(torch.float32),)), device)

    monkeypatch.setattr(Batch, "to", of_floats)
    train(make_config("connector.dropout=0.1"), [store], folder.parent / "floats")
    assert set(seen) == {CODECS[codec].dtype}
    assert_same(stored, folder.parent / "floats")


@pytest.mark.parametrize("codec", list(CODECS))
def test_a_run_speaks_of_images_when_its_store_is_gone(
    add: Callable[..., Path], folder: Path, make_config: MakeConfig, codec: str
) -> None:
    """The live path, with the channel values in the checkpoint, says what the cached one says."""
    store, run = add(codec=codec), folder.parent / "run"
    train(make_config("train.steps=20", "eval.max_new_tokens=12"), [store], run)
    captions = evaluate(load_run(run)).captions
    shutil.rmtree(store)
    images = [folder / "images" / caption.images[0] for caption in captions]
    assert caption_images(load_speaker(run), images) == [each.generated for each in captions]


@pytest.mark.parametrize("codec", ["fp16", *SCALED])
def test_resume_from_hdf5_is_bit_for_bit(
    add: Callable[..., Path], folder: Path, make_config: MakeConfig, codec: str
) -> None:
    """Begun on the Zarr form, gone on with on the HDF5 form of the same store."""
    store = add(codec=codec)
    convert(store, folder.parent / "store.h5")
    config = make_config("connector.dropout=0.1")
    train(config, [store], folder.parent / "whole")
    train(config, [store], folder.parent / "cut")
    drop_last_checkpoint(folder.parent / "cut")
    train(config, [folder.parent / "store.h5"], folder.parent / "cut", resume=True)
    assert_same(folder.parent / "whole", folder.parent / "cut")


def test_codes_are_decoded_without_gradients_to_what_autocast_is_given(
    add: Callable[..., Path], make_config: MakeConfig, folder: Path
) -> None:
    """fp32 into the connector also under bf16 autocast, and the batch keeps its codes."""
    store, run = add(codec="int4"), folder.parent / "run"
    train(make_config("train.steps=2"), [store], run)
    loaded = load_run(run, overrides=["train.precision=bf16"])
    batch = next(loaded.loader("train").stream([torch.arange(4).numpy()]))
    (stored,) = batch.features
    assert isinstance(stored, StoredFeatures)
    given = []
    loaded.model.connector.register_forward_pre_hook(lambda _, inputs: given.extend(inputs[0]))
    loss, _ = loaded.model(batch)
    loss.backward()
    assert given[0].dtype is torch.float32 and not given[0].requires_grad
    assert torch.equal(given[0], stored.decode(torch.float32))
    same = replace(batch, features=(stored.decode(torch.float32),))
    assert torch.equal(loaded.model(same)[0], loss)


def test_images_of_different_lengths_are_refused(
    folder: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    """SigLIP 2 NaFlex: no connector here takes another number of patches for each image yet."""
    config = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_patches=4, patch_size=8,
    )  # fmt: skip
    Siglip2VisionModel(config).save_pretrained(tmp_path / "naflex")
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=4)
    processor.save_pretrained(tmp_path / "naflex")
    store = tmp_path / "naflex.zarr"
    model = str(tmp_path / "naflex")
    extract(ExtractOptions(model, (folder / "captions.jsonl",), store, folder / "images"))
    with pytest.raises(ConfigError, match=r"another number of patches for each image") as caught:
        train(make_config(), [store], tmp_path / "run")
    assert "\n" not in str(caught.value) and str(store) in str(caught.value)


def test_captions_of_a_padded_store_are_of_padded_images(
    world: Path, folder: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    """The live path takes --fit from the store."""
    out = tmp_path / "padded.zarr"
    model, data = str(world / "siglip"), (folder / "captions.jsonl",)
    extract(ExtractOptions(model, data, out, folder / "images", fit="pad"))
    train(make_config("train.steps=1"), [out], tmp_path / "run")
    speaker = load_speaker(tmp_path / "run")
    assert speaker.voices[0].fingerprint["preprocessing"]["aspect"] == "pad"
    image = next((folder / "images").iterdir())
    assert len(caption_images(speaker, [image])) == 1
