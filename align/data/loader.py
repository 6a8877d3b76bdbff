"""Batches of a split: tokenised and read ahead of their use.

Two things happen in the background, each in order: a thread turns records into tokens, cuts steps
into batches and lays these out; the reader's threads bring the features of the batches that are
known. What is left to the loop is to put the two together.

I images in a batch, K stores
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from align.connectors import Size
from align.data.batching import BatchLimits, divide
from align.data.collate import Batch, collate
from align.data.dataset import LeftOut, Sample
from align.data.tokens import SampleEncoder, TokenizedSample
from align.errors import TemplateError
from featcache.join import JoinReader

T = TypeVar("T")
S = TypeVar("S")

CACHED_SAMPLES = 50_000
"""Tokenised samples that a Loader keeps for later epochs: about 1 KB each."""
STEPS_AHEAD = 2
"""Steps, or evaluation batches, that are tokenised beyond those whose features are being read."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A batch that still lacks its features. rows: int64[I, K], where these are.

    ends_step: whether it is the last one of a step.
    """

    batch: Batch
    rows: NDArray[np.int64]
    ends_step: bool = True


@dataclass(slots=True)
class Loader:
    """Streams batches of a split; features are read in the background, in order.

    num_slots: of an image of some original size. sizes_of: see `StoreJoin.sizes_of`.
    device: where the features of a stream are wanted; None leaves them where they were read.
    limits: of a training's forward passes, and how samples are laid into them; None pads each batch
    to its longest sample, whatever its size.
    skipped: samples that turned out, once tokenised, to have nothing to learn.
    """

    reader: JoinReader
    samples: Sequence[Sample]
    encoder: SampleEncoder
    num_slots: Callable[[Size], int]
    sizes_of: Callable[[NDArray[np.int64]], list[Size]]
    device: torch.device | None = None
    limits: BatchLimits | None = None
    skipped: LeftOut = field(default_factory=LeftOut)
    _tokenized: dict[int, TokenizedSample] = field(default_factory=dict, repr=False)
    _unusable: set[int] = field(default_factory=set, repr=False)

    def stream(self, index_batches: Iterable[NDArray[np.int64]]) -> Generator[Batch, None, None]:
        """One batch per index array; its features are valid only until the next one is asked for.

        A batch lacks the samples that cannot be used; where that is all of them, it has no rows.
        """
        with closing(in_background(self._part, index_batches, STEPS_AHEAD)) as parts:
            for _, batch in self._read(parts):
                yield batch

    def stream_steps(
        self, steps: Iterable[NDArray[np.int64]], rank: int = 0, ranks: int = 1
    ) -> Generator[tuple[Batch, bool], None, None]:
        """The batches within `limits` that one rank takes of each step, and whether each is the
        step's last one.

        steps: indices of the samples of each step, over all ranks. All ranks have equally many
        batches in a step, at least one; some may be without rows. Valid as those of `stream`.
        """
        limits = self.limits
        assert limits is not None, "a loader that is not of a training"

        def cut(indices: NDArray[np.int64]) -> list[_Part]:
            usable = self._tokenize(indices)
            lengths = [len(tokens.input_ids) for tokens, _ in usable]
            mine = divide(lengths, limits, ranks)[rank] or [np.empty(0, np.int64)]
            return [
                self._lay_out([usable[i] for i in places], ends_step=number == len(mine) - 1)
                for number, places in enumerate(mine)
            ]

        with closing(in_background(cut, steps, STEPS_AHEAD)) as prepared:
            for part, batch in self._read(part for parts in prepared for part in parts):
                yield batch, part.ends_step

    def load(self, indices: NDArray[np.int64]) -> Batch:
        """One batch with memory of its own, without the samples that cannot be used."""
        part = self._part(indices)
        return replace(part.batch, features=self.reader.read_stored(part.rows))

    def usable(self) -> Iterator[int]:
        """Indices of the samples that a sequence can be made of; the others go to `skipped`."""
        for index in range(len(self.samples)):
            if self._tokenize(np.array([index])):
                yield index

    def _read(self, parts: Iterable[_Part]) -> Generator[tuple[_Part, Batch], None, None]:
        ahead: deque[_Part] = deque()

        def rows() -> Iterator[NDArray[np.int64]]:
            for part in parts:
                ahead.append(part)
                yield part.rows

        with closing(self.reader.stream(rows(), self.device)) as stream:
            for features in stream:
                part = ahead.popleft()
                yield part, replace(part.batch, features=features)

    def _part(self, indices: NDArray[np.int64]) -> _Part:
        return self._lay_out(self._tokenize(indices))

    def _lay_out(
        self, usable: Sequence[tuple[TokenizedSample, Sample]], ends_step: bool = True
    ) -> _Part:
        samples = [sample for _, sample in usable]
        nothing = np.empty((0, len(self.reader.readers)), np.int64)
        rows = np.concatenate([nothing, *(sample.rows for sample in samples)])
        batch = collate(
            [tokens for tokens, _ in usable],
            samples,
            (),
            self.sizes_of(rows),
            packed=self.limits is not None and self.limits.packed,
            length_multiple=1 if self.limits is None else self.limits.length_multiple,
        )
        return _Part(batch, rows, ends_step)

    def _tokenize(self, indices: NDArray[np.int64]) -> list[tuple[TokenizedSample, Sample]]:
        """Of those that can be used."""
        usable: list[tuple[TokenizedSample, Sample]] = []
        for index in indices.tolist():
            sample = self.samples[index]
            known = self._tokenized.get(index)
            if known is None:
                slots = [self.num_slots(size) for size in self.sizes_of(sample.rows)]
                try:
                    known = self.encoder.encode(sample.record, slots)
                except TemplateError as error:
                    if index not in self._unusable:  # counted once, not once an epoch
                        self._unusable.add(index)
                        self.skipped.add(str(error), sample.record.id)
                    continue
                # At 558K samples only some would be kept, and an epoch is hours away anyhow.
                if len(self._tokenized) < CACHED_SAMPLES:
                    self._tokenized[index] = known
            usable.append((known, sample))
        return usable


def in_background(
    function: Callable[[S], T], items: Iterable[S], ahead: int
) -> Generator[T, None, None]:
    """`map(function, items)`, in order, computed in one thread up to `ahead` results early."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="align-tokens")
    pending: deque[Future[T]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
