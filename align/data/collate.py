"""Token sequences and features -> one batch, padded or packed, read from the store ahead of use.

B samples, I images in the batch, P patches, D encoder width, T longest sequence (packed: all of
them together), S visual slots in the batch, N supervised positions in the batch, C documents of a
packed row, K stores, R rows of a store
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

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


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the samples lie in a packed row.

    cumulative: int32[C + 1], document c is at [cumulative[c], cumulative[c + 1]); the last ones may
        be padding, or empty.
    longest: no document has more tokens. positions: int64[1, T], from 0 in each document.
    """

    cumulative: Tensor
    longest: int
    positions: Tensor


@dataclass(slots=True)
class Batch:
    """What the model sees: a row a sample, right-padded; or packed, all samples in one row.

    input_ids: int64[B, T], packed int64[1, T]; slots carry the image token, padding the id 0
        (nothing looks at it). Rows beyond the samples are padding, too.
    labels: int64 of the same shape; IGNORE where not supervised, not shifted.
    is_slot: bool of the same shape.
    features: of each store those of I images, of sample 0 first: as stored, or float[I, P, D].
    sizes: I original (width, height).
    slots: int64[S], flat positions b * T + t of the slots, in order.
    predictors: int64[N], flat positions whose next token is supervised.
    targets: int64[N], those next tokens.
    ids: record ids of the samples.
    keys: I image keys.
    documents: of a packed row; None where padded.

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
    documents: Documents | None = None

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

        def move_small(tensor: Tensor) -> Tensor:
            # From pageable memory CUDA may wait for what it is at before it copies.
            if device.type == "cuda" and tensor.device.type == "cpu":
                tensor = tensor.pin_memory()
            return move(tensor)

        documents = self.documents
        if documents is not None:
            documents = replace(
                documents,
                cumulative=move_small(documents.cumulative),
                positions=move_small(documents.positions),
            )
        return Batch(
            input_ids=move_small(self.input_ids),
            labels=move_small(self.labels),
            is_slot=move_small(self.is_slot),
            features=tuple(
                each.to(device) if isinstance(each, StoredFeatures) else move(each)
                for each in self.features
            ),
            sizes=self.sizes,
            slots=move_small(self.slots),
            predictors=move_small(self.predictors),
            targets=move_small(self.targets),
            ids=self.ids,
            keys=self.keys,
            documents=documents,
        )


def collate(
    tokenized: Sequence[TokenizedSample],
    samples: Sequence[Sample],
    features: Sequence[StoredFeatures | Tensor],
    sizes: Sequence[Size],
    *,
    packed: bool = False,
    length_multiple: int = 1,
    rows: int = 0,
) -> Batch:
    """One row a sample, padded on the right to the longest; or, packed, one row of all samples.

    features, sizes: of all their images, see Batch.
    length_multiple: T is rounded up to a multiple of it; of a packed row the rest is one more
        document. rows: padding is added up to so many rows (packed: empty documents up to so many
        and one). Both leave the loss and the gradients as they are, and give compiled code and
        CUDA's allocator few shapes to meet.

    Of no samples a batch of which nothing is learned: without rows, or of padding alone.
    """
    lengths = [len(sample.input_ids) for sample in tokenized]
    longest = max(lengths, default=0)
    T = _round_up(sum(lengths) if packed else longest, length_multiple)
    if rows and not T:
        T = length_multiple
    shape = (1, T) if packed else (max(len(lengths), rows), T)
    starts = np.cumsum([0, *lengths])[:-1] if packed else T * np.arange(len(lengths))

    input_ids = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    is_slot = np.zeros(shape, np.bool_)
    predictors, targets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start, length, sample in zip(starts.tolist(), lengths, tokenized, strict=True):
        own = slice(start, start + length)
        input_ids.reshape(-1)[own] = sample.input_ids
        labels.reshape(-1)[own] = sample.labels
        is_slot.reshape(-1)[own] = sample.is_slot
        # Position t predicts token t + 1; the first token of a sample is predicted by none.
        supervised = np.flatnonzero(sample.labels[1:] != IGNORE)
        predictors.append(start + supervised)
        targets.append(sample.labels[supervised + 1])
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        is_slot=torch.from_numpy(is_slot),
        features=tuple(features),
        sizes=list(sizes),
        slots=torch.from_numpy(np.flatnonzero(is_slot)),
        predictors=torch.from_numpy(np.concatenate(predictors).astype(np.int64)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        ids=[sample.record.id for sample in samples],
        keys=[key for sample in samples for key in sample.record.images],
        documents=_documents(lengths, T, rows, length_multiple > 1) if packed else None,
    )


def _documents(lengths: Sequence[int], total: int, rows: int, round_longest: bool) -> Documents:
    """Of samples of these lengths in a row of `total`, the rest being a document of padding.

    round_longest: to a power of two, so that compiled code meets few; kernels take any upper bound.
    """
    rest = total - sum(lengths)
    of_row = [*lengths, *([rest] if rest else [])]
    of_row += [0] * (rows + 1 - len(of_row) if rows else 0)
    longest = max(of_row, default=0)
    if round_longest and longest:
        longest = 1 << (longest - 1).bit_length()
    cumulative = np.cumsum([0, *of_row])
    positions = np.arange(total) - np.repeat(cumulative[:-1], of_row)
    return Documents(
        torch.from_numpy(cumulative.astype(np.int32)),
        longest,
        torch.from_numpy(positions.astype(np.int64)[None]),
    )


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


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
