"""The loops that are written without this project, beside those of align/bench/loops.py.

B samples, T sequence length
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaConfig, LlavaForConditionalGeneration

from align.bench.loops import Loop, LoopSpec, encoder_of
from align.data.tokens import IGNORE, SampleEncoder
from featcache.manifests import Record
from featcache.registry import ENCODERS

PREFETCH_FACTOR = 2
"""Batches ahead of each worker, torch's own default."""


class Plain(Loop[dict[str, Any]]):
    """The loop of a careful user without this project: the frozen parts under `no_grad` or without
    gradients, their cache off, autocast as in ours."""

    name = "plain"

    def __init__(self, spec: LoopSpec) -> None:
        super().__init__(spec)
        self.vision = encoder_of(self).model
        self.llm = self.model.llm.model
        self.trained = list(self.connector().parameters())
        optim = self.config.optim
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=optim.lr, weight_decay=optim.weight_decay
        )
        self.index_batches: list[list[int]] = []
        records = [sample.record for sample in self.samples]
        photos = CaptionedPhotos(
            spec.images, records, self._slots(), self.parts.encoder, image_processor(spec.model)
        )
        self.loader: DataLoader[dict[str, Any]] = DataLoader(
            photos,
            batch_sampler=self.index_batches,
            num_workers=spec.workers,
            collate_fn=pad,
            prefetch_factor=PREFETCH_FACTOR if spec.workers else None,
            persistent_workers=spec.workers > 0,
            pin_memory=self.device.type == "cuda",
            # Forking a process that has threads, and CUDA, is not safe.
            multiprocessing_context="spawn" if spec.workers else None,
        )

    def connector(self) -> nn.Module:
        """What is trained."""
        return self.model.connector

    def ahead(self) -> int:
        return PREFETCH_FACTOR * self.spec.workers

    def feed(
        self, index_batches: Sequence[NDArray[np.int64]]
    ) -> Generator[dict[str, Any], None, None]:
        self.index_batches[:] = [indices.tolist() for indices in index_batches]
        iterator: Iterator[dict[str, Any]] = iter(self.loader)
        yield from iterator

    def step(self, fed: dict[str, Any]) -> tuple[float, float]:
        batch = {
            name: value.to(self.device, non_blocking=True)
            for name, value in fed.items()
            if isinstance(value, Tensor)
        }
        batch["pixel_values"] = batch["pixel_values"].to(self.vision.dtype)
        with self.model.precision():
            loss = self.loss(batch, fed["sizes"])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), norm.item()

    def loss(self, batch: dict[str, Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Nats per supervised token. sizes: (width, height) of the images."""
        with torch.no_grad():
            seen = self.vision(batch["pixel_values"], output_hidden_states=True)
            features = seen.hidden_states[int(self.parts.layers[0])]
            embeds = self.llm.get_input_embeddings()(batch["input_ids"])
        visual = self.model.connector([features.float()], sizes)
        is_slot = batch["is_slot"][..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(is_slot, visual.to(embeds.dtype))
        output = self.llm(
            inputs_embeds=embeds,
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            use_cache=False,
        )
        return output.loss

    def contents(self, fed: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        return tuple(fed["ids"]), int((fed["labels"][:, 1:] != IGNORE).sum())


class Llava(Plain):
    """The same around transformers' own `LlavaForConditionalGeneration`, which has the encoder, the
    MLP and the language model in it. For `connector.name=mlp` with two layers."""

    name = "llava"

    def connector(self) -> nn.Module:
        mlp: Any = self.model.connector.core.layers
        config = LlavaConfig(
            vision_config=self.vision.config,
            text_config=self.llm.config,
            image_token_index=self.model.llm.image_token_id,
            projector_hidden_act="gelu",
            vision_feature_layer=int(self.parts.layers[0]),
            vision_feature_select_strategy="full",
        )
        with torch.device("meta"):  # all of its parts are put in place of those it would make
            self.llava = LlavaForConditionalGeneration(config)
        self.llava.model.vision_tower = self.vision
        self.llava.model.language_model = self.llm.model
        self.llava.lm_head = self.llm.lm_head
        projector = self.llava.model.multi_modal_projector
        projector.linear_1, projector.linear_2 = mlp[0], mlp[2]
        return projector

    def loss(self, batch: dict[str, Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        names = ("input_ids", "pixel_values", "attention_mask", "labels")
        return self.llava(**{name: batch[name] for name in names}, use_cache=False).loss


class CaptionedPhotos(Dataset[dict[str, Any]]):
    """An item is a sample, read, decoded, processed and tokenised when it is asked for."""

    def __init__(
        self,
        folder: Path,
        records: Sequence[Record],
        slots: Sequence[Sequence[int]],
        encoder: SampleEncoder,
        processor: Any,
    ) -> None:
        self.folder, self.records, self.slots = folder, records, slots
        self.encoder, self.processor = encoder, processor

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        image = Image.open(self.folder / record.images[0]).convert("RGB")
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        tokens = self.encoder.encode(record, self.slots[index])
        return {
            "id": record.id,
            "size": image.size,
            "pixel_values": pixels,
            "input_ids": torch.from_numpy(tokens.input_ids),
            "labels": torch.from_numpy(tokens.labels),
            "is_slot": torch.from_numpy(tokens.is_slot),
        }


def pad(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items: pixel_values float32[B, 3, height, width]; the others [B, T], padded on the
    right."""

    def padded(name: str, value: int) -> Tensor:
        rows = [item[name] for item in items]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    return {
        "ids": [item["id"] for item in items],
        "sizes": [item["size"] for item in items],
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", IGNORE),
        "is_slot": padded("is_slot", 0),
        "attention_mask": (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long(),
    }


def image_processor(model: str) -> Any:
    """Hugging Face's own, of the Pillow kind: torchvision may not be there."""
    entry = ENCODERS[model]
    if entry.asset is None:
        return transformers.SiglipImageProcessorPil(**(entry.processor or {}))
    assets = importlib.resources.files("featcache") / "assets" / entry.asset
    return transformers.SiglipImageProcessorPil.from_pretrained(str(assets))
