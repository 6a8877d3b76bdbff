"""What `align plan` measures where it is asked to: the encoder, image decoding, a disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.encoders import load_encoder
from featcache.errors import ConfigError
from featcache.layout import Status
from featcache.manifests import read_manifest
from featcache.probe import Speed, probe_speed
from featcache.sources import ImageRef
from featcache.store import Store

PROBED_IMAGES = 64
BATCH_IMAGES = 32
BUDGET_S = 10.0


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Of random rows of a store. gbps: GB/s. nbytes: that were read. how: past or through the page
    cache, in words: through it, what lies in memory already is no measure of a disk."""

    gbps: float
    nbytes: int
    how: str


def encoder_speed(
    model: str, folder: Path, device: str = "auto", random_weights: bool = False
) -> Speed:
    """How fast `model` encodes the images of a folder on one device, and one core decodes them.

    Raises EncoderError, ManifestError, and ConfigError where no image can be read.
    """
    manifest = read_manifest([folder])
    keys = manifest.image_keys()[:PROBED_IMAGES]
    encoder = load_encoder(model, device=device, random_weights=random_weights)
    images = [ImageRef(str(manifest.image_root), key) for key in keys]
    found = probe_speed(encoder, images, BATCH_IMAGES, workers=1, budget_s=BUDGET_S)
    if found is None:
        raise ConfigError(f"--probe {folder}: none of its first {len(keys)} images can be read")
    return found


def disk_speed(
    path: Path, budget_s: float = BUDGET_S, clock: Callable[[], float] = time.perf_counter
) -> DiskSpeed:
    """How fast the default layer of the store at `path` is read in random batches, past the page
    cache where its file system has O_DIRECT. Each row at most once.

    Raises StoreError, and ConfigError for a store without features.
    """
    store = Store(path)
    rows = np.flatnonzero(store.index.status == Status.OK)
    if not len(rows):
        raise ConfigError(f"--features {path}: holds no features to read; extract into it first")
    np.random.default_rng(0).shuffle(rows)
    batches = (rows[at : at + BATCH_IMAGES] for at in range(0, len(rows), BATCH_IMAGES))
    try:
        reader = store.reader(io="direct", check="never")
    except ConfigError:  # its file system has no O_DIRECT
        reader = store.reader(io="buffered", check="never")
    nbytes = 0
    with reader:
        start = clock()
        for stored in reader.stream(batches):
            nbytes += stored.nbytes
            if clock() - start > budget_s:
                break
        seconds = clock() - start
    return DiskSpeed(nbytes / 1e9 / seconds, nbytes, reader.mode.why)
