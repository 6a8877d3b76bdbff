"""Batches of every shape and small models to run them through, for tests of the training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

import align
from align.connectors import build_connector
from align.connectors.pooling import PoolConfig
from align.data.collate import Batch, collate
from align.data.dataset import Sample
from align.data.tokens import IGNORE, TokenizedSample
from align.llm import LLMConfig, load_llm
from align.vlm import AlignModel
from featcache.manifests import Record
from tests.align.conftest import save_qwen3
from tests.support_models import save_llama

Q, PATCHES, WIDTH = 4, 16, 48

MIXED = ((20, 1), (1, 0), (33, 2), (9, 0), (12, 1))
"""(tokens, images) of samples: among them text alone, several images, and a single token."""


@dataclass
class Parts:
    """What `collate` takes, of samples of random tokens."""

    tokenized: list[TokenizedSample]
    samples: list[Sample]
    features: list[Tensor]
    sizes: list[tuple[int, int]]

    def collate(self, **options: Any) -> Batch:
        return collate(self.tokenized, self.samples, self.features, self.sizes, **options)


def random_parts(
    kinds: Sequence[tuple[int, int]] = MIXED, vocabulary: int = 400, seed: int = 0
) -> Parts:
    """kinds: of each sample (tokens, images); the second half of its tokens is supervised."""
    rng = np.random.default_rng(seed)
    parts = Parts([], [], [], [])
    for i, (tokens, images) in enumerate(kinds):
        ids = rng.integers(0, vocabulary, tokens)
        is_slot = np.zeros(tokens, np.bool_)
        for image in range(images):
            first = 1 + image * (Q + 2)
            is_slot[first : first + Q] = True
        assert is_slot.sum() == images * Q
        # The first token, too, where there is no other: it must not be learned from what stands
        # before it in a packed row.
        labels = np.where((np.arange(tokens) >= tokens // 2) & ~is_slot, ids, IGNORE)
        parts.tokenized.append(TokenizedSample(ids, labels, is_slot))
        keys = tuple(f"{i}-{k}.png" for k in range(images))
        record = Record(f"s{i}", keys, (), None, f"test:{i}")
        parts.samples.append(Sample(record, np.zeros((images, 1), np.int64)))
        parts.sizes += [(32, 32)] * images
    generator = torch.Generator().manual_seed(seed)
    parts.features.append(torch.randn(len(parts.sizes), PATCHES, WIDTH, generator=generator))
    return parts


def save_language_model(folder: Path, family: str, **changes: Any) -> Path:
    """A small random "qwen3" (grouped heads) or "llama" (of equal heads)."""
    if family == "qwen3":
        save_qwen3(folder, **changes)
    else:
        shipped = Path(align.__file__).parent / "assets" / "qwen3-tiny"
        save_llama(folder, AutoTokenizer.from_pretrained(shipped), **changes)
    return folder


def make_model(folder: Path, autocast: torch.dtype | None = None, **changes: Any) -> AlignModel:
    """A connector without attention in front of the language model of a folder.

    changes: of its `LLMConfig`.
    """
    config = LLMConfig(name=str(folder), **changes)
    llm = load_llm(config, torch.device("cpu"), autocast or torch.float32)
    torch.manual_seed(0)
    connector = PoolConfig(side=2)
    return AlignModel(
        build_connector(connector, [(PATCHES, WIDTH)], llm.hidden_size), llm, autocast
    )


@dataclass
class Step:
    """loss: the sum. count: supervised tokens. gradients: of the connector."""

    loss: float
    count: int
    gradients: dict[str, Tensor]

    def apart(self, other: Step) -> tuple[float, float]:
        """Relative difference of the loss, and the largest of a gradient by the largest element of
        all gradients."""
        assert self.gradients.keys() == other.gradients.keys() and self.count == other.count
        largest = max(float(g.abs().max()) for g in other.gradients.values())
        gradient = max(
            float((g - other.gradients[n]).abs().max()) for n, g in self.gradients.items()
        )
        return abs(self.loss - other.loss) / abs(other.loss), gradient / largest


def run_step(model: AlignModel, batch: Batch) -> Step:
    """Forward and backward."""
    model.zero_grad()
    loss, count = model(batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Step(loss.item(), count, gradients)
