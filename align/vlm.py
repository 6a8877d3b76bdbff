"""The trained whole: features -> connector -> frozen language model -> loss.

B samples, I images in the batch, P patches, D encoder width, S visual slots in the batch,
H LLM width, T sequence length, N supervised positions in the batch, V vocabulary
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from align.attention import causal_attention, of_documents, require_packing
from align.connectors import Connector, Size
from align.data.collate import Batch
from align.errors import DataError, listed
from align.llm import FrozenLLM
from align.loss import linear_cross_entropy
from featcache.codecs import StoredFeatures


class AlignModel(nn.Module):
    """A connector in front of a frozen language model.

    1. `connector(features, sizes)`: float[I, P, D] of each store -> slots float[S, H].
    2. Text embeddings are looked up without gradient; those of the slots are replaced, out of
       place, in their order.
    3. The frozen backbone runs causally. Padding is on the right, so no real position looks at it
       and no mask is needed: the plain causal kernel runs. In a packed row each document looks at
       itself alone (`align.attention`).
    4. The supervised positions alone go through the output layer and the cross-entropy.

    Only the connector's parameters belong to this module; the language model is kept beside it, so
    that `state_dict`, `parameters` and `to` never touch frozen weights.

    autocast: dtype of the products, or None to compute in the weights' own dtype.
    """

    def __init__(
        self, connector: Connector, llm: FrozenLLM, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.connector = connector
        self._llm = [llm]  # in a list: an nn.Module held as an attribute would become a submodule
        self.autocast = autocast

    @property
    def llm(self) -> FrozenLLM:
        """The frozen language model."""
        return self._llm[0]

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        return self.llm.head.device

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        """The summed loss (fp32 scalar) and the number of supervised tokens that it sums over.

        The sum, not the mean: with gradient accumulation or several ranks, dividing by all
        supervised tokens of a step must happen outside.
        """
        with self.precision():
            hidden = self.supervised_hidden(batch)
            loss = linear_cross_entropy(hidden, self.llm.head, batch.targets)
        return loss, batch.num_supervised

    def idle(self) -> None:
        """A pass of one token of which nothing is learned.

        Of a language model that is sharded over ranks, each pass takes all of them.
        """
        embeds = torch.zeros(
            1, 1, self.llm.hidden_size, dtype=self.llm.head.dtype, device=self.device
        ).requires_grad_(torch.is_grad_enabled())
        with self.precision(), causal_attention(self.llm.model):
            hidden = self.llm.backbone(inputs_embeds=embeds, use_cache=False).last_hidden_state
        if torch.is_grad_enabled():
            hidden.sum().backward()

    def supervised_hidden(self, batch: Batch) -> Tensor:
        """float[N, H]: what the output layer makes the supervised tokens' logits of.

        Raises ModelError for a packed batch that the language model cannot keep apart.
        """
        if batch.documents is not None:
            require_packing(self.llm.model)
        with self.precision(), causal_attention(self.llm.model):
            embeds = self.inject(
                batch.input_ids, batch.slots, self.visual(batch.features, batch.sizes)
            )
            hidden = self.llm.backbone(
                inputs_embeds=embeds, use_cache=False, **of_documents(batch.documents)
            ).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.predictors)

    def visual(self, features: Sequence[StoredFeatures | Tensor], sizes: Sequence[Size]) -> Tensor:
        """What is put into the slots, float[S, H], of the first image first.

        features: of each store float[I, P, D] in any dtype, or as stored: these are decoded here,
        on the device. sizes: the images' original (width, height).

        Raises DataError for another number of patches than the connector was built for.
        """
        # Not to autocast's dtype: a norm over the features comes first, and autocast computes norms
        # in fp32; what fp16 features lose in bf16 would be lost before it.
        dtype = next(self.connector.parameters()).dtype
        towers = [
            each.decode(dtype) if isinstance(each, StoredFeatures) else each.to(dtype)
            for each in features
        ]
        there, built = [each.shape[1] for each in towers], [P for P, _ in self.connector.towers]
        if there != built:
            raise DataError(
                f"the features have {listed(there)} patches an image, the connector was built "
                f"for {listed(built)}; use features of the encoder it was trained with"
            )
        slots: Tensor = self.connector(towers, sizes)
        return slots

    def inputs_embeds(
        self,
        input_ids: Tensor,
        is_slot: Tensor,
        features: Sequence[StoredFeatures | Tensor],
        sizes: Sequence[Size],
    ) -> Tensor:
        """What the backbone starts from, float[B, T, H], for padding on either side.

        input_ids: int64[B, T]; is_slot: bool[B, T]; features, sizes: of I images, see `visual`, in
        the order of their slots.
        """
        with self.precision():
            slots = is_slot.flatten().nonzero().squeeze(1)
            return self.inject(input_ids, slots, self.visual(features, sizes))

    def inject(self, input_ids: Tensor, slots: Tensor, visual: Tensor) -> Tensor:
        """float[B, T, H]: embeddings of input_ids int64[B, T], with visual tokens in the slots.

        slots: int64[S], flat positions b * T + t, rising; visual: float[S, H].
        """
        with torch.no_grad():
            text = self.llm.embedding(input_ids)
        return text.flatten(0, 1).index_copy(0, slots, visual.to(text.dtype)).view_as(text)

    def precision(self) -> AbstractContextManager[object]:
        """Autocast where it is asked for."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)
