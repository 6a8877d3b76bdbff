"""Causal attention of the frozen language model in training, without a mask: padded or packed.

transformers looks for documents in the position ids and builds what it finds as bool[B, 1, T, T];
even where it finds none, it has to ask the device. The attention function here is registered
without a mask function beside it, which transformers takes for "needs no mask" and asks nothing.

    padded   `scaled_dot_product_attention(is_causal=True)`: padding is on the right, so that no
             real position looks at it
    packed   CUDA: `torch.nn.attention.varlen`, FlashAttention with document boundaries;
             elsewhere, and in fp32: the padded kernel, a document at a time

It is in force only inside `causal_attention`; generation, with its masks and key-value cache, goes
on with the kernel that `llm.attention` names.

    B rows, T tokens of a row, C documents of a packed row, h heads, k key-value heads, d head width
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from align.data.collate import Documents
from align.errors import ModelError

NAME = "align_causal"
"""Under which transformers knows the function."""

_VARLEN_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Groups of query heads over one key head: torch 2.11 takes them without a word, 2.12 has to be
told. (The keyword `is_causal` ended with 2.10.)"""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer, its names for the arguments.

    query: float[B, h, T, d]; key, value: float[B, k, T, d]; attention_mask: None.
    cu_seq_lens_q: int32[C + 1] of a packed row, see `Documents.cumulative`; None where padded.
    max_length_q: tokens of the longest document.
    Returns float[B, T, h, d], and no attention weights.
    """
    assert attention_mask is None, "causal attention takes no mask"
    if cu_seq_lens_q is None:
        return _plain(module, query, key, value, scaling), None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling)[None], None
    return _one_by_one(module, query, key, value, cu_seq_lens_q, scaling), None


def _plain(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> Tensor:
    out: Tensor
    out, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
    return out


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, cumulative: Tensor, longest: int, scale: float | None
) -> Tensor:
    """float[1, h, T, d] and twice float[1, k, T, d] -> float[T, h, d], by FlashAttention."""
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    grouped: dict[str, Any] = {}
    if _VARLEN_HAS_GQA:
        grouped["enable_gqa"] = query.shape[1] != key.shape[1]
    out = varlen_attn(
        query,
        key,
        value,
        cumulative,
        cumulative,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # all that came before, nothing after
        **grouped,
    )
    assert isinstance(out, Tensor)  # a tuple only where the sums of the softmax are asked for
    return out


# A loop over lengths that only the data tells: nothing to compile.
@torch.compiler.disable
def _one_by_one(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cumulative: Tensor,
    scaling: float | None,
) -> Tensor:
    """float[1, h, T, d] and twice float[1, k, T, d] -> float[1, T, h, d]."""
    ends = cumulative.tolist()
    parts = [
        _plain(
            module, query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], scaling
        )
        for start, end in itertools.pairwise(ends)
        if end > start
    ]
    return torch.cat(parts, dim=1)


AttentionInterface.register(NAME, attend)


def can_be_plain(model: PreTrainedModel) -> bool:
    """Whether each layer of a model looks at all that came before, and at nothing else, by SDPA.

    Not so of sliding windows and chunks, of models that do not ask transformers' table for their
    attention, and where `llm.attention` names another kernel.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        is_full = set(kinds) == {"full_attention"}
    else:
        is_full = getattr(config, "sliding_window", None) is None
    is_causal = getattr(config, "is_causal", True)
    return (
        is_full
        and is_causal
        and model.is_backend_compatible()
        and model.config._attn_implementation in ("sdpa", NAME)
    )


def require_packing(model: PreTrainedModel) -> None:
    """Raises ModelError where a model cannot be run on packed documents."""
    if not can_be_plain(model):
        raise ModelError(
            f"train.packing=true: a {model.config.model_type} model with "
            f"llm.attention={model.config._attn_implementation} cannot keep documents apart here; "
            "packing takes full causal attention and llm.attention=sdpa; set train.packing=false"
        )


@contextlib.contextmanager
def causal_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model attends by `attend` where it can, and after it as before."""
    config = model.config
    before = config._attn_implementation
    if before == NAME or not can_be_plain(model):
        yield
        return
    # Not `set_attn_implementation`: it walks over all modules, for each step.
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def of_documents(documents: Documents | None) -> dict[str, Any]:
    """What a backbone is told of a packed row, in transformers' names; nothing where padded."""
    if documents is None:
        return {}
    return {
        "position_ids": documents.positions,
        "cu_seq_lens_q": documents.cumulative,
        "max_length_q": documents.longest,
    }
