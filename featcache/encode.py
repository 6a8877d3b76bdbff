"""Encoding pending shards: decode threads -> encoder -> codec -> shard buffer -> writer thread.

The batches of a shard are fixed by its plan (its slots in order, `batch_size` at a time, never
across shards), so an image is always computed in the same batch.

RAM: `SHARDS_IN_MEMORY` shard buffers of every layer, `BATCHES_AHEAD` batches of uint8 pixels, and
one image being decoded a worker (featcache/images.py); 645 MB (fp16), 28 MB, and 96 MB a worker for
siglip2-so400m at 128 images a shard, batches of 16 and JPEG photos of 12 megapixels.

Letters: B images of a batch, P patches, D encoder width.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, repeat
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from featcache.codecs import (
    CALIBRATION_IMAGES,
    CODECS,
    Codec,
    StoredFeatures,
    storing_problems,
)
from featcache.encoders import Encoder
from featcache.errors import ImageError
from featcache.images import decode, digest
from featcache.journal import Plan
from featcache.layout import Status
from featcache.object_path import StorePath
from featcache.sources import ImageRef, Sources
from featcache.writer import ShardBuffer, ShardSpec

SHARDS_IN_MEMORY = 3
"""One being filled, one waiting, one being written."""
BATCHES_AHEAD = 4
"""Batches decoded, or being decoded, ahead of the encoder."""
NOT_IN_A_BATCH = (
    Status.UNDECODABLE,
    Status.TOO_LARGE,
    Status.CHANGED,
    Status.MISSING,
    Status.UNREADABLE,
)
"""Of rows that gave the encoder no pixels: their batch was that much smaller."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One decoded image. pixels: uint8[height, width, 3], or None with status and detail."""

    pixels: np.ndarray[Any, Any] | None
    size: tuple[int, int]
    status: Status
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class _Batch:
    """A fixed batch: slots [first, first + len(images)) of a shard; last closes the shard."""

    shard: int
    first: int
    images: list[Future[_Loaded]]
    last: bool


class ShardEncoder:
    """Encodes shards and commits them one by one. Use as a context manager.

    seconds: time per stage so far: "decode" (summed over threads), "wait" (the encoder's, for
    pixels or for a free shard buffer), "encode" (transfer, forward, codec), "write" (background).
    """

    def __init__(
        self, root: StorePath, encoder: Encoder, spec: ShardSpec, sources: Sources, workers: int
    ) -> None:
        """sources: where the image of a row may be."""
        # Pillow loads its plugins on first need, which two threads may have at once.
        Image.init()
        self._encoder = encoder
        self._layers = {name: layer.to(encoder.device) for name, layer in spec.layers.items()}
        self._pooled = next((c for c in CODECS.values() if c.dtype == spec.pooled_dtype), None)
        self._sources = sources
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="featcache-decode")
        self._writer = _ShardWriter(root, [ShardBuffer(spec) for _ in range(SHARDS_IN_MEMORY)])
        self.seconds = dict.fromkeys(("decode", "wait", "encode", "write"), 0.0)

    def run(self, pending: Sequence[tuple[Plan, int]]) -> Iterator[tuple[int, int]]:
        """Encode and commit each (plan, shard); yields (rows done, of them failed) per batch.

        Raises StoreError where the store cannot be written.
        """
        done = failed = 0
        ahead: deque[_Batch] = deque()
        batches = self._batches(pending)
        buffer: ShardBuffer | None = None
        while True:
            while len(ahead) < BATCHES_AHEAD and (batch := next(batches, None)):
                ahead.append(batch)
            if not ahead:
                break
            batch = ahead.popleft()
            waiting = time.perf_counter()
            if buffer is None:
                buffer = self._writer.take(batch.shard)
                buffer.seconds = dict.fromkeys(self.seconds, 0.0)
            loaded = [future.result() for future in batch.images]
            encoding = time.perf_counter()
            failed += self._encode(batch.first, loaded, buffer)
            spent = {
                "decode": sum(image.seconds for image in loaded),
                "wait": encoding - waiting,
                "encode": time.perf_counter() - encoding,
            }
            for stage, seconds in spent.items():
                buffer.seconds[stage] += seconds
                self.seconds[stage] += seconds
            done += len(loaded)
            if batch.last:
                self._writer.put(buffer)
                buffer = None
            self.seconds["write"] = self._writer.seconds
            yield done, failed

    def again(self, plan: Plan, buffer: ShardBuffer, slots: Collection[int]) -> None:
        """Encode these slots of a loaded shard once more, each in its batch of the plan, and leave
        the others as they are. Nothing is written.

        A row that had no pixels for its batch is no part of it now either, unless it is one of
        `slots`. What cannot be encoded, or found, any more becomes a failed row.
        """
        fresh = ShardBuffer(buffer.spec)
        fresh.clear(buffer.shard)
        first_row = buffer.shard * plan.shard_images
        digests = plan.digests_of(buffer.shard)

        def load(slot: int) -> _Loaded:
            row = buffer.rows[slot]
            if slot not in slots and row.status in NOT_IN_A_BATCH:
                return _Loaded(None, row.size, Status(row.status), row.detail, 0.0)
            return load_pixels(self._encoder, self._sources, first_row + slot, digests[slot])

        for first in range(0, len(digests), plan.batch_size):
            batch = range(first, min(first + plan.batch_size, len(digests)))
            if not any(slot in slots for slot in batch):
                continue
            self._encode(first, list(self._pool.map(load, batch)), fresh)
        for slot in slots:
            row = fresh.rows[slot]
            if row.status == Status.OK:
                buffer.set(slot, *fresh.get(slot), row.size)
            else:
                buffer.fail(slot, Status(row.status), row.detail, row.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._writer.close()
        if error is None:
            self._writer.check()

    def _batches(self, pending: Sequence[tuple[Plan, int]]) -> Iterator[_Batch]:
        for plan, shard in pending:
            digests = plan.digests_of(shard)
            first_row = shard * plan.shard_images
            for first in range(0, len(digests), plan.batch_size):
                part = digests[first : first + plan.batch_size]
                yield _Batch(
                    shard,
                    first,
                    [
                        self._pool.submit(
                            load_pixels,
                            self._encoder,
                            self._sources,
                            first_row + first + i,
                            expected,
                        )
                        for i, expected in enumerate(part)
                    ],
                    last=first + len(part) == len(digests),
                )

    def _encode(self, first: int, loaded: Sequence[_Loaded], buffer: ShardBuffer) -> int:
        """Encode one batch into the buffer; returns how many of its images have no features."""
        good: list[int] = []
        uncalibrated = any(
            each.codec.scaled and each.channels is None for each in self._layers.values()
        )
        for i, image in enumerate(loaded):
            if image.pixels is None:
                buffer.fail(first + i, image.status, image.detail, image.size)
            elif uncalibrated:
                # No image could be read when the codec was calibrated; now this one can.
                detail = "could not be read a moment ago; extract again"
                buffer.fail(first + i, Status.CHANGED, detail, image.size)
            else:
                good.append(i)
        if not good:
            return len(loaded)
        pixels = [image.pixels for image in loaded if image.pixels is not None]
        encoded = self._encoder.encode(self._encoder.collate(pixels))
        stored: dict[str, StoredFeatures] = {}
        reasons: list[str | None] = [None] * len(good)

        def note(wrong: list[str | None], output: str) -> None:
            for i, reason in enumerate(wrong):
                reasons[i] = reasons[i] or (reason and f"{reason} ({output})")

        for name, values in encoded.features.items():
            kept, wrong = self._layers[name].encode(values)
            note(wrong, f"layer {name}")
            stored[name] = kept.to("cpu")
        pooled = None
        if self._pooled is not None:
            assert encoded.pooled is not None
            pooled, _ = self._pooled.encode(encoded.pooled, None)
            finite = self._pooled.is_finite(pooled, None)
            note(storing_problems(encoded.pooled, finite, self._pooled), "pooled")
            pooled = pooled.cpu()
        failed = len(loaded) - len(good)
        for j, i in enumerate(good):
            reason = reasons[j]
            if reason is not None:
                name, detail = reason.split(": ", 1)
                buffer.fail(first + i, Status[name.upper()], detail, loaded[i].size)
                failed += 1
                continue
            features = {name: values[j : j + 1] for name, values in stored.items()}
            buffer.set(first + i, features, None if pooled is None else pooled[j], loaded[i].size)
        return failed


def load_pixels(encoder: Encoder, sources: Sources, row: int, expected: bytes) -> _Loaded:
    """Read, check, decode and resize one image; runs on a decode thread."""
    start = time.perf_counter()
    size = (0, 0)
    pixels, status, detail = None, Status.OK, ""
    try:
        data = _find(sources.refs(row), expected)
        image, size = decode(data)
        pixels = encoder.preprocess(image)
    except ImageError as error:
        status, detail = Status[error.reason.upper()], error.detail
    except MemoryError:
        status, detail = Status.TOO_LARGE, "not enough memory to resize it"
    return _Loaded(pixels, size, status, detail, time.perf_counter() - start)


def _find(refs: Sequence[ImageRef], expected: bytes) -> bytes:
    """The planned image's bytes, from the first place that holds them.

    Raises ImageError where none does: "changed" if there is a file with other bytes, else as
    `ImageRef.read` of the first.
    """
    errors: list[ImageError] = []
    for ref in refs:
        try:
            data = ref.read()
        except ImageError as error:
            errors.append(error)
            continue
        if digest(data) == expected:
            return data
        changed = f"{ref} changed after the scan; extract again"
        errors.insert(0, ImageError("changed", changed))
    raise errors[0]


class _ShardWriter:
    """Publishes full buffers on one background thread and hands them back empty."""

    def __init__(self, root: StorePath, buffers: list[ShardBuffer]) -> None:
        self._root = root
        self._free: queue.SimpleQueue[ShardBuffer] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[ShardBuffer | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self.seconds = 0.0
        for buffer in buffers:
            self._free.put(buffer)
        self._thread = threading.Thread(target=self._write, name="featcache-write", daemon=True)
        self._thread.start()

    def take(self, shard: int) -> ShardBuffer:
        """A cleared buffer; waits for one. Raises the error of an earlier write."""
        buffer = self._free.get()
        self.check()
        buffer.clear(shard)
        return buffer

    def put(self, buffer: ShardBuffer) -> None:
        self._full.put(buffer)

    def check(self) -> None:
        """Raise what went wrong while writing, if anything did."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Finish what was put, then stop the thread."""
        self._full.put(None)
        self._thread.join()

    def _write(self) -> None:
        while (buffer := self._full.get()) is not None:
            if self._error is None:
                try:
                    commit = buffer.publish(self._root)
                    self.seconds += commit.seconds["write"]
                except BaseException as error:
                    self._error = error
            self._free.put(buffer)


def calibration_order(count: int) -> list[int]:
    """All of a plan's `count` images, in the order in which codecs are calibrated on them: first
    `CALIBRATION_IMAGES` spread evenly, then the others in the place of those without features."""
    if not count:
        return []
    spread = np.linspace(0, count - 1, min(count, CALIBRATION_IMAGES)).round().astype(int).tolist()
    return [*dict.fromkeys(spread), *sorted({*range(count)} - {*spread})]


def calibrate(
    encoder: Encoder, codec: Codec, plans: Sequence[Plan], sources: Sources, workers: int
) -> dict[str, Tensor]:
    """{layer: float32[2, D] on the CPU}: a scaled codec's static channel values.

    Measured on `CALIBRATION_IMAGES` images spread evenly over those of the first plan that has any
    which can be read (those after them where some fail). Empty where no plan has, or for a codec
    without channel values.
    """
    Image.init()
    for plan in plans:
        taken: dict[str, list[Tensor]] = {layer: [] for layer in encoder.layers}
        source = islice(_pixels(encoder, plan, sources, workers), CALIBRATION_IMAGES)
        while batch := list(islice(source, plan.batch_size)):
            features = encoder.encode(encoder.collate(batch)).features
            for layer, values in features.items():
                taken[layer].append(values.float().cpu())
        if all(taken.values()):
            measured = {
                layer: codec.calibrate(torch.cat(values)) for layer, values in taken.items()
            }
            return {layer: values for layer, values in measured.items() if values is not None}
    return {}


def _pixels(
    encoder: Encoder, plan: Plan, sources: Sources, workers: int
) -> Iterator[np.ndarray[Any, Any]]:
    """Of a plan's images that can be read, in `calibration_order`."""
    count = len(plan.new_digests)
    order = calibration_order(count)
    with ThreadPoolExecutor(workers, thread_name_prefix="featcache-decode") as pool:
        for start in range(0, count, CALIBRATION_IMAGES):
            part = order[start : start + CALIBRATION_IMAGES]
            rows = [plan.first_row + i for i in part]
            expected = [plan.new_digests[i] for i in part]
            images = pool.map(load_pixels, repeat(encoder), repeat(sources), rows, expected)
            yield from (image.pixels for image in images if image.pixels is not None)
