"""Cambrian-S's visual slots, unpadded and with newlines, against an implementation that walks over
rows and patches of the padded square, written from RECIPES section 3 alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align.connectors import Connector, Size, build_connector
from align.connectors.layout import LayoutConfig
from align.connectors.mlp import MlpConfig
from align.data.collate import Batch, collate
from align.data.dataset import Sample
from align.data.templates import TemplateConfig
from align.data.tokens import SampleEncoder
from align.llm import FrozenLLM, LLMConfig, load_llm
from align.vlm import AlignModel
from featcache.manifests import Record, Turn

SIDE, D = 27, 8
SLOTS = {  # of RECIPES section 3
    (384, 384): 756,
    (640, 480): 588,
    (480, 640): 594,
    (500, 333): 476,
    (1920, 1080): 420,
    (1080, 1920): 432,
    (1000, 100): 84,
}


@pytest.fixture(scope="module")
def llm() -> FrozenLLM:
    return load_llm(LLMConfig(), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def connector(llm: FrozenLLM) -> Connector:
    """mlp2x_gelu over the 27 x 27 grid, and the newline."""
    torch.manual_seed(0)
    layout = LayoutConfig(newline=True, unpad=True)
    return build_connector(MlpConfig(), [(SIDE * SIDE, D)], llm.hidden_size, layout, padded=True)


def image_by_hand(features: Tensor, size: Size, w: dict[str, Tensor]) -> Tensor:
    """features[729, D] -> what takes the image's place in the sequence, [h * (w + 1), H]."""
    width, height = size
    rows, columns = range(SIDE), range(SIDE)
    if width > height:
        border = (SIDE - int(height * SIDE / width)) // 2
        rows = range(border, SIDE - border)
    elif height > width:
        border = (SIDE - int(width * SIDE / height)) // 2
        columns = range(border, SIDE - border)
    slots = []
    for row in rows:
        for column in columns:
            patch = features[row * SIDE + column]
            hidden = w["core.layers.0.weight"] @ patch + w["core.layers.0.bias"]
            hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
            slots.append(w["core.layers.2.weight"] @ hidden + w["core.layers.2.bias"])
        slots.append(w["layout.newline"])
    return torch.stack(slots)


def make_batch(
    llm: FrozenLLM, connector: Connector, sizes: list[list[Size]], dtype: torch.dtype
) -> Batch:
    """Samples with images of those sizes, and random features."""
    encoder = SampleEncoder(llm.tokenizer, TemplateConfig(), llm.image_token_id, 4000)
    samples, tokenized = [], []
    for number, own in enumerate(sizes):
        keys = tuple(f"{number}-{i}.png" for i in range(len(own)))
        turns = (Turn("human", "<image>" * len(own)), Turn("gpt", "a " * (number + 1) + "circle"))
        record = Record(str(number), keys, turns, None, f"x:{number}")
        rows = torch.zeros((len(own), 1), dtype=torch.int64).numpy()
        samples.append(Sample(record, rows))
        tokenized.append(encoder.encode(record, [connector.num_slots(size) for size in own]))
    flat = [size for own in sizes for size in own]
    torch.manual_seed(1)
    features = torch.randn(len(flat), SIDE * SIDE, D, dtype=dtype)
    return collate(tokenized, samples, [features], flat)


def loss_by_hand(llm: FrozenLLM, batch: Batch, images: list[Tensor]) -> Tensor:
    """Each sample by itself, without padding; the mean over all supervised tokens."""
    losses, at = [], 0
    for row, labels in enumerate(batch.labels):
        length = int((labels != -100).nonzero().max()) + 1
        parts, t = [], 0
        while t < length:
            if batch.is_slot[row, t]:
                parts.append(images[at])
                t += len(images[at])
                at += 1
            else:
                parts.append(llm.embedding(batch.input_ids[row, t : t + 1]))
                t += 1
        embeds = torch.cat(parts)
        assert len(embeds) == length
        logits = llm.model(inputs_embeds=embeds[None]).logits[0]
        for t in range(1, length):
            if labels[t] != -100:
                losses.append(torch.logsumexp(logits[t - 1], 0) - logits[t - 1, labels[t]])
    assert at == len(images)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("size", SLOTS, ids=lambda size: f"{size[0]}x{size[1]}")
def test_slots(connector: Connector, size: Size) -> None:
    """Values and gradients of one image's slots, in fp64."""
    exact = connector.double()
    try:
        features = torch.randn(1, SIDE * SIDE, D, dtype=torch.float64)
        weights = {
            name: p.detach().clone().requires_grad_() for name, p in exact.named_parameters()
        }
        slots = exact([features], [size])
        expected = image_by_hand(features[0], size, weights)
        assert len(slots) == len(expected) == exact.num_slots(size) == SLOTS[size]
        pull = torch.randn_like(slots)
        gradients = torch.autograd.grad((slots * pull).sum(), list(exact.parameters()))
        by_hand = torch.autograd.grad((expected * pull).sum(), list(weights.values()))
    finally:
        connector.float()
    # Measured worst case: 1.6e-15 of slots of size 1 to 3, 2.2e-15 of a gradient.
    torch.testing.assert_close(slots, expected, rtol=0, atol=1e-14)
    for name, ours, hand in zip(weights, gradients, by_hand, strict=True):
        largest = float(hand.abs().max())
        assert largest > 0
        torch.testing.assert_close(ours, hand, rtol=0, atol=1e-13 * largest, msg=name)


@pytest.mark.parametrize(
    "sizes",
    [
        [[(384, 384)]],
        [[(640, 480)], [(1000, 100)], [(480, 640)]],
        [[(500, 333)], [(1920, 1080), (1080, 1920)]],
    ],
    ids=["square", "padded batch", "two images"],
)
def test_loss_and_gradients(llm: FrozenLLM, connector: Connector, sizes: list[list[Size]]) -> None:
    batch = make_batch(llm, connector, sizes, torch.float32)
    model = AlignModel(connector, llm)
    loss, count = model(batch)
    ours = dict(connector.named_parameters())
    gradients = torch.autograd.grad(loss / count, list(ours.values()))

    weights = {name: p.detach().clone().requires_grad_() for name, p in ours.items()}
    features = batch.features[0]
    assert isinstance(features, Tensor)
    images = [
        image_by_hand(each, size, weights) for each, size in zip(features, batch.sizes, strict=True)
    ]
    expected = loss_by_hand(llm, batch, images)
    by_hand = torch.autograd.grad(expected, list(weights.values()))
    # Measured worst case: 2.5e-7 of the loss, 2.4e-6 of a gradient.
    torch.testing.assert_close(loss / count, expected, rtol=1e-6, atol=0)
    assert "layout.newline" in weights
    for name, own, hand in zip(weights, gradients, by_hand, strict=True):
        largest = float(hand.abs().max())
        assert largest > 0
        torch.testing.assert_close(own, hand, rtol=0, atol=1e-5 * largest, msg=name)
