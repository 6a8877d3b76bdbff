"""Encoding shards: decode threads -> batches -> encoder -> codec -> shard buffer -> writer threads.

Five stages that overlap, each with its own threads, so that the encoder never waits for another:

1. *decode*: threads read, check, decode and resize images.
2. a thread joins them to batches, page-locked, and copies those to the device.
3. *encode*: the caller's thread runs the encoder.
4. *quantise*: a thread codes the features on the device (on CUDA in a stream of its own), copies
   them to the CPU and fills the shard's buffer.
5. *write*: two threads publish full buffers: while one waits for the disk, the other fills the
   page cache, which is most of what a local write takes.

The batches of a shard are fixed by its plan (its slots in order, `batch_size` at a time, never
across shards), so an image is always computed in the same batch.

RAM: `SHARDS_IN_MEMORY` shard buffers of every layer, `BATCHES_AHEAD` batches of uint8 pixels, and
one image being decoded a thread (featcache/images.py); 645 MB (fp16), 28 MB, and 96 MB a thread for
siglip2-so400m at 128 images a shard, batches of 16 and JPEG photos of 12 megapixels. On the device:
the encoder, and the pixels and features of three batches.

Letters: B images of a batch, P patches, D encoder width.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice, repeat
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

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
from featcache.encoders import Encoded, Encoder, Pixels
from featcache.errors import ImageError
from featcache.journal import Commit, Plan
from featcache.layout import Status
from featcache.mend import mend
from featcache.object_path import StorePath
from featcache.sources import Sources
from featcache.tasks import PlannedImage, ShardTask
from featcache.tiles import digest_of, open_view, prepare
from featcache.writer import ShardBuffer, ShardSpec

STAGES = ("decode", "wait", "encode", "quantise", "write")
"""What time is told of. "decode" is summed over threads; "wait" is the encoder's, for pixels or for
a free shard buffer; "encode" is the forward alone; "quantise" the codec, the copy to the CPU and
the checksums; "write" the publishing, of both threads. All but "wait" happen at the same time."""
WRITERS = 2
"""Threads that publish shards."""
SHARDS_IN_MEMORY = WRITERS + 1
"""One being filled, the others being written."""
BATCHES_AHEAD = 4
"""Batches decoded, or being decoded, ahead of the encoder."""
_ENCODED_AHEAD = 2
"""Batches encoded and not yet in their shard's buffer."""
_LOOK_EVERY_S = 0.2
NOT_IN_A_BATCH = (
    Status.UNDECODABLE,
    Status.TOO_LARGE,
    Status.CHANGED,
    Status.MISSING,
    Status.UNREADABLE,
)
"""Of rows that gave the encoder no pixels: their batch was that much smaller."""


_Stored: TypeAlias = tuple[dict[str, StoredFeatures], Tensor | None, list[str | None]]


class TaskSource(Protocol):
    """Where shards to be encoded come from."""

    def next(self) -> ShardTask | None:
        """The next task; None where there is none now."""

    def wait(self, seconds: float) -> bool:
        """Until there is a task, or none any more, or so long. False where there will be none any
        more."""


class Tasks:
    """A `TaskSource` of tasks that are at hand."""

    def __init__(self, tasks: Iterable[ShardTask]) -> None:
        self._tasks = iter(tasks)

    def next(self) -> ShardTask | None:
        return next(self._tasks, None)

    def wait(self, seconds: float) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class EncodeProgress:
    """done: images so far, those of shards that are not yet committed included; failed: of them
    without features. seconds: of each of `STAGES`. backed_off: see `Encoder`."""

    done: int
    failed: int
    seconds: dict[str, float]
    backed_off: tuple[int, int] | None


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
    """A fixed batch of a shard: slots [first, first + len(loaded)).

    loaded: what became of each image, its pixels let go. good: places in it of those with pixels.
    pixels: of those, on the device; None where there are none.
    """

    first: int
    loaded: list[_Loaded]
    good: list[int]
    pixels: Pixels | None


@dataclass(frozen=True, slots=True)
class _Coming:
    """A batch that is being decoded, or (batch None) a damaged shard to mend. last: of its
    shard."""

    task: ShardTask
    batch: Future[_Batch] | None
    last: bool


@dataclass(slots=True)
class _Counts:
    """Written by several threads, each its own fields."""

    done: int = 0
    failed: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))


class ShardEncoder:
    """Encodes shards and commits them one by one. Use as a context manager."""

    def __init__(
        self,
        root: StorePath,
        encoder: Encoder,
        spec: ShardSpec,
        decode_threads: int,
        on_commit: Callable[[Commit], None] = lambda _: None,
    ) -> None:
        """on_commit: called with each shard's commit record once it is in place, on a writer's
        thread."""
        # Pillow loads its plugins on first need, which two threads may have at once.
        Image.init()
        self._root = root
        self._encoder = encoder
        self._spec = spec
        self._layers = {name: layer.to(encoder.device) for name, layer in spec.layers.items()}
        self._uncalibrated = any(
            each.codec.scaled and each.channels is None for each in self._layers.values()
        )
        self._pooled = next((c for c in CODECS.values() if c.dtype == spec.pooled_dtype), None)
        self._on_commit = on_commit
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="featcache-decode")
        self._joiner = ThreadPoolExecutor(1, thread_name_prefix="featcache-join")
        self._coder = ThreadPoolExecutor(1, thread_name_prefix="featcache-code")
        self._copies, self._codings = _stream(encoder.device), _stream(encoder.device)
        self._counts = _Counts()
        self._writer = _ShardWriter(root, spec, self._counts, on_commit)
        self._mending: ShardBuffer | None = None

    def run(self, tasks: TaskSource) -> Iterator[EncodeProgress]:
        """Encode and commit each task's shard; yields after each batch, and at the end.

        Raises StoreError where the store cannot be written, EncoderError where memory does not
        suffice for a single image.
        """
        counts = self._counts
        ahead: deque[_Coming] = deque()
        coding: deque[Future[None]] = deque()
        batches = self._batches(tasks)
        buffer: ShardBuffer | None = None
        while True:
            while len(ahead) < BATCHES_AHEAD and (coming := next(batches)):
                ahead.append(coming)
            if not ahead:
                # What goes wrong in the background is told while it waits: nobody may come again.
                while coding and coding[0].done():
                    coding.popleft().result()
                self._writer.check()
                if tasks.wait(_LOOK_EVERY_S):
                    continue
                for future in coding:
                    future.result()
                self._writer.wait()
                yield self._progress()
                return
            coming = ahead.popleft()
            if coming.batch is None:
                counts.done += self._mend(coming.task)
                yield self._progress()
                continue
            waiting = time.perf_counter()
            if buffer is None:
                buffer = self._writer.take(coming.task.shard)
            batch = coming.batch.result()
            while len(coding) >= _ENCODED_AHEAD or (coding and coding[0].done()):
                coding.popleft().result()
            encoding = time.perf_counter()
            encoded = self._encode(batch)
            spent = {
                "decode": sum(image.seconds for image in batch.loaded),
                "wait": encoding - waiting,
                "encode": time.perf_counter() - encoding,
            }
            for stage, seconds in spent.items():
                buffer.seconds[stage] += seconds
                counts.seconds[stage] += seconds
            counts.done += len(batch.loaded)
            coding.append(self._coder.submit(self._code, batch, encoded, buffer, coming.last))
            if coming.last:
                buffer = None
            yield self._progress()

    def again(self, task: ShardTask, buffer: ShardBuffer, slots: Collection[int]) -> None:
        """Encode these slots of a loaded shard once more, each in its batch of the plan, and leave
        the others as they are. Nothing is written.

        A row that had no pixels for its batch is no part of it now either, unless it is one of
        `slots`. What cannot be encoded, or found, any more becomes a failed row.
        """
        fresh = ShardBuffer(buffer.spec)
        fresh.clear(buffer.shard)

        def load(slot: int) -> _Loaded:
            row = buffer.rows[slot]
            if slot not in slots and row.status in NOT_IN_A_BATCH:
                return _Loaded(None, row.size, Status(row.status), row.detail, 0.0)
            return load_pixels(self._encoder, task.images[slot])

        for first in range(0, len(task.images), task.batch_size):
            here = range(first, min(first + task.batch_size, len(task.images)))
            if not any(slot in slots for slot in here):
                continue
            batch = self._join(first, list(self._decoders.map(load, here)))
            self._fill(batch, self._encode(batch), fresh)
        for slot in slots:
            row = fresh.rows[slot]
            if row.status == Status.OK:
                buffer.set(slot, *fresh.get(slot), row.size, row.grid)
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
        for pool in (self._joiner, self._decoders, self._coder):
            pool.shutdown(wait=True, cancel_futures=True)
        self._writer.close()
        if error is None:
            self._writer.check()

    def _progress(self) -> EncodeProgress:
        counts = self._counts
        return EncodeProgress(
            counts.done, counts.failed, dict(counts.seconds), self._encoder.backed_off
        )

    def _batches(self, tasks: TaskSource) -> Iterator[_Coming | None]:
        """The batches of all tasks, decoding begun; None where there is nothing now."""
        while True:
            task = tasks.next()
            if task is None:
                yield None
                continue
            if task.was is not None:
                yield _Coming(task, None, last=True)
                continue
            for first in range(0, len(task.images), task.batch_size):
                part = task.images[first : first + task.batch_size]
                images = [
                    self._decoders.submit(load_pixels, self._encoder, image) for image in part
                ]
                batch = self._joiner.submit(self._joined, first, images)
                yield _Coming(task, batch, last=first + len(part) == len(task.images))

    def _joined(self, first: int, images: Sequence[Future[_Loaded]]) -> _Batch:
        return self._join(first, [image.result() for image in images])

    def _join(self, first: int, loaded: Sequence[_Loaded]) -> _Batch:
        """The good ones of these images as one batch, on the encoder's device."""
        good = [i for i, image in enumerate(loaded) if image.pixels is not None]
        if self._uncalibrated:
            # No image could be read when the codec was calibrated; now this one can.
            detail = "could not be read a moment ago; extract again"
            loaded = [
                image
                if image.pixels is None
                else replace(image, pixels=None, status=Status.CHANGED, detail=detail)
                for image in loaded
            ]
            good = []
        told = [replace(image, pixels=None) for image in loaded]
        if not good:
            return _Batch(first, told, good, None)
        arrays = [image.pixels for image in loaded if image.pixels is not None]
        pixels = self._encoder.collate(arrays)
        if self._copies is not None:
            with torch.cuda.stream(self._copies):
                pixels = pixels.pin_memory().to(self._encoder.device)
                self._copies.synchronize()
        return _Batch(first, told, good, pixels)

    def _encode(self, batch: _Batch) -> Encoded | None:
        """The features of a batch's good images, computed when this returns."""
        if batch.pixels is None:
            return None
        encoded = self._encoder.encode(batch.pixels)
        if self._encoder.device.type == "cuda":
            # The next batch is already on the device: the gap is one launch, and what other threads
            # do with these features needs no order among streams.
            torch.cuda.current_stream(self._encoder.device).synchronize()
        return encoded

    def _code(
        self, batch: _Batch, encoded: Encoded | None, buffer: ShardBuffer, last: bool
    ) -> None:
        """Code a batch into its shard's buffer, and hand that on when it is full."""
        start = time.perf_counter()
        self._counts.failed += self._fill(batch, encoded, buffer)
        seconds = time.perf_counter() - start
        buffer.seconds["quantise"] += seconds
        self._counts.seconds["quantise"] += seconds
        if last:
            self._writer.put(buffer)

    @torch.inference_mode()
    def _fill(self, batch: _Batch, encoded: Encoded | None, buffer: ShardBuffer) -> int:
        """Code a batch into the buffer; returns how many of its images have no features."""
        for i, image in enumerate(batch.loaded):
            if image.status != Status.OK:
                buffer.fail(batch.first + i, image.status, image.detail, image.size)
        if encoded is None:
            return len(batch.loaded)
        failed = len(batch.loaded) - len(batch.good)
        place = iter(range(len(batch.good)))
        for stored, pooled, reasons in self._coded(encoded):
            for j, reason in enumerate(reasons):
                at = next(place)
                slot, size = batch.first + batch.good[at], batch.loaded[batch.good[at]].size
                if reason is not None:
                    name, detail = reason.split(": ", 1)
                    buffer.fail(slot, Status[name.upper()], detail, size)
                    failed += 1
                    continue
                features = {name: values[j : j + 1] for name, values in stored.items()}
                vector = None if pooled is None else pooled[j]
                buffer.set(slot, features, vector, size, encoded.grid(at))
        return failed

    def _coded(self, encoded: Encoded) -> Iterator[_Stored]:
        """A batch as it is stored, in one part, or in halves where the device's memory is full: the
        next batch is being encoded meanwhile. Values do not depend on the parts."""
        try:
            with nullcontext() if self._codings is None else torch.cuda.stream(self._codings):
                whole = self._stored(encoded)
        except torch.OutOfMemoryError:
            count = len(encoded)
            if count == 1:
                raise
            torch.cuda.empty_cache()
        else:
            yield whole
            return
        yield from self._coded(encoded[: count // 2])
        yield from self._coded(encoded[count // 2 :])

    def _stored(self, encoded: Encoded) -> _Stored:
        """Each layer and the pooled outputs as they are stored, on the CPU; for each image, None
        or why it cannot be stored."""
        reasons: list[str | None] = [None] * len(encoded)

        def note(wrong: list[str | None], output: str) -> None:
            for i, reason in enumerate(wrong):
                reasons[i] = reasons[i] or (reason and f"{reason} ({output})")

        stored: dict[str, StoredFeatures] = {}
        for name, values in encoded.features.items():
            kept, wrong = self._layers[name].encode(values)
            note(wrong, f"layer {name}")
            stored[name] = kept.to("cpu", non_blocking=False)
        pooled = None
        if self._pooled is not None:
            assert encoded.pooled is not None
            pooled, _ = self._pooled.encode(encoded.pooled, None)
            finite = self._pooled.is_finite(pooled, None)
            note(storing_problems(encoded.pooled, finite, self._pooled), "pooled")
            pooled = pooled.cpu()
        return stored, pooled, reasons

    def _mend(self, task: ShardTask) -> int:
        """Write a damaged shard again, without losing its good rows; returns its images."""
        if self._mending is None:
            self._mending = ShardBuffer(self._spec)
        commit, _ = mend(self._root, self._mending, task, lambda: self, retry=True)
        self._counts.failed += sum(
            row.status not in (Status.OK, Status.UNUSED) for row in commit.rows
        )
        self._on_commit(commit)
        return len(task.images)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """For work beside the encoder's, on CUDA."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def load_pixels(encoder: Encoder, image: PlannedImage) -> _Loaded:
    """Read, check, decode and resize one image; runs on a decode thread."""
    start = time.perf_counter()
    size = (0, 0)
    pixels, status, detail = None, Status.OK, ""
    try:
        data, key = _find(image)
        view, size = open_view(data, key, encoder.preprocessing.size)
        pixels = prepare(encoder, view, key)
    except ImageError as error:
        status, detail = Status[error.reason.upper()], error.detail
    except MemoryError:
        status, detail = Status.TOO_LARGE, "not enough memory to resize it"
    return _Loaded(pixels, size, status, detail, time.perf_counter() - start)


def _find(image: PlannedImage) -> tuple[bytes, str]:
    """The planned image's bytes, from the first place that holds them, and its key there.

    Raises ImageError where none does: "changed" if there is a file with other bytes, else as
    `ImageRef.read` of the first.
    """
    errors: list[ImageError] = []
    for ref in image.refs:
        try:
            data = ref.read()
        except ImageError as error:
            errors.append(error)
            continue
        if digest_of(data, ref.key) == image.digest:
            return data, ref.key
        changed = f"{ref} changed after the scan; extract again"
        errors.insert(0, ImageError("changed", changed))
    raise errors[0]


class _ShardWriter:
    """Publishes full buffers in the background and hands them back empty."""

    def __init__(
        self, root: StorePath, spec: ShardSpec, counts: _Counts, on_commit: Callable[[Commit], None]
    ) -> None:
        self._root, self._spec = root, spec
        self._counts, self._on_commit = counts, on_commit
        self._made = 0
        self._free: queue.SimpleQueue[ShardBuffer] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="featcache-write")
        self._under_way: set[Future[None]] = set()
        self._telling = threading.Lock()
        self._error: BaseException | None = None

    def take(self, shard: int) -> ShardBuffer:
        """A cleared buffer; waits for one. Raises the error of an earlier write."""
        if self._free.empty() and self._made < SHARDS_IN_MEMORY:
            self._made += 1
            buffer = ShardBuffer(self._spec)
        else:
            buffer = self._free.get()
        self.check()
        buffer.clear(shard)
        buffer.seconds = dict.fromkeys(STAGES, 0.0)
        return buffer

    def put(self, buffer: ShardBuffer) -> None:
        self._under_way = {each for each in self._under_way if not each.done()}
        self._under_way.add(self._pool.submit(self._write, buffer))

    def wait(self) -> None:
        """Until all that was put is published. Raises the error of an earlier write."""
        wait(self._under_way)
        self.check()

    def check(self) -> None:
        """Raise what went wrong while writing, if anything did."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Finish what was put, then stop the threads."""
        self._pool.shutdown(wait=True)

    def _write(self, full: ShardBuffer) -> None:
        if self._error is None:
            try:
                commit = full.publish(self._root)
                with self._telling:
                    self._counts.seconds["write"] += commit.seconds["write"]
                    self._on_commit(commit)
            except BaseException as error:
                self._error = error
        self._free.put(full)


def calibration_order(count: int) -> list[int]:
    """All of a plan's `count` images, in the order in which codecs are calibrated on them: first
    `CALIBRATION_IMAGES` spread evenly, then the others in the place of those without features."""
    if not count:
        return []
    spread = np.linspace(0, count - 1, min(count, CALIBRATION_IMAGES)).round().astype(int).tolist()
    return [*dict.fromkeys(spread), *sorted({*range(count)} - {*spread})]


def calibrate(
    encoder: Encoder, codec: Codec, plans: Sequence[Plan], sources: Sources, decode_threads: int
) -> dict[str, Tensor]:
    """{layer: float32[2, D] on the CPU}: a scaled codec's static channel values.

    Measured on `CALIBRATION_IMAGES` images spread evenly over those of the first plan that has any
    which can be read (those after them where some fail). Empty where no plan has, or for a codec
    without channel values.
    """
    Image.init()
    for plan in plans:
        taken: dict[str, list[Tensor]] = {layer: [] for layer in encoder.layers}
        source = islice(_pixels(encoder, plan, sources, decode_threads), CALIBRATION_IMAGES)
        while batch := list(islice(source, plan.batch_size)):
            encoded = encoder.encode(encoder.collate(batch))
            for layer in encoder.layers:
                taken[layer] += encoded.images(layer)
        if all(taken.values()):
            measured = {layer: codec.calibrate(images) for layer, images in taken.items()}
            return {layer: values for layer, values in measured.items() if values is not None}
    return {}


def _pixels(
    encoder: Encoder, plan: Plan, sources: Sources, decode_threads: int
) -> Iterator[np.ndarray[Any, Any]]:
    """Of a plan's images that can be read, in `calibration_order`."""
    count = len(plan.new_digests)
    order = calibration_order(count)
    with ThreadPoolExecutor(decode_threads, thread_name_prefix="featcache-decode") as pool:
        for start in range(0, count, CALIBRATION_IMAGES):
            part = order[start : start + CALIBRATION_IMAGES]
            planned = [
                PlannedImage(plan.new_digests[i], *sources.refs(plan.first_row + i)) for i in part
            ]
            images = pool.map(load_pixels, repeat(encoder), planned)
            yield from (image.pixels for image in images if image.pixels is not None)
