"""What one worker of an extraction does: load the encoder, say what it is, encode the shards that
it is handed. Where it runs, in this process, another one or on another machine, is for
featcache/executors/ to say.

RAM of a worker: torch and transformers (0.4 GB), the encoder, and what featcache/encode.py states;
it does not grow with the number of images.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from featcache.codecs import get_codec
from featcache.device import num_cores
from featcache.encode import EncodeProgress, ShardEncoder, TaskSource, calibrate
from featcache.encoders import Encoder, load_encoder
from featcache.fingerprint import fingerprint
from featcache.journal import Commit, Journal, writing
from featcache.layout import Status, StoreInfo
from featcache.object_path import StorePath
from featcache.probe import Speed, probe_speed
from featcache.sources import ImageRef, Sources
from featcache.store import shard_spec


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker works; can be sent to another process.

    out: the store. model, layers, device, random_weights, fit, compile: see `load_encoder`.
    decode_threads: that decode images; None takes as many as the worker has cores. compute_threads:
    of torch on the CPU; None leaves them as they are. load, make: what makes the encoder and the
    worker, in their place for benchmarks.
    """

    out: StorePath
    model: str
    layers: tuple[str, ...] = ("-2",)
    device: str = "cpu"
    random_weights: bool = False
    fit: str = "checkpoint"
    compile: bool = False
    decode_threads: int | None = None
    compute_threads: int | None = None
    load: Callable[..., Encoder] | None = None
    make: Callable[[WorkerOptions], Worker] | None = None

    def worker(self) -> Worker:
        """Raises as `Worker`."""
        return (self.make or Worker)(self)


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """What an extraction must know of its encoder. fingerprint: see `featcache.fingerprint`.
    layers: stored outputs. num_patches, width: P and D. pooled: whether it has a pooled output.
    device: type of the device that it is on."""

    fingerprint: dict[str, Any]
    layers: tuple[str, ...]
    num_patches: int
    width: int
    pooled: bool
    device: str


@dataclass(frozen=True, slots=True)
class WorkProgress:
    """What has been done so far, by one worker or by all of an extraction.

    done: images, those of shards not yet committed included, and those that other ranks did;
    own: without the latter. failed: of the own ones without features.
    seconds: {stage: seconds}, see `featcache.encode.STAGES`; of all workers together.
    backed_off: the latest (images that did not fit, images that then did); None before.
    peak_ram_bytes, peak_gpu_bytes: of the worker that took the most.
    workers: at work; lost: that died and were replaced.
    """

    done: int = 0
    own: int = 0
    failed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    backed_off: tuple[int, int] | None = None
    peak_ram_bytes: int = 0
    peak_gpu_bytes: int = 0
    workers: int = 1
    lost: int = 0


@dataclass(frozen=True, slots=True)
class ShardDone:
    """A committed shard. work: what it took, of this shard alone but for the peaks of memory."""

    shard: int
    work: WorkProgress


class Worker:
    """One encoder and what it needs to encode shards."""

    def __init__(self, options: WorkerOptions) -> None:
        """Loads the encoder. Raises as `load_encoder`."""
        if options.compute_threads is not None:
            torch.set_num_threads(options.compute_threads)
        self.options = options
        self.decode_threads = options.decode_threads or num_cores()
        self.encoder = (options.load or load_encoder)(
            options.model,
            layers=options.layers,
            device=options.device,
            random_weights=options.random_weights,
            fit=options.fit,
            compile=options.compile,
        )

    def describe(self) -> EncoderInfo:
        encoder = self.encoder
        return EncoderInfo(
            fingerprint=fingerprint(encoder),
            layers=encoder.layers,
            num_patches=encoder.num_patches,
            width=encoder.width,
            pooled=encoder.tower.pools,
            device=encoder.device.type,
        )

    def probe(self, images: Sequence[ImageRef], batch_size: int) -> Speed | None:
        """`probe_speed` on these images."""
        return probe_speed(self.encoder, images, batch_size, self.decode_threads)

    def calibrate(self, image_root: str) -> dict[str, np.ndarray[Any, Any]]:
        """{layer: float32[2, D]}: the channel values of the store's codec, measured on the images
        of its plans; empty where none can be read. Raises CorruptStoreError for a damaged plan."""
        info = StoreInfo.load(self.options.out)
        plans = Journal.load_plans(self.options.out, info.generation)
        sources = Sources(plans, image_root)
        measured = calibrate(
            self.encoder, get_codec(info.codec), plans, sources, self.decode_threads
        )
        return {layer: values.numpy() for layer, values in measured.items()}

    def run(
        self, tasks: TaskSource, on_commit: Callable[[ShardDone], None] = lambda _: None
    ) -> Generator[WorkProgress, None, None]:
        """Encode and commit the tasks' shards; yields after each batch, and at the end.

        on_commit: called on another thread.
        Raises as `ShardEncoder.run`.
        """

        def told(commit: Commit) -> None:
            statuses = [row.status for row in commit.rows if row.status != Status.UNUSED]
            failed = sum(status != Status.OK for status in statuses)
            of_shard = EncodeProgress(
                len(statuses), failed, commit.seconds, self.encoder.backed_off
            )
            on_commit(ShardDone(commit.shard, self._progress(of_shard)))

        root = self.options.out
        spec = shard_spec(root, StoreInfo.load(root))
        threads = self.decode_threads
        with (
            writing(root),
            ShardEncoder(root, self.encoder, spec, threads, told) as work,
        ):
            for progress in work.run(tasks):
                yield self._progress(progress)

    def _progress(self, progress: EncodeProgress) -> WorkProgress:
        return WorkProgress(
            progress.done,
            progress.done,
            progress.failed,
            progress.seconds,
            progress.backed_off,
            _peak_ram_bytes(),
            _peak_gpu_bytes(self.encoder),
        )


def _peak_ram_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_gpu_bytes(encoder: Encoder) -> int:
    """As torch allocated them; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(encoder.device) if encoder.device.type == "cuda" else 0
