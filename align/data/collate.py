"""Token sequences and features -> one batch, padded or packed.

B samples, I images in the batch, P patches, D encoder width, T longest sequence (packed: all of
them together), S visual slots in the batch, N supervised positions in the batch, C documents of a
packed row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from align.connectors import Size
from align.data.batching import round_up
from align.data.dataset import Sample
from align.data.tokens import IGNORE, TokenizedSample
from featcache.codecs import StoredFeatures


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the samples lie in a packed row.

    cumulative: int32[C + 1], document c is at [cumulative[c], cumulative[c + 1]); the last one may
        be padding.
    longest: no document has more tokens. positions: int64[1, T], from 0 in each document.
    """

    cumulative: Tensor
    longest: int
    positions: Tensor


@dataclass(slots=True)
class Batch:
    """What the model sees: a row a sample, right-padded; or packed, all samples in one row.

    input_ids: int64[B, T], packed int64[1, T]; slots carry the image token, padding the id 0
        (nothing looks at it).
    labels: int64 of the same shape; IGNORE where not supervised, not shifted.
    is_slot: bool of the same shape.
    features: of each store those of I images, of sample 0 first: as stored, or float[I, P, D].
    sizes: I original (width, height).
    slots: int64[S], flat positions b * T + t of the slots, in order.
    predictors: int64[N], flat positions whose next token is supervised.
    targets: int64[N], those next tokens.
    ids: record ids of the samples.
    keys: I image keys.
    lengths: B numbers of tokens, without padding.
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
    lengths: list[int]
    documents: Documents | None = None

    @property
    def num_supervised(self) -> int:
        """N, known without asking the device."""
        return self.targets.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The batch on another device but for `labels` and `is_slot`, which no step looks at.

        Features stay in their stored, small form. Where they lie in the reader's buffer, that may
        be used again once this has returned: pageable memory has been read by then, though the copy
        may still be under way.
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
            labels=self.labels,
            is_slot=self.is_slot,
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
            lengths=self.lengths,
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
) -> Batch:
    """One row a sample, padded on the right to the longest; or, packed, one row of all samples.

    features, sizes: of all their images, see Batch.
    length_multiple: T is rounded up to a multiple of it; of a packed row the rest is one more
        document. Loss and gradients stay as they are, and compiled code and CUDA's allocator meet
        few shapes.

    Of no samples a batch without rows, of which nothing is learned.
    """
    lengths = [len(sample.input_ids) for sample in tokenized]
    longest = max(lengths, default=0)
    T = round_up(sum(lengths) if packed else longest, length_multiple)
    shape = (1, T) if packed else (len(lengths), T)
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
        lengths=lengths,
        documents=_documents(lengths, T, length_multiple > 1) if packed else None,
    )


def _documents(lengths: Sequence[int], total: int, round_longest: bool) -> Documents:
    """Of samples of these lengths in a row of `total`, the rest being a document of padding.

    round_longest: to a power of two, so that compiled code meets few; kernels take any upper bound.
    """
    rest = total - sum(lengths)
    of_row = [*lengths, *([rest] if rest else [])]
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
