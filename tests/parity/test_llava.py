"""Our cached path against transformers' own LLaVA, from random weights, in fp32.

`LlavaForConditionalGeneration(SiglipVisionConfig, Qwen3Config)` runs the tower, the projector and
the language model live; ours starts from features that were computed before. Loss and projector
gradients must agree.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import featcache
from align.connectors import build_connector
from align.connectors.mlp import MlpConfig
from align.data.collate import Batch, collate
from align.data.dataset import Sample
from align.data.templates import TemplateConfig
from align.data.tokens import SampleEncoder
from align.llm import LLMConfig, freeze
from align.vlm import AlignModel
from featcache.extract import ExtractOptions, extract
from featcache.manifests import read_manifest

TOKENIZER = Path(featcache.__file__).parents[1] / "align" / "assets" / "qwen3-tiny"
P, D, H = 16, 48, 64
CAPTIONS = ("a red square", "a large blue circle above a small green triangle", "two", "x " * 9)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise images with captions, a random tower, and its features in fp16."""
    root = tmp_path_factory.mktemp("parity")
    torch.manual_seed(0)
    lines = []
    for i, caption in enumerate(CAPTIONS):
        noise = torch.randint(0, 256, (40, 30 + i, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(root / f"{i}.png")
        lines.append(f'{{"id": "{i}", "images": ["{i}.png"], "caption": "{caption}"}}\n')
    (root / "data.jsonl").write_text("".join(lines))
    SiglipVisionModel(_siglip()).save_pretrained(root / "siglip")
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / "siglip")
    extract(ExtractOptions(str(root / "siglip"), (root / "data.jsonl",), root / "store.zarr", root))
    return root


def _siglip() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=D,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )


@pytest.fixture(scope="module")
def theirs(world: Path) -> LlavaForConditionalGeneration:
    from transformers import AutoTokenizer

    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=_siglip(),
            text_config=Qwen3Config(
                vocab_size=512,
                hidden_size=H,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                initializer_range=0.1,
                pad_token_id=tokenizer.pad_token_id,
                tie_word_embeddings=False,
            ),
            vision_feature_layer=-2,
            vision_feature_select_strategy="full",
            image_seq_length=P,
            projector_hidden_act="gelu",
            multimodal_projector_bias=True,
            image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        )
    )
    tower = SiglipVisionModel.from_pretrained(world / "siglip", dtype=torch.float32)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model.eval()


@pytest.fixture(scope="module")
def ours(theirs: LlavaForConditionalGeneration) -> AlignModel:
    """The same weights in our parts."""
    from transformers import AutoTokenizer

    language_model = Qwen3ForCausalLM(theirs.config.text_config)
    language_model.model.load_state_dict(theirs.model.language_model.state_dict())
    language_model.lm_head.load_state_dict(theirs.lm_head.state_dict())
    llm = freeze(language_model, AutoTokenizer.from_pretrained(TOKENIZER), LLMConfig())
    connector = build_connector(MlpConfig(), [(P, D)], H)
    projector = theirs.model.multi_modal_projector.state_dict()
    connector.load_state_dict(
        {
            f"core.layers.{index}.{part}": projector[f"linear_{number}.{part}"]
            for index, number in ((0, 1), (2, 2))
            for part in ("weight", "bias")
        }
    )
    return AlignModel(connector, llm)


@pytest.fixture(scope="module", params=["caption", "plain"])
def batch(request: pytest.FixtureRequest, world: Path, ours: AlignModel) -> Batch:
    """All samples with the stored features."""
    store = featcache.open(world / "store.zarr")
    encoder = SampleEncoder(
        ours.llm.tokenizer, TemplateConfig(name=request.param), ours.llm.image_token_id, 200
    )
    records = read_manifest([world / "data.jsonl"], world).records
    samples = [Sample(r, store.rows(list(r.images))[:, None]) for r in records]
    keys = [key for r in records for key in r.images]
    with store.reader() as reader:
        features = reader.read(store.rows(keys))
    tokenized = [encoder.encode(r, [P] * len(r.images)) for r in records]
    return collate(tokenized, samples, [features], [(1, 1)] * len(keys))


def pixels(world: Path) -> torch.Tensor:
    """float32[I, 3, 32, 32] by transformers' own processor."""
    images = [Image.open(world / f"{i}.png").convert("RGB") for i in range(len(CAPTIONS))]
    processor = SiglipImageProcessorPil.from_pretrained(world / "siglip")
    return processor(images, return_tensors="pt").pixel_values


def their_loss_and_gradients(
    model: LlavaForConditionalGeneration, batch: Batch, world: Path
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    T = batch.input_ids.shape[1]
    last = torch.tensor([int((row != -100).nonzero().max()) for row in batch.labels])
    loss = model(
        input_ids=batch.input_ids,
        pixel_values=pixels(world),
        attention_mask=(torch.arange(T)[None] <= last[:, None]).long(),
        labels=batch.labels,
    ).loss
    loss.backward()
    projector = model.model.multi_modal_projector
    return loss.detach(), {
        f"core.layers.{index}.{part}": getattr(
            getattr(projector, f"linear_{number}"), part
        ).grad.clone()
        for index, number in ((0, 1), (2, 2))
        for part in ("weight", "bias")
    }


def our_loss_and_gradients(
    model: AlignModel, batch: Batch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss, count = model(batch)
    (loss / count).backward()
    return (loss / count).detach(), {
        name: p.grad.clone() for name, p in model.connector.named_parameters() if p.grad is not None
    }


def worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of a gradient's element, over that gradient's largest element."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in ours
    )


def test_unrounded_features(
    theirs: LlavaForConditionalGeneration, ours: AlignModel, batch: Batch, world: Path
) -> None:
    """With the tower's features in fp32, nothing differs but the order of some sums."""
    with torch.no_grad():
        hidden = theirs.model.vision_tower(pixels(world), output_hidden_states=True).hidden_states
    expected, their_gradients = their_loss_and_gradients(theirs, batch, world)
    loss, our_gradients = our_loss_and_gradients(ours, replace(batch, features=(hidden[-2],)))
    # Measured worst case: 1.4e-7 of the loss, 5.3e-7 of a gradient.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert worst(our_gradients, their_gradients) < 5e-6


def test_stored_features(
    theirs: LlavaForConditionalGeneration, ours: AlignModel, batch: Batch, world: Path
) -> None:
    """From pixels through extraction, the fp16 store and the reader."""
    expected, their_gradients = their_loss_and_gradients(theirs, batch, world)
    loss, our_gradients = our_loss_and_gradients(ours, batch)
    # Measured worst case: 1.4e-5 of the loss, 3.7e-4 of a gradient; fp16 keeps 4.9e-4 of a value.
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert worst(our_gradients, their_gradients) < 2e-3
