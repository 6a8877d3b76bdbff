"""What fp8 costs in precision and gives in speed: loss and gradients of the frozen model's step.

    python -m benchmarks.bench_fp8                        about 50 M, and the demo's trained model
    python -m benchmarks.bench_fp8 --sizes 0.6B 8B        on a GPU, with speed

Each variant runs the same step, from given visual tokens to the loss and the gradient to them, and
is compared with the same weights exactly: fp32 on the CPU, where bf16 stands beside, the rounding
that nobody minds; on CUDA the exact one is bf16. "loss" is the difference by the exact loss,
"gradient" the norm of the difference by the norm. "qwen3-*" have random weights: their speed is
that of trained ones, their precision need not be; "tiny" is the demo's model with its trained
weights, on captions of its own kind. Gradients in e5m2 are measured beside what is used, to say why
they are not.

Results: benchmarks/results/fp8.jsonl
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from align import fp8
from align.attention import causal_attention
from align.bench import results
from align.demo.language import corpus
from align.flop import LANGUAGE_MODELS, LanguageModel
from align.layers import decoder_layers, prepare_layers
from align.llm import LLMConfig, find_llm, load_llm
from align.loss import linear_cross_entropy

MID = LanguageModel("qwen3-50M", 512, 8, 8, 4, 64, 1536, 49_152)
TINY_TEXTS = 64


@dataclass(frozen=True, slots=True)
class Case:
    """One model and what it is given.

    embeds: float[B, T, H]; predictors: int64[N], flat positions; targets: int64[N].
    flop: of one step; 0 where it is not told.
    """

    name: str
    model: PreTrainedModel
    embeds: Tensor
    predictors: Tensor
    targets: Tensor
    flop: float
    config: dict[str, Any]


def random_model(size: LanguageModel, device: str) -> PreTrainedModel:
    """A frozen Qwen3 with random weights, in bf16 on CUDA and in fp32 on the CPU."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        tie_word_embeddings=True,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def random_case(size: LanguageModel, batch: int, tokens: int, supervised: int, device: str) -> Case:
    """A random model, and as many tokens of noise as large as its embeddings."""
    model = random_model(size, device)
    table = model.get_input_embeddings().weight
    with torch.device(device):
        embeds = torch.randn(batch, tokens, size.hidden_size, dtype=table.dtype)
        embeds *= model.config.initializer_range
        ends = torch.arange(1, batch + 1)[:, None] * tokens
        predictors = (ends - 1 - torch.arange(supervised)).flatten().sort().values
        targets = torch.randint(size.vocab_size, (len(predictors),))
    flop = batch * size.frozen_step_flop(tokens, supervised)
    shape = {"batch": batch, "tokens": tokens, "supervised": supervised, "weights": "random"}
    return Case(size.name, model, embeds, predictors, targets, flop, shape)


def tiny_case(device: str) -> Case:
    """The demo's language model with its trained weights, on texts like those it was trained on."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    llm = load_llm(LLMConfig(name="tiny"), torch.device(device), dtype)
    tokenizer = AutoTokenizer.from_pretrained(find_llm("tiny"))
    texts = list(itertools.islice(corpus(seed=1), TINY_TEXTS))
    rows = [tokenizer(text).input_ids for text in texts]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    places: list[int] = []
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row)
        places += [b * longest + t for t in range(len(row) - 1)]
    predictors = torch.tensor(places, device=device)
    ids = ids.to(device)
    return Case(
        "tiny",
        llm.model,
        llm.embedding(ids),
        predictors,
        ids.flatten()[predictors + 1],
        0.0,
        {"batch": len(rows), "tokens": longest, "weights": "trained"},
    )


def step(case: Case, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Mean loss and the gradient to the embeddings, in fp32."""
    dtype = model.get_input_embeddings().weight.dtype
    embeds = case.embeds.detach().to(dtype).requires_grad_()
    with causal_attention(model):
        out = model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    hidden = out.flatten(0, 1).index_select(0, case.predictors)
    head = model.get_output_embeddings().weight
    loss = linear_cross_entropy(hidden, head, case.targets) / len(case.targets)
    (gradient,) = torch.autograd.grad(loss, embeds)
    return loss.detach(), gradient.float()


def measure(case: Case, repeats: int, compiled: bool) -> list[dict[str, Any]]:
    """Rows of a case; its model is in fp8 afterwards."""
    rows: list[dict[str, Any]] = []
    exact: tuple[Tensor, Tensor] | None = None
    rate = matmul_rate(case.embeds)
    cuda = case.embeds.device.type == "cuda"
    for variant, model in variants(case):
        found = step(case, model)
        if exact is None:
            exact = found
        away = {
            "loss": float((found[0] - exact[0]).abs() / exact[0]),
            "gradient": float((found[1] - exact[1]).norm() / exact[1].norm()),
        }
        config = {**case.config, "model": case.name, "loss": float(found[0]), "compiled": False}
        if variant != "exact":
            for metric, value in away.items():
                rows.append(results.row(variant, metric, "ratio", [value], config=config))
        # What the CPU does in place of fp8 products says nothing of their speed.
        if not cuda:
            continue
        ceiling = case.flop / rate * 1e3 if case.flop else None
        for is_compiled in (False, True)[: 1 + compiled]:
            with layers_compiled(model, is_compiled):
                times = timed(lambda model=model: step(case, model), repeats)
            config = {**config, "compiled": is_compiled, "peak_gb": peak_gb()}
            rows.append(results.row(variant, "step", "ms", times, ceiling=ceiling, config=config))
    return rows


def variants(case: Case) -> Iterator[tuple[str, PreTrainedModel]]:
    """(name, model) one after another, each in the place of the one before: an 8B fits once."""
    yield "exact", case.model
    if case.embeds.dtype == torch.float32:
        yield "bf16", copy.deepcopy(case.model).bfloat16()
    fp8.quantize_layers(case.model, "fp8")
    yield "fp8", case.model
    with gradients_in(torch.float8_e5m2):
        yield "fp8, gradients in e5m2", case.model
    for module in case.model.modules():
        if isinstance(module, fp8.Fp8Linear):
            module.transposed = module.transposed_scale = None
    yield "fp8, backward in bf16", case.model


@contextmanager
def gradients_in(dtype: torch.dtype) -> Iterator[None]:
    """The type of gradients in the backward pass, inside."""
    before, fp8.GRADIENT_TYPE = fp8.GRADIENT_TYPE, dtype
    try:
        yield
    finally:
        fp8.GRADIENT_TYPE = before


@contextmanager
def layers_compiled(model: PreTrainedModel, compiled: bool) -> Iterator[None]:
    """The layers compiled inside, as they were written after it."""
    prepare_layers(model, compiled, checkpointed=False)
    try:
        yield
    finally:
        if compiled:
            for layer in decoder_layers(model, "bench_fp8"):
                del layer.__dict__["forward"]
            torch._dynamo.reset()


def matmul_rate(like: Tensor) -> float:
    """FLOP/s of a large product in the dtype and on the device of a tensor."""
    side = 8192 if like.is_cuda else 1024
    a = torch.randn(side, side, device=like.device, dtype=like.dtype)
    return 2e3 * side**3 / statistics.median(timed(lambda: a @ a, 10))


def timed(work: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds of each repeat, after one that is not counted: it may compile."""
    found = []
    for i in range(repeats + 1):
        if i == 1 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append((time.perf_counter() - start) * 1e3)
    return found[1:]


def peak_gb() -> float:
    """Of the last timed work."""
    return round(torch.cuda.max_memory_allocated() / 1e9, 2)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a model and variant a line."""
    lines = [
        "| model | variant | loss | gradient | ms | compiled, ms |",
        "|---|---|---:|---:|---:|---:|",
    ]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        own = cells.setdefault((row["config"]["model"], row["provider"]), {})
        if row["metric"] == "step":
            own["compiled" if row["config"]["compiled"] else "eager"] = f"{row['p50']:.1f}"
        else:
            own[row["metric"]] = f"{row['p50']:.2%}"
    for (model, variant), own in cells.items():
        told = [own.get(name, "") for name in ("loss", "gradient", "eager", "compiled")]
        lines.append(f"| {model} | {variant} | {' | '.join(told)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=["50M"], help="50M, 0.6B, 1.7B, 4B, 8B, ...")
    parser.add_argument("--batch", type=int, default=None, help="samples; 4 on the CPU, else 64")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--supervised", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fp8.jsonl"))
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = given.batch or (64 if device == "cuda" else 4)
    rows = measure(tiny_case(device), given.repeats, compiled=False)
    for size in given.sizes:
        known = MID if size == "50M" else LANGUAGE_MODELS[f"qwen3-{size}".lower()]
        case = random_case(known, batch, given.tokens, given.supervised, device)
        rows += measure(case, given.repeats, not given.no_compile)
        del case
    results.write(given.out, rows)
    print(table(rows))
    print(json.dumps({"rows": len(rows), "out": str(given.out)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
