"""The processor of a model that `align export --format hf` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import BatchFeature, ProcessorMixin

from .connector import unpadded


class AlignVlmProcessor(ProcessorMixin):
    """Images and text -> input_ids, attention_mask, pixel_values, image_sizes.

    Each image token in the text becomes as many as its image has slots.

    num_tokens: of an image where nothing is dropped or added. grid: their rows and columns.
    newline, unpad: of the layout.
    """

    if transformers.__version__.startswith("4."):  # version 5 reads the parts off __init__
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_tokens: int = 0,
        grid: Sequence[int] | None = None,
        newline: bool = False,
        unpad: bool = False,
        **kwargs: Any,
    ) -> None:
        self.image_token = image_token
        self.num_tokens = num_tokens
        self.grid = grid
        self.newline = newline
        self.unpad = unpad
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def num_slots(self, width: int, height: int) -> int:
        """Of an image of that original size."""
        if self.grid is None:
            return self.num_tokens
        rows, columns = self.grid
        if self.unpad:
            _, _, rows, columns = unpadded((width, height), rows)
        return rows * (columns + self.newline)

    def __call__(
        self, images: Any = None, text: Any = None, return_tensors: str = "pt", **kwargs: Any
    ) -> BatchFeature:
        """images: PIL images, one or a list, all of the first text first; nested lists, one list a
        text, are taken too. text: a string or several, with an image token for each image.
        kwargs: to the tokenizer, such as padding=True.

        Raises ValueError where the image tokens are not as many as the images.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        pictures = _flat(images)
        written = sum(each.count(self.image_token) for each in texts)
        if texts and written != len(pictures):
            raise ValueError(
                f"{written} {self.image_token} in the text for {len(pictures)} images; write one "
                "for each"
            )
        slots = iter([self.num_slots(*picture.size) for picture in pictures])
        found: dict[str, Any] = {}
        if texts:
            expanded = []
            for each in texts:
                first, *rest = each.split(self.image_token)
                expanded.append(
                    first + "".join(self.image_token * next(slots) + part for part in rest)
                )
            found |= self.tokenizer(expanded, return_tensors=return_tensors, **kwargs)
        if pictures:
            pixels = self.image_processor(pictures, return_tensors=return_tensors)
            found["pixel_values"] = pixels["pixel_values"]
            found["image_sizes"] = torch.tensor([(p.height, p.width) for p in pictures])
        return BatchFeature(found)


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [picture for each in images for picture in _flat(each)]
