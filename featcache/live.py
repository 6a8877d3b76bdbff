"""Stored features against a live encoding of the same images.

A store may be whole and still hold something else than its fingerprint says: a bug in an encoder,
another Pillow, a patched checkpoint. Encoding a few images again shows it.

Letters: P patches, D encoder width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featcache.codecs import Codec, LayerCodec, get_codec
from featcache.encode import load_pixels
from featcache.encoders import Encoded
from featcache.errors import CorruptStoreError, ImageError
from featcache.fingerprint import fingerprint, require_same
from featcache.journal import key_of
from featcache.layout import Status
from featcache.object_path import StorePath, require_disk
from featcache.repair import encoder_of, sources_of
from featcache.store import Store, codecs_before
from featcache.tasks import PlannedImage
from featcache.tiles import Tiling, with_tiles

COMPUTE_NOISE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Relative L2 error between two correct passes: other batch, other threads, other kernels."""
MARGIN = 4.0
"""Allowed over what `tolerance` derives."""


@dataclass(frozen=True, slots=True)
class LiveReport:
    """asked: images drawn; compared: of them encoded again. not_compared: a line for each other.
    worst, tolerance: {layer or "pooled": the relative L2 error of the image that came nearest to
    its tolerance, or went furthest beyond it; and that tolerance}. wrong: a line for each output of
    an image that is beyond its own.
    """

    asked: int
    compared: int
    not_compared: tuple[str, ...]
    worst: dict[str, float]
    tolerance: dict[str, float]
    wrong: tuple[str, ...]


def tolerance(live: Tensor, decoded: Tensor, noise: float) -> float:
    """The largest relative L2 error that two correct passes over one image can show once stored.

    live: float[..., D], what the encoder gave. decoded: the same after the codec. noise: relative
    L2 error of the compute before the codec (`COMPUTE_NOISE`).

    Rounding to steps of size s has an error of s / sqrt(12), so s = sqrt(12) * |decoded - live|,
    relative to |live| like all that follows. A value that noise n moves ends on another code with
    probability n / s and is then wrong by s, which makes sqrt(n / s) * s = sqrt(n * s) in L2; to
    that comes the noise in the scales, n. So

        tolerance = MARGIN * (n + sqrt(n * s))

    whatever the codec. Largest error measured over two encoders in fp32 on a CPU (batches of 1
    against 16), and the smallest tolerance there: fp16 6.6e-5 of 3.6e-4, bf16 6.1e-6 of 9.4e-4,
    int8 1.6e-7 of 1.4e-3, fp8 1.6e-7 of 3.1e-3, int4 1.2e-7 of 5.8e-3.
    """
    norm = float(live.norm())
    step = math.sqrt(12) * float((decoded - live).norm()) / norm if norm else 0.0
    return MARGIN * (noise + math.sqrt(noise * step))


class LiveEncoder:
    """The encoder of a store, and the images of its rows.

    noise: relative L2 error between what it gives here and what it gave when the store was made.
    """

    def __init__(
        self,
        store: Store,
        *,
        model: str | None = None,
        images: StorePath | None = None,
        device: str | None = None,
        cure: str = "name the right one with --model",
    ) -> None:
        """model: the encoder by another name or folder than the store's. images: where the images
        lie now, if elsewhere. device: to compute on; that of the store where None. cure: of an
        encoder that is another one.

        Raises FeatcacheError where the encoder cannot be loaded, and FingerprintMismatch where it
        is another one than the store names.
        """
        self._encoder = encoder_of(store.info, model, device)
        stated = store.info.fingerprint
        ours = with_tiles(fingerprint(self._encoder), Tiling.of(stated))
        require_same(
            {**stated, "compute": None},  # another device gives the same but for noise
            {**ours, "compute": None},
            left_name=str(store.path),
            right_name="the encoder as it is here",
            cure=cure,
        )
        self.noise = max(_noise(stated.get("compute", {})), _noise(ours["compute"]))
        self._store = store
        self._plans = store.plans
        self._sources = sources_of(store.info, self._plans, images)
        self._before = [get_codec(name) for name in codecs_before(store.info.source)]

    def name(self, row: int) -> str:
        """Of a row, for messages: "row 3 (a.jpg)"."""
        return f"row {row} ({key_of(self._plans, row)})"

    def encode(self, row: int) -> Encoded:
        """The image of a row, in a batch of its own.

        Raises ImageError where it cannot be read, or is not the image any more.
        """
        digest = self._store.index.digests[row].tobytes()
        loaded = load_pixels(self._encoder, PlannedImage(digest, *self._sources.refs(row)))
        if loaded.pixels is None:
            raise ImageError(loaded.status.reason, loaded.detail)
        return self._encoder.encode(self._encoder.collate([loaded.pixels]))

    def noise_of(self, live: Tensor, *, pooled: bool = False) -> float:
        """`noise`, and what codecs of before a conversion have added to it. live: one image's
        output."""
        return self.noise + sum(_rounding(codec, live, pooled=pooled) for codec in self._before)


def compare_live(
    root: Path,
    count: int,
    *,
    seed: int = 0,
    model: str | None = None,
    images: StorePath | None = None,
    device: str | None = None,
) -> LiveReport:
    """Encode `count` random images of the store again (all where it has fewer) and compare.

    device: to compute on; that of the store where None.
    Raises FeatcacheError where the store cannot be opened or the encoder not loaded, and
    FingerprintMismatch where it is another one than the store names.
    """
    store = Store(root)
    encoder = LiveEncoder(store, model=model, images=images, device=device)
    rows = np.flatnonzero(store.index.status == Status.OK)
    chance = np.random.default_rng(seed)
    rows = np.sort(chance.choice(rows, min(count, len(rows)), replace=False))
    codecs: dict[str, LayerCodec] = {name: store.layer_codec(name) for name in store.layers}
    not_compared: list[str] = []
    wrong: list[str] = []
    worst: dict[str, float] = {}
    allowed: dict[str, float] = {}
    compared = 0
    for row in rows.tolist():
        where = encoder.name(row)
        try:
            encoded = encoder.encode(row)
        except ImageError as error:
            not_compared.append(f"{where}: {error}")
            continue
        try:
            kept = _stored(store, row)
        except CorruptStoreError as error:
            not_compared.append(f"{where}: {error}")
            continue
        compared += 1
        for name, stored in kept.items():
            if name == "pooled":
                assert encoded.pooled is not None
                live = encoded.pooled.float().cpu()
                again = live.to(store.codec.pooled_dtype).float()
            else:
                live = encoded.features[name].float().cpu()
                again = codecs[name].encode(live)[0].decode(torch.float32)
            norm = float(again.norm())
            distance = float((stored - again).norm())
            relative = distance / norm if norm else distance
            bound = tolerance(live, again, encoder.noise_of(live, pooled=name == "pooled"))
            if name not in worst or relative / bound > worst[name] / allowed[name]:
                worst[name], allowed[name] = relative, bound
            if not relative <= bound:
                output = "pooled output" if name == "pooled" else f"layer {name}"
                wrong.append(
                    f"{where}: {output}: relative error {relative:.2g} against a live encoding, "
                    f"at most {bound:.2g} is allowed"
                )
    return LiveReport(
        asked=len(rows),
        compared=compared,
        not_compared=tuple(not_compared),
        worst=worst,
        tolerance=allowed,
        wrong=tuple(wrong),
    )


def _rounding(codec: Codec, live: Tensor, *, pooled: bool) -> float:
    """Relative L2 error that a codec of before a conversion has left. Its channel values are not
    known any more: those of this one image give an error of the same size."""
    norm = float(live.norm())
    if pooled or not codec.scaled:
        decoded = live.to(codec.pooled_dtype if pooled else codec.dtype).float()
    else:
        channels = codec.calibrate(live)
        decoded = codec.decode(*codec.encode(live, channels), channels, torch.float32)
    return float((decoded - live).norm()) / norm if norm else 0.0


def _noise(compute: Mapping[str, Any]) -> float:
    """Of what a fingerprint says of the compute."""
    dtype = str(compute.get("dtype"))
    # fp32 that is multiplied as bf16 or tf32 has their noise.
    exact = compute.get("fp32_matmul") in (None, "ieee")
    return COMPUTE_NOISE.get(dtype, COMPUTE_NOISE["bfloat16"]) if exact else 2e-2


def _stored(store: Store, row: int) -> dict[str, Tensor]:
    """{layer: float32[1, P, D], "pooled": float32[1, D]} of a row. Raises CorruptStoreError."""
    found = {}
    for name in store.layers:
        with store.reader(name, threads=1, depth=1) as reader:
            found[name] = reader.read(np.array([row]), torch.float32)
    if store.info.pooled:
        where = store.form.placement(store.spec, "pooled")
        path = require_disk(where.paths(row // where.rows_per_file), "`verify --live`")
        try:
            raw = np.fromfile(path, np.uint8, where.row_bytes, offset=where.offset(row))
        except OSError as error:
            raise CorruptStoreError(f"{path}: {error.strerror}") from None
        if len(raw) < where.row_bytes:
            raise CorruptStoreError(f"{path} is truncated")
        found["pooled"] = torch.from_numpy(raw).view(store.codec.pooled_dtype).float()[None]
    return found
