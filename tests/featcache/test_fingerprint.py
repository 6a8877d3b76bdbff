from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    PreTrainedConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import featcache
from featcache.encoders import Encoder, Preprocessing, load_encoder
from featcache.errors import FingerprintMismatch
from featcache.fingerprint import (
    HARMLESS,
    PROBE_FILES,
    diff,
    fingerprint,
    flatten,
    pixel_probe,
    require_same,
    weights_digest,
)
from featcache.images import decode

PROBE = Path(featcache.__file__).parent / "assets" / "probe"

FIELDS = [
    "encoder.name",
    "encoder.revision",
    "encoder.weights",
    "encoder.random_weights",
    "encoder.architecture",
    "encoder.config.hidden_act",
    "encoder.config.hidden_size",
    "encoder.config.image_size",
    "encoder.config.intermediate_size",
    "encoder.config.layer_norm_eps",
    "encoder.config.num_attention_heads",
    "encoder.config.num_channels",
    "encoder.config.num_hidden_layers",
    "encoder.config.patch_size",
    "encoder.config.vision_use_head",
    "encoder.num_patches",
    "encoder.width",
    "features.layers",
    "features.post_layernorm",
    "features.dropped_tokens",
    "preprocessing.processor",
    "preprocessing.height",
    "preprocessing.width",
    "preprocessing.aspect",
    "preprocessing.pad",
    "preprocessing.resample",
    "preprocessing.rescale_factor",
    "preprocessing.mean",
    "preprocessing.std",
    "preprocessing.convert",
    "preprocessing.exif",
    "preprocessing.frame",
    "preprocessing.grey16",
    "preprocessing.probe",
    "compute.dtype",
    "compute.fp32_matmul",
    "compute.device",
    "compute.attention",
    "versions.torch",
    "versions.transformers",
    "versions.pillow",
    "versions.numpy",
]


@pytest.fixture(scope="module")
def encoder(encoder_dir: Path) -> Encoder:
    return load_encoder(str(encoder_dir), layers=("-2", "last"))


@pytest.fixture(scope="module")
def found(encoder: Encoder) -> dict[str, Any]:
    return fingerprint(encoder)


def compare(left: dict[str, Any], right: dict[str, Any]) -> None:
    require_same(left, right, left_name="the store", right_name="this run", cure="do so")


def other(value: Any) -> Any:
    """Of the same type, and different."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [other(value[0]), *value[1:]]
    return "another" if value is None or isinstance(value, str) else value + 1


def test_its_fields_are_these_and_survive_json(found: dict[str, Any]) -> None:
    assert [name for name, _ in flatten(found)] == FIELDS
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_alone_is_a_mismatch_or_harmless(found: dict[str, Any], name: str) -> None:
    changed, gone = copy.deepcopy(found), copy.deepcopy(found)
    *path, last = name.split(".")
    at, out = changed, gone
    for part in path:
        at, out = at[part], out[part]
    at[last] = other(at[last])
    del out[last]
    if name in HARMLESS or path[0] in HARMLESS:
        compare(found, changed)
        compare(gone, found)
        return
    for left, right in ((found, changed), (changed, found), (found, gone), (gone, found)):
        with pytest.raises(FingerprintMismatch) as caught:
            compare(left, right)
        assert [field for field, _, _ in diff(left, right)] == [name]
        assert f"do not match: {name}: " in str(caught.value)


@pytest.mark.parametrize(
    ("file", "setting", "value", "field"),
    [
        ("config.json", "num_attention_heads", 4, "encoder.config.num_attention_heads"),
        ("config.json", "hidden_act", "gelu", "encoder.config.hidden_act"),
        ("config.json", "layer_norm_eps", 1e-5, "encoder.config.layer_norm_eps"),
        ("preprocessor_config.json", "resample", 3, "preprocessing.resample"),
        ("preprocessor_config.json", "rescale_factor", 1 / 256, "preprocessing.rescale_factor"),
        ("preprocessor_config.json", "image_mean", [0.5, 0.5, 0.4], "preprocessing.mean"),
        ("preprocessor_config.json", "image_std", [0.5, 0.5, 0.4], "preprocessing.std"),
    ],
)
def test_settings_beside_equal_weights(
    encoder_dir: Path, found: dict[str, Any], tmp_path: Path,
    file: str, setting: str, value: Any, field: str,
) -> None:  # fmt: skip
    """Through the real loader: the same weights, another config file."""
    folder = shutil.copytree(encoder_dir, tmp_path / "encoder")
    settings = json.loads((folder / file).read_text())
    assert settings[setting] != value
    (folder / file).write_text(json.dumps(settings | {setting: value}))
    changed = fingerprint(load_encoder(str(folder), layers=("-2", "last")))
    assert changed["encoder"]["weights"] == found["encoder"]["weights"]
    with pytest.raises(FingerprintMismatch, match=rf"do not match: {field}: "):
        compare(found, changed)


def test_the_same_checkpoint_in_another_folder_is_the_same(
    encoder_dir: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    """Also with what loaders write into config.json and what never decides a feature."""
    folder = shutil.copytree(encoder_dir, tmp_path / "encoder")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"transformers_version": "5.0.0", "_name_or_path": "x", "attention_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(settings))
    compare(found, fingerprint(load_encoder(str(folder), layers=("-2", "last"))))


def test_layers_random_weights_and_fp32_products(encoder_dir: Path, found: dict[str, Any]) -> None:
    layers = fingerprint(load_encoder(str(encoder_dir), layers=("-2", "-1")))
    assert layers["features"]["post_layernorm"] == [False, False]
    with pytest.raises(FingerprintMismatch, match=r"match: features\.layers.*post_layernorm"):
        compare(found, layers)
    random = load_encoder(str(encoder_dir), layers=("-2", "last"), random_weights=True)
    with pytest.raises(FingerprintMismatch, match=r"encoder\.weights.*encoder\.random_weights"):
        compare(found, fingerprint(random))
    assert found["compute"]["fp32_matmul"] == "ieee"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        medium = fingerprint(load_encoder(str(encoder_dir), layers=("-2", "last")))
    finally:
        torch.set_float32_matmul_precision(before)
    assert diff(found, medium) == [("compute.fp32_matmul", "ieee", "bf16")]


def test_every_setting_that_the_model_reads_is_in_it(encoder: Encoder) -> None:
    """Whatever the config is asked for while the model is built and run."""
    read: set[str] = set()

    class Spy(SiglipVisionConfig):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    config = Spy(**{k: v for k, v in encoder.config.to_dict().items() if k in encoder.architecture})
    config._attn_implementation = "sdpa"
    read.clear()
    model = SiglipVisionModel(config).eval()
    with torch.inference_mode():
        model(torch.zeros(1, 3, 24, 24))
    settings = set(encoder.config.to_dict()) - set(PreTrainedConfig().to_dict())
    assert {"hidden_act", "layer_norm_eps", "num_attention_heads"} <= read & settings
    assert (read & settings) - set(encoder.architecture) <= {"attention_dropout", "model_type"}


# ------------------------------------------------------------------------------- the pixel probe


@pytest.fixture
def preprocessing(encoder: Encoder) -> Preprocessing:
    pixel_probe.cache_clear()
    return encoder.preprocessing


def test_the_probe_is_stable(preprocessing: Preprocessing) -> None:
    first = pixel_probe(preprocessing)
    pixel_probe.cache_clear()
    assert first == pixel_probe(preprocessing)
    # At 24 px, bilinear, by Pillow 11.0 to 13.0 alike. Where an upgrade changes it, that upgrade
    # changes features: say so in CHANGELOG.md, for stores from before will be refused.
    assert first == "823c4d159eb458e47a07f63264490f72"


@pytest.mark.parametrize("missing", PROBE_FILES)
def test_each_image_counts(
    preprocessing: Preprocessing, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """A corner of one image a little different."""
    before = pixel_probe(preprocessing)
    pixel_probe.cache_clear()
    data = (PROBE / missing).read_bytes()

    def other_decoder(found: bytes) -> tuple[Image.Image, tuple[int, int]]:
        image, size = decode(found)
        if found == data:
            pixels = np.array(image)
            pixels[:8, :8, 1] ^= 32
            image = Image.fromarray(pixels)
        return image, size

    monkeypatch.setattr("featcache.fingerprint.decode", other_decoder)
    assert pixel_probe(preprocessing) != before
    pixel_probe.cache_clear()


def test_other_ways_to_decode_and_resize_are_seen(
    encoder: Encoder, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another Pillow might do, done: turn by EXIF, resize in two steps, clip 16 bits."""

    def turned(data: bytes) -> tuple[Image.Image, tuple[int, int]]:
        from io import BytesIO

        from PIL import ImageOps

        image, size = decode(data)
        with Image.open(BytesIO(data)) as raw:
            image.getexif().update(raw.getexif())
        return ImageOps.exif_transpose(image), size

    def half(self: Preprocessing, image: Image.Image) -> Any:
        return np.array(image.resize(self.size[::-1], self.resample, reducing_gap=1.0))

    def replaced(target: str, value: Any) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(target, value)
            pixel_probe.cache_clear()
            other = fingerprint(encoder)
        pixel_probe.cache_clear()
        with pytest.raises(FingerprintMismatch, match=r"do not match: preprocessing\.probe: "):
            compare(found, other)
        return other["preprocessing"]["probe"]

    probes = {
        replaced("featcache.fingerprint.decode", turned),
        replaced("featcache.encoders.Preprocessing.resize", half),
        # Pillow's own conversion of 16 bits, which clips.
        replaced("featcache.images._to_rgb", lambda image: image.convert("RGB")),
    }
    assert len(probes) == 3


def test_versions_alone_are_no_mismatch(
    encoder: Encoder, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.fingerprint.versions", lambda: {"pillow": "99.0"})
    compare(found, fingerprint(encoder))


def load_maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_probe", PROBE / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_shipped_images_are_those_of_the_script() -> None:
    """Exactly where the format is lossless; the others by their size, mode and likeness."""
    make = load_maker()
    assert {path.name for path in PROBE.iterdir() if path.is_file()} == {*PROBE_FILES, "make.py"}
    assert sum((PROBE / name).stat().st_size for name in PROBE_FILES) < 20_000
    opened = {}
    for name in PROBE_FILES:
        with Image.open(PROBE / name) as image:
            image.load()
            frames = getattr(image, "n_frames", 1)
            opened[name] = image
        assert frames == (3 if name == "frames.gif" else 1)
    assert np.array_equal(np.asarray(opened["rgba.png"]), make.rgba())
    assert np.array_equal(np.asarray(opened["grey16.png"]), make.grey16())
    colours = np.array(make.palette_colours(), np.uint8).reshape(-1, 3)
    assert np.array_equal(opened["palette.png"].convert("RGBA").convert("RGB"),
                          colours[make.palette()])  # fmt: skip
    assert {name: image.mode for name, image in opened.items()} == {
        "420.jpg": "RGB", "444.jpg": "RGB", "cmyk.jpg": "CMYK", "frames.gif": "P",
        "grey16.png": "I;16", "palette.png": "P", "rgba.png": "RGBA",
    }  # fmt: skip
    assert opened["420.jpg"].layer[0][1:3] == (2, 2)  # chroma at half the resolution
    assert opened["420.jpg"].getexif()[0x0112] == 6
    assert "transparency" in opened["palette.png"].info


# ----------------------------------------------------------------------------------- the weights


def test_the_same_weights_in_other_files_are_the_same(encoder_dir: Path, tmp_path: Path) -> None:
    """In several shards, and beside a text tower."""
    expected = load_encoder(str(encoder_dir)).weights
    assert expected.startswith("xxh3_128:")
    model = SiglipVisionModel.from_pretrained(encoder_dir)
    shards = shutil.copytree(encoder_dir, tmp_path / "shards")
    (shards / "model.safetensors").unlink()
    model.save_pretrained(shards, max_shard_size=10_000)
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert load_encoder(str(shards)).weights == expected

    text = SiglipTextConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=50, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    both = SiglipModel(
        SiglipConfig(vision_config=model.config.to_dict(), text_config=text.to_dict())
    )
    both.vision_model.load_state_dict(model.state_dict())
    whole = shutil.copytree(encoder_dir, tmp_path / "whole")
    both.save_pretrained(whole)
    assert load_encoder(str(whole)).weights == expected


def test_any_change_of_any_weight_is_another_digest() -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.ModuleDict(
            {"a": torch.nn.Linear(3, 5), "b": torch.nn.Linear(5, 3), "n": torch.nn.LayerNorm(5)}
        )

    first = model()
    digests = [weights_digest(first)]
    assert weights_digest(model()) == digests[0]
    for name in first.state_dict():  # the lowest bit of one value
        changed = model()
        changed.state_dict()[name].view(torch.int32).view(-1)[-1] ^= 1
        digests.append(weights_digest(changed))
    swapped = model()
    swapped["a"], swapped["b"] = swapped["b"], swapped["a"]
    reshaped = model()
    reshaped["a"].weight = torch.nn.Parameter(first["a"].weight.reshape(5, 3).reshape(3, 5))
    digests += [weights_digest(swapped), weights_digest(reshaped), weights_digest(model().half())]
    assert len(set(digests)) == len(digests)
    # The layout in memory is no part of it.
    first["a"].weight = torch.nn.Parameter(first["a"].weight.t().contiguous().t())
    assert not first["a"].weight.is_contiguous()
    assert weights_digest(first) == digests[0]


def test_empty_and_scalar_weights_have_a_digest() -> None:
    model = torch.nn.Module()
    model.register_buffer("scalar", torch.tensor(2.0))
    model.register_buffer("empty", torch.empty(0, 3))
    model.register_buffer("brain", torch.ones(3, dtype=torch.bfloat16))
    assert weights_digest(model).startswith("xxh3_128:")
