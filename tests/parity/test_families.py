"""Each family of encoders against the plain Hugging Face forward, from random weights.

Saved as the hub has them (with a text tower where it has one) and loaded through `load_encoder`.
Where a family's modules run as they are, on the same batch, the difference is 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    Siglip2Config,
    Siglip2Model,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from featcache import registry
from featcache.encoders import Encoder, load_encoder
from featcache.errors import EncoderError
from featcache.fingerprint import fingerprint
from featcache.registry import EncoderEntry

SHAPE: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
}  # fmt: skip
LAYERS = ("-4", "-2", "-1", "0", "1", "3", "last")


def photographs() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for h, w in ((1, 40), (30, 30), (45, 123), (200, 60))
    ]


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Every weight random, so that none hides behind a zero, a one or a tiny layer scale."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return model.eval()


def clip(folder: Path) -> PreTrainedModel:
    vision = CLIPVisionConfig(**SHAPE, intermediate_size=48, image_size=28, patch_size=7)
    text = CLIPTextConfig(**SHAPE, intermediate_size=48, vocab_size=50)
    model = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict()))
    randomised(model).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(folder)
    return CLIPVisionModel.from_pretrained(folder).eval()


def dinov2(folder: Path) -> PreTrainedModel:
    """At another resolution than that of its position embeddings, as facebook's are."""
    model = Dinov2Model(Dinov2Config(**SHAPE, image_size=70, patch_size=7, use_swiglu_ffn=True))
    randomised(model).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(folder)
    return model


def dinov2_with_registers(folder: Path) -> PreTrainedModel:
    model = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**SHAPE, image_size=70, patch_size=7, num_register_tokens=4)
    )
    randomised(model).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(folder)
    return model


def dinov3_processor(folder: Path, side: int) -> None:
    """As facebook's repositories have it."""
    settings = {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "do_resize": True, "do_rescale": True, "do_normalize": True,
        "size": {"height": side, "width": side}, "resample": 2, "rescale_factor": 1 / 255,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def dinov3(folder: Path) -> PreTrainedModel:
    config = DINOv3ViTConfig(
        **SHAPE, intermediate_size=48, image_size=28, patch_size=7, num_register_tokens=4
    )
    model = randomised(DINOv3ViTModel(config))
    model.save_pretrained(folder)
    dinov3_processor(folder, 28)
    return model


def vit(folder: Path) -> PreTrainedModel:
    """Of no family of its own here."""
    model = ViTModel(ViTConfig(**SHAPE, intermediate_size=48, image_size=28, patch_size=7))
    randomised(model).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)
    return model


TOKEN_FAMILIES: list[tuple[Callable[[Path], PreTrainedModel], int, str, bool]] = [
    (clip, 1, "cls", False),
    (dinov2, 1, "cls", True),
    (dinov2_with_registers, 5, "cls+4 registers", True),
    (dinov3, 5, "cls+4 registers", True),
    (vit, 1, "cls", True),
]


def batch(encoder: Encoder) -> Any:
    return encoder.collate([encoder.preprocess(image) for image in photographs()])


@pytest.mark.parametrize(("build", "prefix", "dropped", "norm"), TOKEN_FAMILIES)
def test_tokens_are_the_hidden_states_without_those_before_the_patches(
    tmp_path: Path,
    build: Callable[[Path], PreTrainedModel],
    prefix: int,
    dropped: str,
    norm: bool,
) -> None:
    """Difference 0 in fp32."""
    reference = build(tmp_path)
    encoder = load_encoder(str(tmp_path), layers=LAYERS)
    pixels = batch(encoder)
    encoded = encoder.encode(pixels)
    with torch.inference_mode():
        expected = reference(encoder.normalize(pixels.values), output_hidden_states=True)
    for layer in LAYERS[:-1]:
        torch.testing.assert_close(
            encoded.features[layer], expected.hidden_states[int(layer)][:, prefix:], rtol=0, atol=0
        )
    torch.testing.assert_close(
        encoded.features["last"], expected.last_hidden_state[:, prefix:], rtol=0, atol=0
    )
    torch.testing.assert_close(encoded.pooled, expected.pooler_output, rtol=0, atol=0)
    assert encoded.features["-2"].shape == (4, encoder.num_patches, encoder.width) == (4, 16, 24)
    differs = not torch.equal(encoded.features["last"], encoded.features["-1"])
    assert differs == norm
    found = fingerprint(encoder)
    assert found["features"]["dropped_tokens"] == dropped
    assert found["features"]["post_layernorm"] == [False] * 6 + [norm]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("build", [clip, dinov3])
def test_bfloat16_is_what_transformers_computes_in_bfloat16(
    tmp_path: Path, build: Callable[[Path], PreTrainedModel]
) -> None:
    """As on a GPU; difference 0. DINOv3's rotary frequencies must stay in fp32."""
    build(tmp_path)
    encoder = load_encoder(str(tmp_path), layers=("-2", "last"))
    encoder.tower.to(torch.device("cpu"), torch.bfloat16)
    encoder.compute_dtype = torch.bfloat16
    reference = type(encoder.model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    ours = dict(encoder.model.named_buffers())
    for name, theirs in reference.named_buffers():
        assert ours[name].dtype == theirs.dtype and torch.equal(ours[name], theirs), name
    pixels = batch(encoder)
    encoded = encoder.encode(pixels)
    with torch.inference_mode():
        expected = reference(encoder.normalize(pixels.values).bfloat16(), output_hidden_states=True)
    prefix = encoder.tower.prefix_tokens
    assert encoded.features["-2"].dtype == torch.bfloat16
    for kept, states in (
        (encoded.features["-2"], expected.hidden_states[-2]),
        (encoded.features["last"], expected.last_hidden_state),
    ):
        torch.testing.assert_close(kept, states[:, prefix:], rtol=0, atol=0)


# --------------------------------------------------------------------------------------- NaFlex


def naflex(folder: Path) -> PreTrainedModel:
    vision = Siglip2VisionConfig(**SHAPE, intermediate_size=48, num_patches=16, patch_size=8)
    text = Siglip2TextConfig(**SHAPE, intermediate_size=48, vocab_size=50)
    model = Siglip2Model(Siglip2Config(vision_config=vision.to_dict(), text_config=text.to_dict()))
    randomised(model).save_pretrained(folder)
    Siglip2ImageProcessorPil(patch_size=8, max_num_patches=20).save_pretrained(folder)
    return Siglip2VisionModel.from_pretrained(folder).eval()


def test_naflex_is_the_hugging_face_forward_of_each_grid(tmp_path: Path) -> None:
    """Pixels, mask, and the features up to each image's length: difference 0; zeros after it."""
    reference = naflex(tmp_path)
    processor = Siglip2ImageProcessorPil.from_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path), layers=LAYERS)
    inputs = processor(images=photographs(), return_tensors="pt")
    pixels = batch(encoder)
    assert pixels.grids is not None
    assert torch.equal(pixels.grids, inputs["spatial_shapes"])
    assert len(set(map(tuple, pixels.grids.tolist()))) == 4
    values = encoder.normalize(pixels.values, pixels.grids)
    assert torch.equal(values, inputs["pixel_values"])
    encoded = encoder.encode(pixels)
    with torch.inference_mode():
        expected = reference(**inputs, output_hidden_states=True)
    theirs = {layer: expected.hidden_states[int(layer)] for layer in LAYERS[:-1]}
    theirs["last"] = expected.last_hidden_state
    for layer, values in theirs.items():
        for i, length in enumerate(pixels.grids.prod(1).tolist()):
            assert 0 < length <= 20
            torch.testing.assert_close(
                encoded.features[layer][i, :length], values[i, :length], rtol=0, atol=0
            )
            assert not encoded.features[layer][i, length:].any()
    torch.testing.assert_close(encoded.pooled, expected.pooler_output, rtol=0, atol=0)
    assert torch.equal(encoded.grids, pixels.grids)
    assert encoded.features["-2"].shape == (4, 20, 24)
    found = fingerprint(encoder)
    assert found["features"]["lengths"] == "per image"
    assert found["preprocessing"]["aspect"] == "grid"


def test_naflex_in_parts_is_naflex_at_once(tmp_path: Path) -> None:
    """Grids stay with their images when memory makes a batch be cut."""
    naflex(tmp_path)
    whole = load_encoder(str(tmp_path), layers=("-1",))
    cut = load_encoder(str(tmp_path), layers=("-1",))
    cut.max_batch = 3
    expected, encoded = whole.encode(batch(whole)), cut.encode(batch(cut))
    assert torch.equal(encoded.grids, expected.grids)
    torch.testing.assert_close(
        encoded.features["-1"], expected.features["-1"], rtol=1e-4, atol=1e-5
    )


# ------------------------------------------------------------------------------------- ConvNeXt

STAGES: dict[str, Any] = {"hidden_sizes": [4, 6, 8, 10], "depths": [1, 2, 3, 1]}


def convnext(folder: Path) -> PreTrainedModel:
    model = randomised(ConvNextModel(ConvNextConfig(**STAGES)))
    model.save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 64}).save_pretrained(folder)
    return model


def dinov3_convnext(folder: Path) -> PreTrainedModel:
    model = randomised(DINOv3ConvNextModel(DINOv3ConvNextConfig(**STAGES)))
    model.save_pretrained(folder)
    dinov3_processor(folder, 64)
    return model


def gridded(stage: torch.Tensor, side: int) -> torch.Tensor:
    """What Cambrian-1's `CLIPConvNextTower.interpolate` says: float[B, D, S, S] -> [B, P, D]."""
    resized = functional.interpolate(
        stage.float(), size=(side, side), mode="bilinear", align_corners=False
    )
    return resized.flatten(2, 3).permute(0, 2, 1)


@pytest.mark.parametrize("build", [convnext, dinov3_convnext])
def test_convnext_stages_on_one_grid(
    tmp_path: Path, build: Callable[[Path], PreTrainedModel]
) -> None:
    """All stages' channels side by side, on the grid of the last one; difference 0."""
    reference = build(tmp_path)
    encoder = load_encoder(str(tmp_path), layers=("multi-stage",))
    pixels = batch(encoder)
    encoded = encoder.encode(pixels)
    with torch.inference_mode():
        states = reference(
            encoder.normalize(pixels.values), output_hidden_states=True
        ).hidden_states[-4:]
    expected = torch.cat([gridded(stage, 2) for stage in states], -1)
    torch.testing.assert_close(encoded.features["multi-stage"], expected, rtol=0, atol=0)
    assert expected.shape == (4, encoder.num_patches, encoder.width) == (4, 4, 28)
    assert encoded.pooled is None and not encoder.tower.pools
    single = load_encoder(str(tmp_path), layers=("-2",)).encode(pixels).features["-2"]
    torch.testing.assert_close(single, gridded(states[-2], 2), rtol=0, atol=0)
    interpolated = fingerprint(encoder)["features"]["interpolated"]
    assert interpolated == "bilinear in float32 to 2 x 2"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("last",), "has no layer last; it has 'multi-stage'"),
        (("5",), "has no layer 5"),
        (("-1", "-2"), r"differ in width \(-1 has 10, -2 has 8 channels\)"),
    ],
)
def test_convnext_layers_that_a_store_cannot_hold(
    tmp_path: Path, layers: tuple[str, ...], message: str
) -> None:
    convnext(tmp_path)
    with pytest.raises(EncoderError, match=message):
        load_encoder(str(tmp_path), layers=layers)


class TimmBlock(nn.Module):
    """timm's `ConvNeXtBlock`, from its definition."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = self.mlp["fc2"](functional.gelu(self.mlp["fc1"](y))).permute(0, 3, 1, 2)
        return x + y * self.gamma.view(1, -1, 1, 1)


class TimmNorm(nn.LayerNorm):
    """timm's `LayerNorm2d`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TimmConvNext(nn.Module):
    """timm's ConvNeXt trunk, from its definition, with timm's names."""

    def __init__(self, widths: list[int], depths: list[int], eps: float) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), TimmNorm(widths[0], eps=eps))
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            before = widths[i - 1]
            down = nn.Sequential(TimmNorm(before, eps=eps), nn.Conv2d(before, width, 2, 2))
            blocks = nn.Sequential(*(TimmBlock(width, eps) for _ in range(depth)))
            stage = {"downsample": down if i else nn.Identity(), "blocks": blocks}
            self.stages.append(nn.ModuleDict(stage))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x, found = self.stem(x), []
        for stage in self.stages:
            x = stage["blocks"](stage["downsample"](x))
            found.append(x)
        return found


@pytest.fixture
def timm_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TimmConvNext:
    """A registered encoder "timm-tiny" whose repository is an OpenCLIP folder."""
    model = TimmConvNext(STAGES["hidden_sizes"], STAGES["depths"], eps=1e-2).eval()
    generator = torch.Generator().manual_seed(2)
    for weight in model.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    entry = EncoderEntry(
        description="", hub_id=str(tmp_path), num_patches=9, width=28, pixels=64, tflop=0.0,
        model_type="open_clip_convnext", architecture={**STAGES, "layer_norm_eps": 1e-2},
        processor={"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
        describes_itself=False, grid=3,
    )  # fmt: skip
    monkeypatch.setitem(registry.ENCODERS, "timm-tiny", entry)
    return model


def open_clip_weights(model: TimmConvNext) -> dict[str, torch.Tensor]:
    trunk = {f"visual.trunk.{name}": value for name, value in model.state_dict().items()}
    head = {"visual.trunk.head.norm.weight": torch.ones(10), "logit_scale": torch.ones(1)}
    return trunk | head | {"visual.head.proj.weight": torch.ones(3, 10)}


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_cambrians_convnext_is_timms_from_open_clip_weights(
    tmp_path: Path, timm_entry: TimmConvNext, file: str
) -> None:
    """fp32, tolerance 1e-6; largest difference measured: 0, of values up to 2.6."""
    weights = open_clip_weights(timm_entry)
    if file.endswith("bin"):
        torch.save(weights, tmp_path / file)
    else:
        save_file(weights, tmp_path / file)
    encoder = load_encoder("timm-tiny", layers=("multi-stage",), fit="pad")
    pixels = batch(encoder)
    with torch.inference_mode():
        stages = timm_entry(encoder.normalize(pixels.values))
    expected = torch.cat([gridded(stage, 3) for stage in stages], -1)
    encoded = encoder.encode(pixels).features["multi-stage"]
    assert encoded.shape == (4, 9, 28)
    torch.testing.assert_close(encoded, expected, rtol=1e-6, atol=1e-6)
    by_folder = load_encoder(str(tmp_path), layers=("multi-stage",), fit="pad")
    assert by_folder.weights == encoder.weights and by_folder.num_patches == 9


def test_open_clip_repositories_that_lack_something(
    tmp_path: Path, timm_entry: TimmConvNext
) -> None:
    with pytest.raises(EncoderError, match=r"has none of open_clip_model\.safetensors, model\."):
        load_encoder("timm-tiny", layers=("multi-stage",))
    weights = open_clip_weights(timm_entry)
    del weights["visual.trunk.stages.2.blocks.1.gamma"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(EncoderError, match=r"lacks 1 of .*stages\.2\.layers\.1\.layer_scale"):
        load_encoder("timm-tiny", layers=("multi-stage",))
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"half")
    with pytest.raises(EncoderError, match="cannot load the weights of 'timm-tiny' from"):
        load_encoder("timm-tiny", layers=("multi-stage",))
