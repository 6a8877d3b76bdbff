"""What LLaVA parity means: our live path, our cached path and transformers' own LLaVA, in fp32.

`LlavaForConditionalGeneration` runs the tower, the projector and the language model from pixels. We
do from pixels too (live), and from features that were stored before (cached). Loss and projector
gradients must agree, on batches with padding and with several images a sample.

A test module makes a `Pair` of the same random weights and inherits `LlavaSuite`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BaseImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
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
from featcache.codecs import CODECS, LayerCodec
from featcache.encoders import Encoder, load_encoder
from featcache.extract import ExtractOptions, extract
from featcache.manifests import read_manifest

ANSWERS = {  # by the images of a sample
    (0,): "a red square",
    (1,): "a large blue circle above a small green triangle",
    (2, 3): "two, then three",
    (4,): "x " * 9 + "x",
    (5, 0, 6): "Image 1: noise. Image 2: noise.",
}
NUM_IMAGES = 7
PROJECTOR = {
    f"core.layers.{index}.{part}": f"linear_{number}.{part}"
    for index, number in ((0, 1), (2, 2))
    for part in ("weight", "bias")
}
"""Our names of the parameters -> transformers'."""

Outcome = tuple[float, dict[str, Tensor]]
"""The mean loss, and its gradient in each parameter of the connector by our names."""


@dataclass(eq=False)
class Pair:
    """The same random weights twice.

    root: NUM_IMAGES images of noise and different shapes, captions.jsonl, encoder/.
    theirs: its projector alone needs gradients. processor: transformers' own.
    """

    root: Path
    theirs: LlavaForConditionalGeneration
    ours: AlignModel
    processor: Callable[..., dict[str, Tensor]]

    @functools.cached_property
    def encoder(self) -> Encoder:
        """Ours of the same tower."""
        return load_encoder(str(self.root / "encoder"))

    @functools.cached_property
    def pixels(self) -> Tensor:
        """float32[NUM_IMAGES, 3, height, width] by transformers' processor."""
        return self.processor(images=self.images(range(NUM_IMAGES)), return_tensors="pt")[
            "pixel_values"
        ]

    def images(self, numbers: Sequence[int]) -> list[Image.Image]:
        return [Image.open(self.root / f"{i}.png").convert("RGB") for i in numbers]

    @functools.cache  # noqa: B019 - one pair a module
    def store(self, codec: str) -> Path:
        """The features of all images, as `featcache extract` stores them."""
        out = self.root / f"{codec}.zarr"
        data = (self.root / "captions.jsonl",)
        extract(ExtractOptions(str(self.root / "encoder"), data, out, self.root, codec=codec))
        return out

    def live(self, numbers: Sequence[int]) -> Tensor:
        """float32[I, P, D]: our encoder on the image files."""
        pixels = [self.encoder.preprocess(image) for image in self.images(numbers)]
        return self.encoder.encode(self.encoder.collate(pixels)).features["-2"].clone()

    def batch(self, template: str, codec: str) -> Batch:
        """All samples with the stored features."""
        store = featcache.open(self.store(codec))
        llm, patches = self.ours.llm, store.num_patches
        encoder = SampleEncoder(
            llm.tokenizer, TemplateConfig(name=template), llm.image_token_id, 500
        )
        records = read_manifest([self.root / "captions.jsonl"], self.root).records
        samples = [Sample(r, store.rows(list(r.images))[:, None]) for r in records]
        tokenized = [encoder.encode(r, [patches] * len(r.images)) for r in records]
        rows = store.rows([key for r in records for key in r.images])
        with store.reader() as reader:
            features = reader.read_stored(rows)
        return collate(tokenized, samples, [features], [(1, 1)] * len(rows))


def make_pair(
    root: Path,
    tower: PreTrainedModel,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    processor: BaseImageProcessor,
    *,
    strategy: str,
    image_token: str,
    patches: int,
) -> Pair:
    """Theirs with random weights, and our parts with the same: what tower and language_model have
    is overwritten. strategy: `vision_feature_select_strategy`. root: gets encoder/, a checkpoint of
    the tower with its processor."""
    torch.manual_seed(1)
    theirs = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower.config,
            text_config=language_model.config,
            vision_feature_layer=-2,
            vision_feature_select_strategy=strategy,
            image_seq_length=patches,
            image_token_index=tokenizer.convert_tokens_to_ids(image_token),
        )
    )
    tower.load_state_dict(theirs.model.vision_tower.state_dict())
    tower.save_pretrained(root / "encoder")
    processor.save_pretrained(root / "encoder")
    torch.manual_seed(0)
    for i in range(NUM_IMAGES):
        noise = torch.randint(0, 256, (40, 30 + 3 * i, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(root / f"{i}.png")
    lines = [
        {"id": str(n), "images": [f"{i}.png" for i in images], "caption": text}
        for n, (images, text) in enumerate(ANSWERS.items())
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "captions.jsonl").write_text(text, encoding="utf-8")
    theirs.requires_grad_(False)
    theirs.model.multi_modal_projector.requires_grad_(True)
    theirs.eval()
    language_model.base_model.load_state_dict(theirs.model.language_model.state_dict())
    language_model.get_output_embeddings().load_state_dict(theirs.lm_head.state_dict())
    llm = freeze(language_model, tokenizer, LLMConfig(image_token=image_token))
    widths = (patches, tower.config.hidden_size)
    connector = build_connector(MlpConfig(), [widths], llm.hidden_size)
    projector = theirs.model.multi_modal_projector.state_dict()
    connector.load_state_dict({ours: projector[name] for ours, name in PROJECTOR.items()})
    return Pair(root, theirs, AlignModel(connector, llm), processor)


def image_numbers(batch: Batch) -> list[int]:
    return [int(Path(key).stem) for key in batch.keys]


def of_theirs(pair: Pair, batch: Batch) -> Outcome:
    pair.theirs.zero_grad()
    last = (batch.labels != -100).int().cumsum(1).argmax(1)
    loss = pair.theirs(
        input_ids=batch.input_ids,
        pixel_values=pair.pixels[image_numbers(batch)],
        attention_mask=(torch.arange(batch.input_ids.shape[1]) <= last[:, None]).long(),
        labels=batch.labels,
    ).loss
    loss.backward()
    projector = dict(pair.theirs.model.multi_modal_projector.named_parameters())
    gradients = {}
    for ours, name in PROJECTOR.items():
        gradient = projector[name].grad
        assert gradient is not None
        gradients[ours] = gradient.clone()
    return float(loss.detach()), gradients


def of_ours(pair: Pair, batch: Batch) -> Outcome:
    loss, count = pair.ours(batch)
    named = dict(pair.ours.connector.named_parameters())
    gradients = torch.autograd.grad(loss / count, list(named.values()))
    return float(loss.detach() / count), dict(zip(named, gradients, strict=True))


def differences(ours: Outcome, theirs: Outcome) -> tuple[float, float]:
    """(difference of the loss over the loss; the largest of a gradient's element over that
    gradient's largest element)."""
    assert ours[1].keys() == theirs[1].keys()
    gradients = [
        float((ours[1][name] - theirs[1][name]).abs().max() / theirs[1][name].abs().max())
        for name in ours[1]
    ]
    return abs(ours[0] - theirs[0]) / theirs[0], max(gradients)


@contextmanager
def rounded_as_stored(pair: Pair, codec: LayerCodec) -> Iterator[None]:
    """transformers' tower gives, for layer -2, what would come back from a store."""

    def forward(*args: object, **kwargs: object) -> object:
        output = plain(*args, **kwargs)
        states = list(output.hidden_states)
        # Of CLIP the class token comes first; it is dropped either way.
        extra = states[-2].shape[1] - codec.num_patches
        patches = codec.encode(states[-2][:, extra:])[0].decode(torch.float32)
        states[-2] = torch.cat([states[-2][:, :extra], patches], 1)
        output.hidden_states = tuple(states)
        return output

    tower = pair.theirs.model.vision_tower
    plain = tower.forward
    tower.forward = forward
    try:
        yield
    finally:
        tower.forward = plain


class LlavaSuite:
    """Tests of a fixture `pair`."""

    @pytest.fixture(params=["plain", "caption"])
    def template(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_the_batch_has_what_it_is_to_prove(self, pair: Pair, template: str) -> None:
        batch = pair.batch(template, "fp16")
        assert len(batch.keys) == 8 and len(batch.ids) == 5
        lengths = (batch.labels != -100).int().cumsum(1).argmax(1)
        assert len(set(lengths.tolist())) == 5

    def test_pixels(self, pair: Pair) -> None:
        """The same bits go into both towers."""
        arrays = [pair.encoder.preprocess(image) for image in pair.images(range(NUM_IMAGES))]
        pixels = pair.encoder.collate(arrays).values
        assert torch.equal(pair.encoder.normalize(pixels), pair.pixels)

    def test_live(self, pair: Pair, template: str) -> None:
        """From pixels on both sides, nothing differs but the order of some sums."""
        batch = pair.batch(template, "fp16")
        live = replace(batch, features=(pair.live(image_numbers(batch)),))
        loss, gradients = differences(of_ours(pair, live), of_theirs(pair, batch))
        # Measured worst case: 1.5e-7 of the loss, 6.5e-7 of a gradient.
        assert loss < 1e-6
        assert gradients < 5e-6

    @pytest.mark.parametrize("codec", ["fp16", "bf16", "int8"])
    def test_cached(self, pair: Pair, template: str, codec: str) -> None:
        """What the codec costs, against a tower whose features are not rounded at all."""
        batch = pair.batch(template, codec)
        loss, gradients = differences(of_ours(pair, batch), of_theirs(pair, batch))
        # Measured worst case of the loss: 3.2e-6, 4.1e-5, 1.6e-4; of a gradient: 2.6e-4, 2.4e-3,
        # 6.4e-3. One value may be wrong by 4.9e-4 of itself in fp16, by 3.9e-3 in bf16.
        assert loss < {"fp16": 2e-5, "bf16": 2e-4, "int8": 8e-4}[codec]
        assert gradients < {"fp16": 1.5e-3, "bf16": 1.2e-2, "int8": 3e-2}[codec]

    @pytest.mark.parametrize("codec", ["fp16", "bf16", "int8"])
    def test_cached_is_exact_but_for_the_codec(self, pair: Pair, template: str, codec: str) -> None:
        """Against transformers with its features rounded as the store rounds them."""
        batch = pair.batch(template, codec)
        with rounded_as_stored(pair, featcache.open(pair.store(codec)).layer_codec("-2")):
            theirs = of_theirs(pair, batch)
        loss, gradients = differences(of_ours(pair, batch), theirs)
        # Measured worst case: 7.7e-8 of the loss, 5.6e-7 of a gradient.
        assert loss < 1e-6
        assert gradients < 5e-6

    @pytest.mark.parametrize("codec", CODECS)
    def test_cached_is_live_stored(self, pair: Pair, codec: str) -> None:
        """Our two paths, where the store holds what the encoder gave: the difference is 0.

        bf16 features (a tower that computes in bf16) are kept by the codec bf16 as they are.
        """
        batch = pair.batch("plain", codec)
        features = pair.live(range(NUM_IMAGES))
        if codec == "bf16":
            kept = features.bfloat16()
        else:
            layer = featcache.open(pair.store(codec)).layer_codec("-2")
            kept = layer.encode(features)[0].decode(torch.float32)
        live = replace(batch, features=(kept[image_numbers(batch)],))
        assert differences(of_ours(pair, batch), of_ours(pair, live)) == (0, 0)
