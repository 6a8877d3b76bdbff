"""The live path: image files -> encoder -> connector -> words, without a store in between.

Uses the same decoding, resizing, encoder and layer that the run's store was made with, and refuses
an encoder that is another one, so that what it says is what the cached path says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from align.errors import DataError
from align.generate import generate
from align.run import Speaker, Voice
from featcache.codecs import LayerCodec, StoredFeatures
from featcache.encoders import Encoder, fit_of, load_encoder
from featcache.errors import ConfigError, ImageError
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
    encoders: Sequence[str] = (),
    temperature: float | None = None,
) -> list[str]:
    """One caption for each image, in the run's template.

    images: files, also in a bucket, or below a tar or parquet file ("00000.tar/0001.jpg").
    encoders: name, hub id or folder of each of the run's; empty takes the names in the stores'
    fingerprints. temperature: None takes the run's own setting.

    Raises DataError for what is no readable image, EncoderError for an encoder that cannot
    be loaded, and FingerprintMismatch for one that the run's store was not made with.
    """
    towers = [
        _Tower.load(speaker, voice, name)
        for voice, name in zip(speaker.voices, encoder_names(speaker, encoders), strict=True)
    ]
    pixels: list[list[NDArray[np.uint8]]] = [[] for _ in towers]
    sizes = []
    for path in images:
        try:
            image, _ = decode(image_at(path).read())
        except ImageError as error:
            raise DataError(f"{path}: {error}") from error
        sizes.append(image.size)
        for own, tower in zip(pixels, towers, strict=True):
            own.append(tower.encoder.preprocess(image))
    records = [Record(str(path), (path.name,), (), None, str(path)) for path in images]
    config = speaker.config.eval
    if temperature is not None:
        config = replace(config, temperature=temperature)
    said: list[str] = []
    for start in range(0, len(images), config.batch_size):
        part = slice(start, start + config.batch_size)
        features = [
            tower.encode(own[part], images[part]) for own, tower in zip(pixels, towers, strict=True)
        ]
        said += generate(
            speaker.model, speaker.encoder, records[part], features, sizes[part], config
        )
    return said


def encoder_of(speaker: Speaker, voice: Voice, name: str) -> Encoder:
    """The encoder `name`, on the run's device.

    Raises EncoderError where it cannot be loaded, and FingerprintMismatch where the features of
    `voice` were made by another.
    """
    stored = voice.fingerprint
    loaded = load_encoder(
        name,
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
    return loaded


def encoder_names(speaker: Speaker, encoders: Sequence[str]) -> Sequence[str]:
    """Of each of the run's, `encoders` where they are given. Raises ConfigError."""
    if not encoders:
        return [voice.fingerprint["encoder"]["name"] for voice in speaker.voices]
    if len(encoders) != len(speaker.voices):
        raise ConfigError(
            f"--encoder: {len(encoders)} are given, {speaker.path} was trained on the features of "
            f"{len(speaker.voices)}; give each of them, in the order of its stores"
        )
    return encoders


@dataclass(frozen=True, slots=True)
class _Tower:
    """An encoder, and how its features are stored."""

    encoder: Encoder
    layer: str
    codec: LayerCodec

    @classmethod
    def load(cls, speaker: Speaker, voice: Voice, name: str) -> _Tower:
        loaded = encoder_of(speaker, voice, name)
        return cls(loaded, voice.layer, voice.codec.to(speaker.model.device))

    def encode(
        self, pixels: Sequence[NDArray[np.uint8]], names: Sequence[StorePath]
    ) -> StoredFeatures:
        """Rounded as the store rounds it, so that both paths see the same numbers."""
        features = self.encoder.encode(self.encoder.collate(pixels)).features[self.layer]
        as_stored, problems = self.codec.encode(features)
        for path, problem in zip(names, problems, strict=True):
            if problem is not None:
                raise DataError(f"{path}: its features cannot be used: {problem}")
        return as_stored


def _deciding(found: dict[str, object]) -> dict[str, object]:
    return {name: found[name] for name in DECIDING}
