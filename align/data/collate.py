"""Token sequences and features -> one padded batch, read from the store ahead of its use.

B samples, I images in the batch, P patches, D encoder width, T longest sequence,
S visual slots in the batch, N supervised positions in the batch, K stores, R rows of a store
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from align.connectors import Size
from align.data.dataset import LeftOut, Sample
from align.data.tokens import IGNORE, SampleEncoder, TokenizedSample
from align.errors import TemplateError
from featcache.codecs import StoredFeatures
from featcache.join import JoinReader


@dataclass(slots=True)
class Batch:
    """What the model sees, right-padded to the longest sample.

    input_ids: int64[B, T]; slots carry the image token, padding the id 0 (nothing looks at it).
    labels: int64[B, T]; IGNORE where not supervised, not shifted.
    is_slot: bool[B, T].
    features: of each store those of I images, of sample 0 first: as stored, or float[I, P, D].
    sizes: I original (width, height).
    slots: int64[S], flat positions b * T + t of the slots, in order.
    predictors: int64[N], flat positions whose next token is supervised.
    targets: int64[N], those next tokens.
    ids: B record ids.
    keys: I image keys.

    `slots`, `predictors` and `targets` hold nothing that `is_slot` and `labels` do not; they are
    worked out here, on the CPU, so that no step waits for the device to count a mask.
    """

    input_ids: Tensor
    labels: Tensor
    is_slot: Tensor
    features: tuple[StoredFeatures | Tensor, ...]
    sizes: list[Size]
    slots: Tensor
    predictors: Tensor
    targets: Tensor
    ids: list[str]
    keys: list[str]

    @property
    def num_supervised(self) -> int:
        """N, known without asking the device."""
        return self.targets.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The batch on another device, features still in their stored, small form. Where they lie
        in the reader's buffer, that may be reused once this has returned: pageable memory has been
        read by then, though the copy may still be under way.
        """

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            input_ids=move(self.input_ids),
            labels=move(self.labels),
            is_slot=move(self.is_slot),
            features=tuple(
                each.to(device) if isinstance(each, StoredFeatures) else move(each)
                for each in self.features
            ),
            sizes=self.sizes,
            slots=move(self.slots),
            predictors=move(self.predictors),
            targets=move(self.targets),
            ids=self.ids,
            keys=self.keys,
        )


def collate(
    tokenized: Sequence[TokenizedSample],
    samples: Sequence[Sample],
    features: Sequence[StoredFeatures | Tensor],
    sizes: Sequence[Size],
) -> Batch:
    """Pads on the right to the longest sample. features, sizes: of all their images, see Batch.

    Of no samples a batch without rows, of which nothing is learned.
    """
    B = len(tokenized)
    T = max((len(sample.input_ids) for sample in tokenized), default=0)
    input_ids = np.zeros((B, T), np.int64)
    labels = np.full((B, T), IGNORE, np.int64)
    is_slot = np.zeros((B, T), np.bool_)
    for row, sample in enumerate(tokenized):
        length = len(sample.input_ids)
        input_ids[row, :length] = sample.input_ids
        labels[row, :length] = sample.labels
        is_slot[row, :length] = sample.is_slot
    # Position t predicts token t + 1; the first token of a sequence is predicted by none.
    supervised = np.flatnonzero(labels[:, 1:] != IGNORE)
    b, t = np.divmod(supervised, T - 1) if T > 1 else (supervised, supervised)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        is_slot=torch.from_numpy(is_slot),
        features=tuple(features),
        sizes=list(sizes),
        slots=torch.from_numpy(np.flatnonzero(is_slot)),
        predictors=torch.from_numpy(b * T + t),
        targets=torch.from_numpy(labels[b, t + 1]),
        ids=[sample.record.id for sample in samples],
        keys=[key for sample in samples for key in sample.record.images],
    )


CACHED_SAMPLES = 50_000
"""Tokenised samples that a Loader keeps for later epochs: about 1 KB each."""


@dataclass(slots=True)
class Loader:
    """Streams batches of a split; features are read in the background, in order.

    num_slots: of an image of some original size. sizes_of: see `StoreJoin.sizes_of`.
    device: where the features of a stream are wanted; None leaves them where they were read.
    skipped: samples that turned out, once tokenised, to have nothing to learn.
    """

    reader: JoinReader
    samples: Sequence[Sample]
    encoder: SampleEncoder
    num_slots: Callable[[Size], int]
    sizes_of: Callable[[NDArray[np.int64]], list[Size]]
    device: torch.device | None = None
    skipped: LeftOut = field(default_factory=LeftOut)
    _tokenized: dict[int, TokenizedSample] = field(default_factory=dict, repr=False)
    _unusable: set[int] = field(default_factory=set, repr=False)

    def stream(self, index_batches: Iterable[NDArray[np.int64]]) -> Generator[Batch, None, None]:
        """One batch per index array; its features are valid only until the next one is asked for.

        A batch lacks the samples that cannot be used; where that is all of them, it has no rows.
        """
        # Tokenised as the reader asks for rows: some batches ahead of the one in use.
        ahead: deque[tuple[list[TokenizedSample], list[Sample]]] = deque()

        def rows() -> Iterator[NDArray[np.int64]]:
            for indices in index_batches:
                tokenized, samples = self._tokenize(indices)
                ahead.append((tokenized, samples))
                if any(len(sample.rows) for sample in samples):  # else there is nothing to read
                    yield self._rows(samples)

        nothing = self.reader.read_stored(self._rows([]))
        for features in self.reader.stream(rows(), self.device):
            while not any(len(sample.rows) for sample in ahead[0][1]):
                yield collate(*ahead.popleft(), nothing, [])
            tokenized, samples = ahead.popleft()
            yield collate(tokenized, samples, features, self.sizes_of(self._rows(samples)))
        while ahead:
            yield collate(*ahead.popleft(), nothing, [])

    def load(self, indices: NDArray[np.int64]) -> Batch:
        """One batch with memory of its own, without the samples that cannot be used."""
        tokenized, samples = self._tokenize(indices)
        features = self.reader.read_stored(self._rows(samples))
        return collate(tokenized, samples, features, self.sizes_of(self._rows(samples)))

    def usable(self) -> Iterator[int]:
        """Indices of the samples that a sequence can be made of; the others go to `skipped`."""
        for index in range(len(self.samples)):
            if self._tokenize(np.array([index]))[0]:
                yield index

    def _rows(self, samples: Sequence[Sample]) -> NDArray[np.int64]:
        """int64[I, K]: of all their images."""
        nothing = np.empty((0, len(self.reader.readers)), np.int64)
        return np.concatenate([nothing, *(sample.rows for sample in samples)])

    def _tokenize(self, indices: NDArray[np.int64]) -> tuple[list[TokenizedSample], list[Sample]]:
        tokenized: list[TokenizedSample] = []
        samples: list[Sample] = []
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
            tokenized.append(known)
            samples.append(sample)
        return tokenized, samples
