"""The live path: image files -> encoder -> connector -> words, without a store in between.

Uses the same decoding, resizing, encoder and layer that the run's store was made with, and refuses
an encoder that is another one, so that what it says is what the cached path says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from align.errors import DataError
from align.generate import generate
from align.run import Speaker
from featcache.encoders import fit_of, load_encoder
from featcache.errors import ImageError
from featcache.fingerprint import fingerprint, require_same
from featcache.images import decode
from featcache.manifests import Record
from featcache.object_path import StorePath
from featcache.sources import image_at

DECIDING = ("encoder", "features", "preprocessing")
"""Parts of a store's fingerprint that another machine or library version does not change."""


def caption_images(
    speaker: Speaker,
    images: Sequence[StorePath],
    *,
    encoder: str | None = None,
    temperature: float | None = None,
) -> list[str]:
    """One caption for each image, in the run's template.

    images: files, also in a bucket, or below a tar or parquet file ("00000.tar/0001.jpg").
    encoder: name, hub id or folder; None takes the name in the store's fingerprint.
    temperature: None takes the run's own setting.

    Raises DataError for what is no readable image, EncoderError for an encoder that cannot
    be loaded, and FingerprintMismatch for one that the run's store was not made with.
    """
    stored = speaker.store
    loaded = load_encoder(
        encoder or stored["encoder"]["name"],
        layers=stored["features"]["layers"],
        device=speaker.model.device,
        random_weights=stored["encoder"]["random_weights"],
        fit=fit_of(stored),
    )
    require_same(
        _deciding(stored),
        _deciding(fingerprint(loaded)),
        left_name=f"the store of {speaker.path}",
        right_name=f"encoder {loaded.name}",
        cure="give the encoder that the store was made with: --encoder NAME|HUB_ID|FOLDER",
    )
    pixels = []
    for path in images:
        try:
            pixels.append(loaded.preprocess(decode(image_at(path).read())[0]))
        except ImageError as error:
            raise DataError(f"{path}: {error}") from error
    records = [Record(str(path), (path.name,), (), None, str(path)) for path in images]
    config = speaker.config.eval
    if temperature is not None:
        config = replace(config, temperature=temperature)
    codec = speaker.codec.to(speaker.model.device)
    said: list[str] = []
    for start in range(0, len(images), config.batch_size):
        part = slice(start, start + config.batch_size)
        features = loaded.encode(loaded.collate(pixels[part])).features[speaker.layer]
        # Rounded as the store rounds it, so that both paths see the same numbers.
        as_stored, problems = codec.encode(features)
        for path, problem in zip(images[part], problems, strict=True):
            if problem is not None:
                raise DataError(f"{path}: its features cannot be used: {problem}")
        said += generate(speaker.model, speaker.encoder, records[part], as_stored, config)
    return said


def _deciding(found: dict[str, object]) -> dict[str, object]:
    return {name: found[name] for name in DECIDING}
