"""What every loop of `align bench step` trains on: photos, captions, and a store of the former."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from align.bench.extract import write_photos
from featcache.extract import ExtractOptions, extract

CAPTION_WORDS = (18, 20)
"""With its end a caption has the 20 learned tokens that `align plan` assumes, give or take one."""
WORDS = "a the large small red green blue yellow circle square triangle above below and with"
"""Each a token of the shipped tokenizer."""


@dataclass(frozen=True, slots=True)
class StepData:
    """store: features of the images of `captions`, which lie in `images`."""

    images: Path
    captions: Path
    store: Path


def write_data(
    folder: Path, model: str, images: int, batch_size: int, device: str, seed: int = 0
) -> StepData:
    """Photos with captions of random words, and the store of their features.

    model: the encoder; its weights are random. batch_size: of the extraction.
    Raises StoreError or EncoderError where the extraction fails.
    """
    data = StepData(folder / "images", folder / "captions.jsonl", folder / "store.zarr")
    write_photos(data.images, images, seed)
    chance = np.random.default_rng(seed)
    lines = []
    for photo in sorted(data.images.iterdir()):
        words = chance.choice(WORDS.split(), chance.integers(*CAPTION_WORDS, endpoint=True))
        caption = " ".join(words.tolist())
        lines.append({"id": photo.stem, "images": [photo.name], "caption": caption})
    data.captions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    extract(
        ExtractOptions(
            model=model,
            data=(data.captions,),
            image_root=data.images,
            out=data.store,
            batch_size=batch_size,
            device=device,
            random_weights=True,
        )
    )
    return data
