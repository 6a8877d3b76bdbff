"""Token sequences and features -> one padded batch.

B samples, I images in the batch, P patches, D encoder width, T longest sequence,
S visual slots in the batch, N supervised positions in the batch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align.connectors import Size
from align.data.dataset import Sample
from align.data.tokens import IGNORE, TokenizedSample
from featcache.codecs import StoredFeatures


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
    lengths: B numbers of tokens, without padding.

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
            lengths=self.lengths,
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
        lengths=[len(sample.input_ids) for sample in tokenized],
    )
