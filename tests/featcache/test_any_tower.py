"""Vision towers of families that are not known here: understood by what they do, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    DeiTConfig,
    DeiTModel,
    IJepaConfig,
    IJepaModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from featcache.encoders import load_encoder
from featcache.errors import EncoderError
from featcache.fingerprint import fingerprint

SHAPE: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip
PIXELS = {"image_size": 32, "patch_size": 8}


def save(model: PreTrainedModel, folder: Path, side: int = 32) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for weight in model.parameters():
            weight.data = 0.3 * torch.randn(weight.shape)
    model.eval().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)


def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("model", "prefix", "dropped"),
    [
        (lambda: IJepaModel(IJepaConfig(**SHAPE, **PIXELS)), 0, "none"),
        (lambda: DeiTModel(DeiTConfig(**SHAPE, **PIXELS)), 2, "2 before the patches"),
        (lambda: BeitModel(BeitConfig(**SHAPE, **PIXELS)), 1, "cls"),
    ],
    ids=["ijepa", "deit", "beit"],
)
def test_the_tokens_before_the_patches_are_found_by_counting(
    tmp_path: Path, model: Any, prefix: int, dropped: str
) -> None:
    reference = model()
    save(reference, tmp_path)
    encoder = load_encoder(str(tmp_path), layers=("0", "-2", "last"))
    encoded = encoder.encode(encoder.collate(list(pixels().numpy())))
    with torch.inference_mode():
        expected = reference(encoder.normalize(pixels()), output_hidden_states=True)
    for layer, states in (
        ("0", expected.hidden_states[0]),
        ("-2", expected.hidden_states[-2]),
        ("last", expected.last_hidden_state),
    ):
        torch.testing.assert_close(encoded.features[layer], states[:, prefix:], rtol=0, atol=0)
        assert encoded.features[layer].shape == (2, 16, 24)
    found = fingerprint(encoder)
    assert found["features"]["dropped_tokens"] == dropped
    assert json.loads(json.dumps(found)) == found


def test_the_tower_of_a_model_of_images_and_words(tmp_path: Path) -> None:
    """A whole LLaVA: its tower alone, with the fingerprint's weights of that tower alone."""
    vision = CLIPVisionConfig(**SHAPE, **PIXELS)
    text = LlamaConfig(**SHAPE, vocab_size=50)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=1)
    )
    save(llava, tmp_path / "llava")
    clip_text = CLIPTextConfig(**SHAPE, vocab_size=50)
    clip = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=clip_text.to_dict()))
    tower = load_encoder(str(tmp_path / "llava"), layers=("-2", "last"))
    clip.vision_model.load_state_dict(tower.model.state_dict())
    clip.eval().save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path / "clip")
    family = load_encoder(str(tmp_path / "clip"), layers=("-2", "last"))
    assert tower.weights == family.weights
    stated, known = fingerprint(tower), fingerprint(family)
    assert stated["features"] == known["features"]
    assert stated["features"]["post_layernorm"] == [False, False]
    batch = tower.collate(list(pixels().numpy()))
    ours, theirs = tower.encode(batch), family.encode(batch)
    # Other mean and standard deviation, so equal only on the same pixels.
    values = family.normalize(pixels())
    for layer in ("-2", "last"):
        torch.testing.assert_close(
            tower.tower.forward(values, None).features[layer], theirs.features[layer],
            rtol=0, atol=0,
        )  # fmt: skip
        assert not torch.equal(ours.features[layer], theirs.features[layer])


def test_a_checkpoint_without_the_pooling_layer_has_no_pooled_output(tmp_path: Path) -> None:
    """Most have none; and nothing random gets into the digest of the weights."""
    save(ViTModel(ViTConfig(**SHAPE, **PIXELS)), tmp_path / "with")
    without = shutil.copytree(tmp_path / "with", tmp_path / "without")
    weights = load_file(without / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("pooler.")}
    save_file(kept, without / "model.safetensors", {"format": "pt"})
    first, second = load_encoder(str(without)), load_encoder(str(without))
    assert first.weights == second.weights != load_encoder(str(tmp_path / "with")).weights
    assert not first.tower.pools and load_encoder(str(tmp_path / "with")).tower.pools
    encoded = first.encode(first.collate(list(pixels().numpy())))
    assert encoded.pooled is None and encoded.features["-2"].shape == (2, 16, 24)


@pytest.mark.parametrize(
    ("model", "side", "why"),
    [
        (
            lambda: SwinModel(
                SwinConfig(
                    image_size=32,
                    patch_size=4,
                    embed_dim=8,
                    depths=[1, 1],
                    num_heads=[1, 1],
                    window_size=4,
                )
            ),
            32,
            r"its outputs are no tokens of one shape \(\[\(3, 16, 16\), \(3, 64, 8\)\]\)",
        ),
        (
            lambda: ViTMAEModel(ViTMAEConfig(**SHAPE, **PIXELS, mask_ratio=0.0)),
            32,
            "its tokens are not the patches row by row: the first and the last patch moved",
        ),
        (
            lambda: ViTMAEModel(ViTMAEConfig(**SHAPE, **PIXELS, mask_ratio=0.75)),
            32,
            "it makes 5 x 24 of 16 patches",
        ),
        (
            lambda: ViTModel(ViTConfig(**SHAPE, **PIXELS)),
            36,
            "makes 36 x 36 pixels, which are no whole patches of 8 x 8",
        ),
        (
            lambda: ViTModel(ViTConfig(**SHAPE, **PIXELS)),
            40,
            "it does not take pixels alone",
        ),
    ],
    ids=["swin", "shuffled", "masked", "odd", "another size"],
)
def test_what_cannot_be_understood_is_refused_in_one_line(
    tmp_path: Path, model: Any, side: int, why: str
) -> None:
    save(model(), tmp_path, side)
    with pytest.raises(EncoderError, match=why) as caught:
        load_encoder(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert "docs/encoders.md" in str(caught.value)


def test_processors_that_do_more_than_they_say_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(ViTModel(ViTConfig(**SHAPE, **PIXELS)), tmp_path)
    resize = ViTImageProcessorPil.resize
    monkeypatch.setattr(
        ViTImageProcessorPil, "resize", lambda self, *a, **k: resize(self, *a, **k)[:, ::-1]
    )
    with pytest.raises(EncoderError, match="ViTImageProcessorPil, makes other pixels than its"):
        load_encoder(str(tmp_path))


def test_random_weights(tmp_path: Path) -> None:
    save(ViTModel(ViTConfig(**SHAPE, **PIXELS)), tmp_path)
    first, second = (load_encoder(str(tmp_path), random_weights=True) for _ in range(2))
    assert first.weights == second.weights != load_encoder(str(tmp_path)).weights


def test_missing_weights_are_never_replaced_by_random_ones(tmp_path: Path) -> None:
    save(ViTModel(ViTConfig(**SHAPE, **PIXELS)), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("layernorm.weight"))]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match=r"lacks 1 of the vision tower's weights.*layernorm"):
        load_encoder(str(tmp_path))


def test_a_processor_that_needs_torchvision_is_named(tmp_path: Path) -> None:
    save(ViTModel(ViTConfig(**SHAPE, **PIXELS)), tmp_path)
    path = tmp_path / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"image_processor_type": "SamHQNoSuchImageProcessor"}))
    with pytest.raises(
        EncoderError, match="SamHQNoSuchImageProcessor, has no form in transformers"
    ):
        load_encoder(str(tmp_path))
