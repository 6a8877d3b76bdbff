"""What packing, compiled layers and checkpointing do to the frozen language model's step.

    python -m benchmarks.bench_layers                     a Qwen3 of about 50 M
    python -m benchmarks.bench_layers --sizes 0.6B 8B     on a GPU

The same samples, of 64 visual tokens and 16 to 80 of text, go through forward and backward to their
embeddings in micro-batches: as they come, padded to the longest; grouped by length, then padded;
and packed. Each also with compiled layers, with checkpointing, and with both. "real" counts the
tokens of samples, padding aside; its ceiling is the formula's FLOP at the rate of one large
product. "kept" are the bytes of tensors kept for the backward pass, weights aside, of the
micro-batch that keeps most.

Results: benchmarks/results/layers.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.attention import causal_attention, of_documents
from align.bench import results
from align.data.collate import Batch, collate
from align.data.dataset import Sample
from align.data.tokens import IGNORE, TokenizedSample
from align.flop import LANGUAGE_MODELS, LanguageModel
from align.layers import decoder_layers, prepare_layers
from align.loss import linear_cross_entropy
from benchmarks.bench_fp8 import MID, matmul_rate, random_model, timed
from featcache.manifests import Record

VISUAL, TEXT = 64, (16, 80)


def tokenized(count: int) -> list[TokenizedSample]:
    """Samples of random tokens; the text is supervised."""
    rng = np.random.default_rng(0)
    found = []
    for length in rng.integers(*TEXT, count).tolist():
        ids = rng.integers(0, 400, VISUAL + length)
        labels = np.where(np.arange(len(ids)) < VISUAL, IGNORE, ids)
        found.append(TokenizedSample(ids, labels, np.zeros(len(ids), np.bool_)))
    return found


def micro_batches(
    samples: Sequence[TokenizedSample], size: int, layout: str, device: torch.device
) -> list[Batch]:
    """layout: "padded", "grouped" or "packed"."""
    if layout == "grouped":
        samples = sorted(samples, key=lambda sample: len(sample.input_ids))
    nothing = Sample(Record("", (), (), None, ""), np.zeros((0, 1), np.int64))
    return [
        collate(chunk, [nothing] * len(chunk), [], [], packed=layout == "packed").to(device)
        for chunk in (samples[i : i + size] for i in range(0, len(samples), size))
    ]


def step(model: PreTrainedModel, batches: Sequence[Batch], kept: list[int] | None = None) -> None:
    """Forward and backward of each micro-batch. kept: bytes of each are appended."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for batch in batches:
        found: dict[int, int] = {}

        def note(tensor: Tensor, found: dict[int, int] = found) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        embeds = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        hooks: AbstractContextManager[Any] = contextlib.nullcontext()
        if kept is not None:
            hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, causal_attention(model):
            out = model.base_model(
                inputs_embeds=embeds, use_cache=False, **of_documents(batch.documents)
            ).last_hidden_state
            hidden = out.flatten(0, 1).index_select(0, batch.predictors)
            loss = linear_cross_entropy(hidden, model.get_output_embeddings().weight, batch.targets)
        if kept is not None:
            kept.append(sum(found.values()))
        loss.backward()


def measure(
    size: LanguageModel, count: int, micro: int, repeats: int, compiles: bool, device: str
) -> list[dict[str, Any]]:
    """Rows of a model. count: samples of a step. micro: samples of a micro-batch."""
    model = random_model(size, device)
    samples = tokenized(count)
    lengths = [len(sample.input_ids) for sample in samples]
    supervised = [sample.num_supervised for sample in samples]
    flop = sum(size.frozen_step_flop(t, n) for t, n in zip(lengths, supervised, strict=True))
    like = model.get_input_embeddings().weight
    rows = []
    for compiled, checkpointed in ((False, False), (False, True), (True, False), (True, True)):
        if compiled and not compiles:
            continue
        prepare_layers(model, compiled, checkpointed)
        for layout in ("padded", "grouped", "packed"):
            batches = micro_batches(samples, micro, layout, like.device)
            ceiling = sum(lengths) / (flop / matmul_rate(like))
            times = timed(lambda batches=batches: step(model, batches), repeats)
            kept: list[int] = []
            step(model, batches, kept)
            config = {
                "model": size.name,
                "samples": count,
                "micro_batch": micro,
                "compiled": compiled,
                "checkpointed": checkpointed,
                "padding": 1 - sum(lengths) / sum(batch.input_ids.numel() for batch in batches),
                "kept_mb": round(max(kept) / 1e6, 1),
                "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            }
            rates = [sum(lengths) / ms * 1e3 for ms in times]
            rows.append(
                results.row(layout, "real", "tokens/s", rates, ceiling=ceiling, config=config)
            )
        for layer in decoder_layers(model, "bench_layers"):
            layer.__dict__.pop("forward", None)
        torch._dynamo.reset()
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | layout | layers | tokens/s | of ceiling | padding | kept, MB |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        config = row["config"]
        how = [name for name in ("compiled", "checkpointed") if config[name]]
        lines.append(
            f"| {config['model']} | {row['provider']} | {', '.join(how) or 'as written'} "
            f"| {row['p50']:,.0f} | {row['p50'] / row['ceiling']:.2f} "
            f"| {config['padding']:.1%} | {config['kept_mb']:,.0f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=["50M"], help="50M, 0.6B, 1.7B, 4B, 8B, ...")
    parser.add_argument("--samples", type=int, default=None, help="8 on the CPU, else 256")
    parser.add_argument("--micro", type=int, default=None, help="4 on the CPU, else 64")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layers.jsonl"))
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = given.samples or (256 if device == "cuda" else 8)
    micro = given.micro or (64 if device == "cuda" else 4)
    rows = []
    for name in given.sizes:
        size = MID if name == "50M" else LANGUAGE_MODELS[f"qwen3-{name}".lower()]
        rows += measure(size, count, micro, given.repeats, not given.no_compile, device)
    results.write(given.out, rows)
    print(table(rows))
    print(json.dumps({"rows": len(rows), "out": str(given.out)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
