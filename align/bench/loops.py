"""The same training several times, each as a loop that a process of its own runs and times.

* *cached*: ours, on stored features, with the parts that `align.trainer.train` is made of.
* *live*: the same step; its features come from image files through a well fed encoder.
* *plain*: what is written without this project: a DataLoader with workers, Hugging Face's image
  processor and models as they are, full logits, `loss.item()` at every step; *llava* is that with
  transformers' own `LlavaForConditionalGeneration` (both in plain_loops.py).

All start from the same connector (a seed), the same encoder and language model, see the same
samples in the same order, and tokenise them alike.

    B samples, P patches, D encoder width, S visual slots, H LLM width, T sequence length
"""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from align.bench import yardsticks
from align.bench.process import answer_commands, load, quieten
from align.config import load_config
from align.data.collate import Batch, collate
from align.data.sampling import StepSampler
from align.data.tokens import TokenizedSample
from align.optim import build_optimizer, lr_at
from align.run import assemble
from align.trainer import update
from featcache.device import num_cores
from featcache.encoders import Encoder, Pixels, load_encoder
from featcache.images import decode, read_bytes

LOOPS = {
    "cached": "align.bench.loops:Cached",
    "live": "align.bench.loops:Live",
    "plain": "align.bench.plain_loops:Plain",
    "llava": "align.bench.plain_loops:Llava",
}
BATCHES_AHEAD = 4
"""Batches of images decoded, or being decoded, ahead of the live step."""
SCHEDULE_STEPS = 100_000
"""Of the learning rate: far more than are measured, so that none is special."""
MAX_WORKERS = 8
"""Of a DataLoader; what is commonly given to a GPU."""

Fed = TypeVar("Fed")
"""What a step is handed."""


@dataclass(frozen=True, slots=True)
class LoopSpec:
    """What a loop is made of; the same for all that are compared.

    model: the encoder's name; its weights are random. images: folder of the photos.
    overrides: KEY=VALUE of the run's config. plain_overrides: those of loops that are not ours.
    compile: `torch.compile` the live encoder's blocks. workers: of a DataLoader.
    """

    folder: Path
    store: Path
    images: Path
    model: str
    overrides: tuple[str, ...]
    plain_overrides: tuple[str, ...]
    compile: bool = False
    workers: int = 0


@dataclass(frozen=True, slots=True)
class FirstStep:
    """By which it is told whether loops compute the same.

    loss: nats per supervised token. grad_norm: of that loss, over all of the connector, before
    clipping. ids: of the samples, in order. supervised: tokens.
    """

    loss: float
    grad_norm: float
    ids: tuple[str, ...]
    supervised: int


@dataclass(frozen=True, slots=True)
class Pass:
    """steps: that were timed. seconds: of all of them. waited_s: of these, for the next batch.
    joules: that the device took; None where it does not tell."""

    steps: int
    samples: int
    seconds: float
    waited_s: float
    joules: float | None


class Loop(ABC, Generic[Fed]):
    """A server of commands around a training that goes on from command to command."""

    name: str
    is_ours = False
    optimizer: torch.optim.Optimizer

    def __init__(self, spec: LoopSpec) -> None:
        self.spec = spec
        config = load_config(None, spec.overrides if self.is_ours else spec.plain_overrides)
        self.config = config
        self.parts = assemble(config, [spec.store], spec.folder / self.name)
        self.model = self.parts.model
        self.device = self.model.device
        self.samples = self.parts.splits.split("train")
        self.sampler = self.parts.sampler()
        self.done = 0
        self.joules = yardsticks.joules_meter(self.device)

    # ----------------------------------------------------------------------- what a loop is made of

    @abstractmethod
    def feed(self, index_batches: Sequence[NDArray[np.int64]]) -> Generator[Fed, None, None]:
        """What each step is handed, made ready ahead of it. index_batches: int64[B] each."""

    @abstractmethod
    def step(self, fed: Fed) -> tuple[float | Tensor, float | Tensor]:
        """One step; (loss per supervised token, gradient norm), which nobody may look at."""

    @abstractmethod
    def contents(self, fed: Fed) -> tuple[tuple[str, ...], int]:
        """(ids of its samples, its supervised tokens)."""

    # --------------------------------------------------------------------------------- commands

    def lengths(self) -> list[tuple[int, int]]:
        """(tokens, supervised ones) of each sample."""
        slots = self._slots()
        encoder = self.parts.encoder
        found = [
            encoder.encode(sample.record, own)
            for sample, own in zip(self.samples, slots, strict=True)
        ]
        return [(len(each.input_ids), each.num_supervised) for each in found]

    def ahead(self) -> int:
        """Batches that are made ready before they are asked for."""
        return self.config.train.read_ahead

    def batch_size(self, size: int) -> None:
        """Of all steps from now on; they begin with the first samples again, and with no more
        memory than a size that did not fit has left."""
        self.optimizer.zero_grad(set_to_none=True)
        self._give_back()
        seed = self.config.train.seed
        self.sampler = StepSampler(len(self.samples), size, seed)
        self.done = 0

    def first(self) -> FirstStep:
        """The very first step, which also builds all that is built once."""
        with closing(self.feed(self._indices(1))) as feed:
            fed = next(feed)
            ids, supervised = self.contents(fed)
            loss, norm = self.step(fed)
        return FirstStep(float(loss), float(norm), ids, supervised)

    def run(self, warm: int, steps: int) -> Pass:
        """`warm` steps, then `steps` that are timed, each with the wait for the batch after it.

        So a pass is like the middle of a training, also where it is a single step: what a step is
        handed was made ready before the clock starts, and what comes next while it runs.
        """
        return self._timed(self.step, warm, steps)

    def forget_peak(self) -> None:
        """Of memory."""
        yardsticks.forget_peak(self.device)

    def peak_bytes(self) -> int:
        """Of memory, since `forget_peak`."""
        return yardsticks.peak_bytes(self.device)

    def close(self) -> None:
        self.parts.close()

    # ---------------------------------------------------------------------------- what they share

    def _timed(self, step: Any, warm: int, steps: int) -> Pass:
        with closing(self.feed(self._indices(warm + steps + 1))) as feed:
            for _ in range(warm):
                step(next(feed))
            fed = next(feed)
            yardsticks.fence(self.device)
            before = self.joules() if self.joules else 0.0
            waited_s = 0.0
            start = time.perf_counter()
            for _ in range(steps):
                step(fed)
                waiting = time.perf_counter()
                fed = next(feed)
                waited_s += time.perf_counter() - waiting
            yardsticks.fence(self.device)
            seconds = time.perf_counter() - start
            joules = self.joules() - before if self.joules else None
        self._give_back()
        samples = steps * self.sampler.step_size
        return Pass(steps, samples, seconds, waited_s, joules)

    def _give_back(self) -> None:
        """On CUDA the others need what this process has put by."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _indices(self, steps: int) -> list[NDArray[np.int64]]:
        found = list(self.sampler.steps(self.done, self.done + steps))
        self.done += steps
        return found

    def _slots(self) -> list[list[int]]:
        """Of each image of each sample."""
        sizes_of, num_slots = self.parts.stores.sizes_of, self.model.connector.num_slots
        return [[num_slots(size) for size in sizes_of(sample.rows)] for sample in self.samples]


class _Ours(Loop[Fed]):
    """The step of `align.trainer.train`, but for what it logs and saves."""

    is_ours = True

    def __init__(self, spec: LoopSpec) -> None:
        super().__init__(spec)
        self.optimizer = build_optimizer(self.config.optim, self.model.connector)
        self.updates = 0

    def train_on(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss per supervised token, gradient norm), on the device."""
        loss, tokens = self.model(batch.to(self.device))
        loss.backward()
        loss = loss.detach()
        lr = lr_at(self.config.optim, self.updates, SCHEDULE_STEPS)
        norm = update(self.optimizer, lr, tokens, self.config.optim.clip, loss)
        self.updates += 1
        return loss / tokens, norm


class Cached(_Ours[Batch]):
    """Features come from the store, by the reader of a training."""

    name = "cached"

    def feed(self, index_batches: Sequence[NDArray[np.int64]]) -> Generator[Batch, None, None]:
        return self.parts.loader("train").stream(index_batches)

    def step(self, fed: Batch) -> tuple[Tensor, Tensor]:
        return self.train_on(fed)

    def contents(self, fed: Batch) -> tuple[tuple[str, ...], int]:
        return tuple(fed.ids), fed.num_supervised


@dataclass(frozen=True, slots=True)
class _LiveBatch:
    """pixels: on the device. text: a batch that still lacks its features."""

    pixels: Pixels
    text: Batch


class Live(_Ours[_LiveBatch]):
    """Features come from the encoder in every step. Threads read, decode and resize the images of
    the batches to come, and another one copies them to the device."""

    name = "live"

    def __init__(self, spec: LoopSpec) -> None:
        super().__init__(spec)
        self.encoder = encoder_of(self, compile=spec.compile)
        self.tokenized: dict[int, TokenizedSample] = {}

    def feed(self, index_batches: Sequence[NDArray[np.int64]]) -> Generator[_LiveBatch, None, None]:
        ahead: deque[Future[_LiveBatch]] = deque()
        with ThreadPoolExecutor(num_cores()) as decoders, ThreadPoolExecutor(1) as joiner:
            for indices in index_batches:
                keys = [key for i in indices for key in self.samples[i].record.images]
                images = [decoders.submit(self.decoded, key) for key in keys]
                ahead.append(joiner.submit(self.joined, indices, images))
                if len(ahead) > BATCHES_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def ahead(self) -> int:
        return BATCHES_AHEAD

    def decoded(self, key: str) -> NDArray[np.uint8]:
        """uint8[height, width, 3] at the encoder's resolution."""
        image, _ = decode(read_bytes(self.spec.images / key))
        return self.encoder.preprocess(image)

    def joined(
        self, indices: NDArray[np.int64], images: Sequence[Future[NDArray[np.uint8]]]
    ) -> _LiveBatch:
        samples = [self.samples[i] for i in indices]
        for i in indices.tolist():
            if i not in self.tokenized:
                sizes = self.parts.stores.sizes_of(self.samples[i].rows)
                slots = [self.model.connector.num_slots(size) for size in sizes]
                self.tokenized[i] = self.parts.encoder.encode(self.samples[i].record, slots)
        rows = np.concatenate([sample.rows for sample in samples])
        tokenized = [self.tokenized[i] for i in indices.tolist()]
        limits = self.parts.limits
        text = collate(
            tokenized,
            samples,
            [],
            self.parts.stores.sizes_of(rows),
            packed=limits.packed,
            length_multiple=limits.length_multiple,
        )
        pixels = self.encoder.collate([image.result() for image in images])
        if self.device.type == "cuda":
            pixels = pixels.pin_memory().to(self.device)
        return _LiveBatch(pixels, text)

    def encode_only(self, fed: _LiveBatch) -> Tensor:
        """float[I, P, D]."""
        features = self.encoder.encode(fed.pixels).features[self.parts.layers[0]]
        return features.clone()  # what comes out of inference mode cannot be part of a graph

    def step(self, fed: _LiveBatch) -> tuple[Tensor, Tensor]:
        return self.train_on(dataclasses.replace(fed.text, features=(self.encode_only(fed),)))

    def contents(self, fed: _LiveBatch) -> tuple[tuple[str, ...], int]:
        return tuple(fed.text.ids), fed.text.num_supervised

    def encode(self, warm: int, steps: int) -> Pass:
        """`run` without connector and language model: what an extraction computes."""
        return self._timed(self.encode_only, warm, steps)

    def decode(self, images: int) -> float:
        """images/s that one core reads, decodes and resizes."""
        keys = [sample.record.images[0] for sample in self.samples]
        start = time.perf_counter()
        for number in range(images):
            self.decoded(keys[number % len(keys)])
        return images / (time.perf_counter() - start)


def encoder_of(loop: Loop[Any], compile: bool = False) -> Encoder:
    """With the weights that the store was extracted with."""
    return load_encoder(
        loop.spec.model,
        layers=loop.parts.layers,
        device=loop.device,
        random_weights=True,
        compile=compile,
    )


# ---------------------------------------------------------------------------------- in the process


class LoopServer:
    """`Loop`'s commands, once it has been opened."""

    def __init__(self, place: str, arguments: Sequence[Any]) -> None:
        self.place, self.arguments = place, arguments
        self.loop: Any = None

    def open(self) -> None:
        self.loop = load(self.place)(*self.arguments)

    def close(self) -> None:
        if self.loop is not None:
            self.loop.close()

    def __getattr__(self, command: str) -> Any:
        return getattr(self.loop, command)


def serve(pipe: Connection, place: str, *arguments: Any) -> None:
    """place: "module:class" of what answers, built from `arguments` on the command "open"."""
    quieten()
    answer_commands(pipe, LoopServer(place, arguments))


class HereInstead:
    """What `ChildProcess` offers, without a process: for debuggers and tests."""

    def __init__(self, place: str, *arguments: Any) -> None:
        self.server = LoopServer(place, arguments)
        self.asked: list[tuple[str, tuple[Any, ...]]] = []

    def ask(self, command: str, *arguments: Any) -> Any:
        return getattr(self.server, command)(*arguments)

    def send(self, command: str, *arguments: Any) -> None:
        self.asked.append((command, arguments))

    def answer(self) -> Any:
        command, arguments = self.asked.pop(0)
        return self.ask(command, *arguments)

    def end(self) -> None:
        pass

    def close(self) -> None:
        self.server.close()
