"""The frozen language model, its tokenizer, and what identifies them.

Source: `Qwen3ForCausalLM` of transformers, untouched. Any causal model there runs the same way that
has a backbone taking `inputs_embeds` and whose logits are the last hidden state times the weight of
a bias-free output layer, and no more: models that scale or cap their logits (Granite, Cohere,
Gemma 2) are told by one small forward pass and refused.

    B samples, T sequence length, H model width, V vocabulary
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

import align
from align.errors import ModelError
from featcache.quiet import quiet

SHIPPED = {"tiny": "qwen3-tiny"}
"""Names of checkpoints that come with the package -> folder under align/assets."""


@dataclass
class LLMConfig:
    """Which language model, and how it computes."""

    name: str = "tiny"
    """"tiny" (shipped), a Hugging Face hub id, e.g. "Qwen/Qwen3-8B-Base", or a local folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null takes the newest."""
    image_token: str = "<|image_pad|>"
    """The existing token that the slots of an image carry. Its embedding is overwritten there."""
    attention: str = "sdpa"
    """Attention kernel as transformers names it: "sdpa", "eager", "flash_attention_2", ..."""
    quantize: str = "none"
    """"fp8" runs the linear layers of the decoder layers in fp8 (e4m3, a scale a row; H100 and
    later; on the CPU exact and slow); "none" leaves them in `train.precision`. See align/fp8.py."""
    fp8_backward: str = "fp8"
    """With quantize=fp8, what the gradient to the layers' inputs is computed in: "fp8", with a
    second copy of the weights, or "bf16", slower and in half the memory."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one "field: reason" each."""
        if not self.name:
            yield "name: must not be empty"
        if self.quantize not in ("none", "fp8"):
            yield f'quantize: must be "none" or "fp8", got {self.quantize!r}'
        if self.fp8_backward not in ("fp8", "bf16"):
            yield f'fp8_backward: must be "fp8" or "bf16", got {self.fp8_backward!r}'


@dataclass(slots=True)
class FrozenLLM:
    """A causal language model without gradients for its own weights.

    model: on its device, in eval mode, no parameter requiring a gradient.
    image_token_id: the token that slots carry.
    hidden_size: H.
    identity: what a checkpoint of a connector remembers of this model, JSON-able.
    num_parameters: of the model as it was loaded.
    is_sharded: whether its layers are divided among ranks, which then run them together.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    hidden_size: int
    identity: dict[str, Any]
    num_parameters: int
    is_sharded: bool = False

    @property
    def embedding(self) -> nn.Embedding:
        """The input table, float[V, H]."""
        return self.model.get_input_embeddings()

    @property
    def head(self) -> Tensor:
        """The output layer's weight, float[V, H]."""
        return self.model.get_output_embeddings().weight

    @property
    def backbone(self) -> nn.Module:
        """The model without its output layer; returns `last_hidden_state` float[B, T, H]."""
        return self.model.base_model


def load_llm(config: LLMConfig, device: torch.device, dtype: torch.dtype | None) -> FrozenLLM:
    """Loads and freezes a causal language model.

    dtype: of its weights; None takes that of the checkpoint.

    Raises ModelError where it cannot be found or read, has no output layer of the plain kind, or
    lacks the token that slots are to carry.
    """
    source = find_llm(config.name)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision)
            model, report = AutoModelForCausalLM.from_pretrained(
                source,
                revision=config.revision,
                dtype=dtype or "auto",
                attn_implementation=config.attention,
                output_loading_info=True,
            )
    # transformers reports a missing repository, an unreadable file and an unknown architecture as
    # OSError or ValueError with advice in several lines.
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"{_to_blame(error, source, config)}: {_one_line(error)}") from error
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        # transformers would fill these with random numbers and go on.
        raise ModelError(
            f"llm.name={config.name}: its weights lack {len(absent)} tensors of its architecture, "
            f"e.g. {absent[0]}; download the checkpoint again"
        )
    return freeze(model.to(device), tokenizer, config)


def freeze(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: LLMConfig
) -> FrozenLLM:
    """Wraps a loaded model: eval mode, no gradients, slots on an existing token.

    Raises ModelError as `load_llm` does, and where the logits are not hidden state times weight.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ModelError(f"llm.name={config.name}: its output layer is not a plain linear layer")
    model.requires_grad_(False)
    model.eval()
    if not _has_plain_logits(model, head):
        raise ModelError(
            f"llm.name={config.name}: a {model.config.model_type} scales or caps its logits, which "
            "the loss here does not; use a model such as Qwen3, Llama or Mistral"
        )
    embedding = model.get_input_embeddings()
    return FrozenLLM(
        model=model,
        tokenizer=tokenizer,
        image_token_id=_image_token_id(tokenizer, config, len(embedding.weight)),
        hidden_size=int(embedding.weight.shape[1]),
        identity=_identity(model, tokenizer, config),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


@torch.no_grad()
def _has_plain_logits(model: PreTrainedModel, head: nn.Linear) -> bool:
    """Whether the model's logits are its last hidden state times the output layer's weight.

    The hidden state is magnified to where logits reach 100: a cap of, say, 30 would hardly show on
    small ones.
    """
    # int64[1, T=4], away from the special tokens that often stand at either end.
    tokens = torch.linspace(0.2, 0.8, 4).mul(len(head.weight)).long()[None].to(head.weight.device)
    plain = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state @ head.weight.T
    factor = 100 / plain.abs().max().clamp_min(1e-6)

    def magnify(_: nn.Module, __: object, output: BaseModelOutputWithPast) -> None:
        output.last_hidden_state = output.last_hidden_state * factor

    hook = model.base_model.register_forward_hook(magnify)
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    # Measured up to H = 4096: 5e-5 in fp32 and 0.5 in bf16, whose spacing at 100 is 0.5.
    return bool((logits.float() - (plain * factor).float()).abs().max() < 2)


def _to_blame(error: Exception, source: str, config: LLMConfig) -> str:
    """The setting that a loading error of transformers is about."""
    text = str(error).lower()
    if "attn_implementation" in text or "flash" in text:
        return f"llm.attention={config.attention}"
    if isinstance(error, OSError) and not Path(source).is_dir():
        return f"llm.name={config.name}: neither a folder nor reachable on the hub"
    return f"llm.name={config.name}"


def _one_line(error: Exception) -> str:
    """The first paragraph of a message, as one line."""
    return " ".join(str(error).split("\n\n")[0].split())


def find_llm(name: str) -> str:
    """The folder of a shipped checkpoint's name; other names (hub ids, paths) as they are.

    Raises ModelError where a name looks like a local path and nothing is there.
    """
    if name in SHIPPED:
        folder = Path(align.__file__).parent / "assets" / SHIPPED[name]
        if not folder.is_dir():
            raise ModelError(f"llm.name={name}: {folder} is missing from this installation")
        return str(folder)
    if name.startswith(("/", "./", "../", "~")):
        path = Path(name).expanduser()
        if not path.is_dir():
            raise ModelError(f"llm.name={name}: no such folder")
        return str(path)
    return name


_PROBE_TEXT = "A 2-year-old naïve café owner's  photo:\n\tred & blue (640x480)… 東京 1234567 !"
"""Words, numbers, blanks and scripts that tokenizers cut differently."""


def _image_token_id(tokenizer: PreTrainedTokenizerBase, config: LLMConfig, rows: int) -> int:
    token_id = tokenizer.convert_tokens_to_ids(config.image_token)
    # The unknown token stands for whatever is none, unless it is what was asked for.
    is_known = token_id != tokenizer.unk_token_id or config.image_token == tokenizer.unk_token
    if not isinstance(token_id, int) or not is_known or token_id >= rows:
        raise ModelError(
            f"llm.image_token={config.image_token}: not a token of {config.name}; name one that "
            "it has and that no caption uses, e.g. a reserved or padding token"
        )
    return token_id


def _identity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: LLMConfig
) -> dict[str, Any]:
    """What tells two language models apart without reading all their weights.

    `probe` is a digest of 64 rows spread over the embedding table, rounded to bf16: it tells Base
    from Instruct and is the same whether the model was loaded in fp32 or in bf16.
    """
    settings = model.config
    embedding = model.get_input_embeddings().weight
    rows = torch.linspace(0, len(embedding) - 1, 64).long().to(embedding.device)
    probe = embedding[rows].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
    # The words alone do not tell how texts are cut into them, or what a chat template writes.
    writes = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "cut": tokenizer(_PROBE_TEXT).input_ids,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
    }
    described = json.dumps(writes, ensure_ascii=False, sort_keys=True)
    return {
        "name": config.name,
        "revision": getattr(settings, "_commit_hash", None),
        "model_type": settings.model_type,
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_hidden_layers,
        "vocab_size": settings.vocab_size,
        "probe": hashlib.blake2b(probe, digest_size=8).hexdigest(),
        "tokenizer": {
            "size": len(tokenizer),
            "digest": hashlib.blake2b(described.encode(), digest_size=8).hexdigest(),
        },
    }
