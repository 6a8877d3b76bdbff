"""How the decoder layers of the frozen language model run in training: compiled, checkpointed.

Each layer's `forward` is replaced in place, inside of what `layer(...)` does: hooks of FSDP2 stay
outside, and run once. Parameters keep their names. Generation, which hands a key-value cache down,
runs the layers as they were written: its lengths change with each token.

    B rows, T tokens of a row, H model width
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from align.attention import causal_attention
from align.errors import ModelError

Forward = Callable[..., Any]


def decoder_layers(model: PreTrainedModel, asked_by: str) -> nn.ModuleList:
    """The layers that a model is made of; each takes float[B, T, H] and gives the same shape.

    asked_by: the setting that needs them, for the message. Raises ModelError where they are not
    where transformers has those of Llama, Mistral, Qwen and their like.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ModelError(
            f"{asked_by}: the decoder layers of a {model.config.model_type} model are not known; "
            "leave the setting off"
        )
    return layers


def prepare_layers(model: PreTrainedModel, compiled: bool, checkpointed: bool) -> None:
    """Lets the decoder layers run compiled, checkpointed or both in training.

    After all that changes the layers themselves (`align.fp8`), before FSDP2 wraps them.

    compiled: layer by layer, so that identical layers are compiled once: code and guards are those
        of the class, the weights are inputs. Sizes are left open from the start: one graph for all
        B > 1 and T, one for B = 1, and one more for the first layer, as what it is given is a view.
    checkpointed: only a layer's input is kept for the backward pass, in which the layer runs again.

    Raises ModelError as `decoder_layers` does.
    """
    if not compiled and not checkpointed:
        return
    asked_by = "train.compile=true" if compiled else "train.checkpoint_activations=true"
    for layer in decoder_layers(model, asked_by):
        written: Forward = layer.forward
        # Left to itself, torch would compile for the first shape, then again for each size that it
        # finds to differ: twice more.
        forward: Forward = torch.compile(written, dynamic=True) if compiled else written
        # Checkpointing is outside: what is compiled is then the same with and without it.
        if checkpointed:
            forward = _checkpointed(forward, model)
        layer.forward = _unless_cached(forward, written)


def _checkpointed(forward: Forward, model: PreTrainedModel) -> Forward:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        # The backward pass comes after `causal_attention` has ended: without it the layer would run
        # again with another kernel, which knows of no documents.
        return contextlib.nullcontext(), causal_attention(model)

    # Not `gradient_checkpointing_enable`: transformers' own works in training mode only, and the
    # frozen model is in eval mode, so that nothing in it is dropped out.
    def run(*args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = checkpoint(
            forward,
            *args,
            use_reentrant=False,
            context_fn=contexts,
            # In eval mode nothing is drawn, and to keep the state of CUDA's generator is to wait.
            preserve_rng_state=False,
            **kwargs,
        )
        return out

    return run


def _unless_cached(forward: Forward, written: Forward) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        chosen = forward if kwargs.get("past_key_values") is None else written
        return chosen(*args, **kwargs)

    return run
