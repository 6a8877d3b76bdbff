"""A training step on stored features beside the same step with the encoder in it.

For each language model and number of visual tokens, every loop of align/bench/loops.py has a
process of its own. They take the first step on the same samples and must agree on its loss and its
gradient, or nothing is reported. Then rounds: each times one pass of every loop, one after another
in an order drawn anew, and large matrix products beside them, so that what else the machine does
hits all alike.

    ceiling of samples/s    matrix products a second / operations of a sample (align/flop.py)
    MFU                     samples/s over that ceiling

The operations of a sample are those that the model needs; of *live* and *plain* also the encoder's.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.bench import random_llm, results
from align.bench.loops import LOOPS, MAX_WORKERS, FirstStep, HereInstead, LoopSpec, Pass, serve
from align.bench.process import ChildProcess, ProviderError
from align.bench.step_data import StepData, write_data
from align.config import RunConfig, load_config
from align.errors import AlignError
from align.flop import LanguageModel, connector_step_flop
from featcache.device import num_cores, resolve_device
from featcache.errors import ConfigError
from featcache.registry import ENCODERS, EncoderEntry

TOLERANCES = {"fp32": (1e-4, 1e-2), "bf16": (5e-3, 5e-2), "fp8": (2e-2, 5e-1)}
"""Relative, of the first step's (loss, gradient norm) against the cached one's. Largest measured,
with a store in fp16: fp32 (2e-6, 3e-5), bf16 (8e-5, 4e-3); of fp8 in benchmarks/results/fp8.jsonl
(4e-3, 2e-1). "fp8" is `llm.quantize=fp8`, which plain does not have."""
CUT = ("train.batch_size", "train.batch_tokens", "train.grad_accum")
"""Settings of how a step is cut into passes."""
MATMUL = "matmul"
MATMUL_S = 1.0
DECODED = 32
"""Images by which a core's rate of decoding is measured."""
QUICK_STEP_S = 5.0
"""A step that takes longer is not taken once more only to learn how long it takes."""
TUNE_S = 1.0
"""A batch size's trial."""
OURS_ALONE = ("train", "llm")
"""Sections of the config of which plain takes nothing that a user overrides: it stays as plain."""


Server = ChildProcess | HereInstead


class StepMismatch(AlignError):  # noqa: N818 - reads as what happened
    """Loops that do not compute the same, whose times would mean nothing."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What to measure.

    model: the encoder, with random weights. llms: names, see random_llm.sizes_of. tokens: visual
    ones of an image, each measured with every LLM; as many as the encoder has patches is the MLP.
    images: that are repeated. batch_sizes: of a step; of several each loop takes its fastest.
    steps, pass_s: a timed pass takes at least so many and about so long. warm_s: about so long are
    untimed steps before it, if a step is no longer. rounds: of passes.
    device: of torch. precision: "fp32" or "bf16". compile: the live encoder, and ours where
    training has the setting. workers: of plain's DataLoader. overrides: KEY=VALUE of the config.
    loops: {name: "module:class"}; "cached" must be among them. apart: a process for each; without,
    the peak memory is that of all.
    """

    model: str = "siglip2-so400m"
    llms: tuple[str, ...] = ("tiny",)
    tokens: tuple[int, ...] = (64,)
    images: int = 8
    batch_sizes: tuple[int, ...] = (4,)
    steps: int = 1
    pass_s: float = 2.0
    warm_s: float = 0.5
    rounds: int = 3
    device: str = "cpu"
    precision: str = "fp32"
    random_weights: bool = False
    compile: bool = False
    workers: int = field(default_factory=lambda: min(MAX_WORKERS, num_cores()))
    overrides: tuple[str, ...] = ()
    loops: Mapping[str, str] = field(
        default_factory=lambda: {name: LOOPS[name] for name in ("cached", "live", "plain")}
    )
    apart: bool = True
    limit_s: float = math.inf

    def __post_init__(self) -> None:
        """Raises ConfigError, ModelError."""
        entry = ENCODERS.get(self.model)
        if entry is None or entry.model_type != "siglip_vision_model":
            known = [n for n, e in ENCODERS.items() if e.model_type == "siglip_vision_model"]
            raise ConfigError(
                f"--model {self.model}: the plain loop is written for SigLIP; known: "
                f"{', '.join(known)}"
            )
        if not {"cached"} <= set(self.loops):
            raise ConfigError("--loops: cached is what the others are compared with; name it too")
        if max(self.batch_sizes) > self.images:
            raise ConfigError(
                f"--batch-size {max(self.batch_sizes)}: more than the {self.images} images; raise "
                "--images"
            )
        if "llava" in self.loops and set(self.tokens) != {self.encoder.num_patches}:
            raise ConfigError(
                f"--loops llava: has the MLP, which makes {self.encoder.num_patches} tokens of an "
                f"image; give --tokens {self.encoder.num_patches}"
            )
        for each in self.overrides:
            if each.split("=")[0] in CUT:
                raise ConfigError(
                    f"{each}: a step is one pass here, of --batch-size samples; leave it out"
                )
        for llm in self.llms:
            random_llm.sizes_of(llm, self.random_weights)
        for tokens in self.tokens:
            self.config("tiny", tokens)

    @property
    def encoder(self) -> EncoderEntry:
        return ENCODERS[self.model]

    @property
    def compute(self) -> str:
        """Of `TOLERANCES`."""
        return "fp8" if "llm.quantize=fp8" in self.overrides else self.precision

    def config(self, llm: str, tokens: int) -> RunConfig:
        """That of our loops. llm: a folder or "tiny". Raises ConfigError."""
        return load_config(None, self.settings(llm, tokens))

    def settings(self, llm: str, tokens: int, plain: bool = False) -> tuple[str, ...]:
        """KEY=VALUE of a run's config."""
        mlp = tokens == self.encoder.num_patches
        own = [
            f"llm.name={llm}",
            "connector.name=mlp" if mlp else f"connector.num_latents={tokens}",
            "data.eval_ratio=0",
            f"train.device={self.device}",
            f"train.precision={self.precision}",
            f"train.batch_size={self.batch_sizes[0]}",
            *["train.compile=true"] * (self.compile and not plain),
        ]
        theirs = [
            each for each in self.overrides if not (plain and each.split(".")[0] in OURS_ALONE)
        ]
        return (*own, *theirs)


@dataclass(frozen=True, slots=True)
class Case:
    """A language model with a number of visual tokens. llm: its name. source: folder, or "tiny"."""

    llm: str
    sizes: LanguageModel
    source: str
    tokens: int


@dataclass(slots=True)
class Measured:
    """What the rounds of a case gave.

    passes: of each loop, one a round. peak_bytes: of each. batch_sizes: of each. first: of each.
    lengths: (tokens, supervised ones) of each sample. matmul: operations a second, each before a
    pass. encode: passes of the encoder alone; empty but in the first case. decode: images/s of a
    core. failed: {loop: why}.
    """

    passes: dict[str, list[Pass]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    batch_sizes: dict[str, int] = field(default_factory=dict)
    first: dict[str, FirstStep] = field(default_factory=dict)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    matmul: list[float] = field(default_factory=list)
    encode: list[Pass] = field(default_factory=list)
    decode: float | None = None
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class StepFindings:
    """rows: of results.py. failed: {"loop, LLM, tokens": why}."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def measure(
    folder: Path,
    plan: StepPlan,
    on_note: Callable[[str], None] = lambda _: None,
    on_rows: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> StepFindings:
    """Result rows of all cases. on_rows: called with all rows so far after each case.

    Raises StoreError where the features cannot be extracted, StepMismatch where two loops do not
    compute the same, ProviderError where the cached one fails, ConfigError for a full disk.
    """
    found = StepFindings()
    end = time.monotonic() + plan.limit_s
    device = resolve_device(plan.device)
    on_note(f"{plan.images} images are extracted by {plan.model}")
    data = write_data(folder, plan.model, plan.images, min(plan.batch_sizes), plan.device)
    _give_back(device)
    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
    for name in plan.llms:
        sizes = random_llm.sizes_of(name, plan.random_weights)
        source = name
        if is_random := random_llm.is_random(name, plan.random_weights):
            source = str(folder / "llm")
            on_note(f"{name} is written with random weights")
            random_llm.write(Path(source), sizes, device, dtype)
            _give_back(device)
        for tokens in plan.tokens:
            case = Case(name, sizes, source, tokens)
            encodes = not any(row["metric"] == "encode" for row in found.rows)
            measured = _measure_case(folder, plan, data, case, encodes, end, on_note)
            found.rows += rows_of(plan, case, measured)
            found.failed |= {
                f"{loop}, {name}, {tokens} tokens": why for loop, why in measured.failed.items()
            }
            on_rows(found.rows)
        if is_random:
            for file in Path(source).iterdir():
                file.unlink()
            Path(source).rmdir()
    return found


# ------------------------------------------------------------------------------------- one case


def _measure_case(
    folder: Path,
    plan: StepPlan,
    data: StepData,
    case: Case,
    encodes: bool,
    end: float,
    on_note: Callable[[str], None],
) -> Measured:
    """Raises as `measure`."""
    measured = Measured()
    where = f"{case.llm}, {case.tokens} visual tokens"
    with ExitStack() as stack:
        spec = _spec(folder, plan, data, case)
        open_loops = {
            name: stack.enter_context(_opened(plan, place, spec))
            for name, place in plan.loops.items()
        }
        place, yardstick = "align.bench.yardsticks:Matmul", (plan.device, plan.precision)
        matmul = stack.enter_context(_opened(plan, place, *yardstick))

        def each(work: Callable[[str, Server], None], names: Sequence[str] | None = None) -> None:
            """One after the other; a loop that fails is told of and dropped."""
            for name in list(open_loops) if names is None else names:
                with _dropping(name, open_loops, measured, on_note):
                    work(name, open_loops[name])

        step_s: dict[str, float] = {}

        def begin(name: str, loop: Server) -> None:
            start = time.perf_counter()
            measured.first[name] = loop.ask("first")
            step_s[name] = time.perf_counter() - start
            on_note(f"{where}: {name}: first loss {measured.first[name].loss:.6f}")

        def tune(name: str, loop: Server) -> None:
            size, step_s[name] = _tuned(loop, plan.batch_sizes, step_s[name])
            measured.batch_sizes[name] = size
            loop.ask("forget_peak")

        def time_pass(name: str, loop: Server) -> None:
            measured.matmul.append(matmul.ask("run", min(MATMUL_S, plan.pass_s / 2)))
            done: Pass = loop.ask("run", *_counts(plan, step_s[name], loop.ask("ahead")))
            measured.passes.setdefault(name, []).append(done)
            on_note(f"{where}: {name}: {done.samples / done.seconds:.4g} samples/s")

        each(lambda _, loop: loop.answer())  # they have opened at once: most of it is imports
        matmul.answer()
        measured.lengths = open_loops["cached"].ask("lengths")
        each(begin)
        require_same_step(measured.first, *TOLERANCES[plan.compute])
        each(tune)
        for number in range(plan.rounds):
            if number and time.monotonic() > end:
                on_note(f"{where}: {number} of {plan.rounds} rounds, as the time is up")
                break
            names = list(open_loops)
            random.Random(number).shuffle(names)
            each(time_pass, names)
        for name, loop in open_loops.items():
            measured.peak_bytes[name] = loop.ask("peak_bytes")
        if encodes and "live" in open_loops:
            live = open_loops["live"]
            measured.decode = live.ask("decode", DECODED)
            counts = _counts(plan, step_s["live"], live.ask("ahead"))
            measured.encode.append(live.ask("encode", *counts))
        for loop in (*open_loops.values(), matmul):
            loop.end()
    return measured


def _spec(folder: Path, plan: StepPlan, data: StepData, case: Case) -> LoopSpec:
    return LoopSpec(
        folder=folder,
        store=data.store,
        images=data.images,
        model=plan.model,
        overrides=plan.settings(case.source, case.tokens),
        plain_overrides=plan.settings(case.source, case.tokens, plain=True),
        compile=plan.compile,
        workers=plan.workers,
    )


@contextmanager
def _opened(plan: StepPlan, place: str, *arguments: Any) -> Iterator[Server]:
    """A process that has been told to open; its answer is still to be waited for."""
    process = (
        ChildProcess(place, serve, place, *arguments)
        if plan.apart
        else HereInstead(place, *arguments)
    )
    try:
        process.send("open")
        yield process
    finally:
        process.close()


@contextmanager
def _dropping(
    name: str,
    open_loops: dict[str, Server],
    measured: Measured,
    on_note: Callable[[str], None],
) -> Iterator[None]:
    """Within: a loop that fails is told of and closed, and the others go on; not without ours."""
    try:
        yield
    except ProviderError as error:
        if name == "cached":
            raise ProviderError(f"cached: {error}") from None
        on_note(f"{name} failed: {error}")
        measured.failed[name] = str(error)
        measured.passes.pop(name, None)
        measured.first.pop(name, None)
        open_loops.pop(name).close()


def require_same_step(
    first: Mapping[str, FirstStep], loss_tolerance: float, norm_tolerance: float
) -> None:
    """Raises StepMismatch where a loop's first step is not the cached one's.

    Tolerances are relative: what is not equal are the rounding of stored features and the kernels.
    """
    ours = first["cached"]
    for name, each in first.items():
        same = {"ids": each.ids == ours.ids, "supervised": each.supervised == ours.supervised}
        for what, tolerance in (("loss", loss_tolerance), ("grad_norm", norm_tolerance)):
            expected = getattr(ours, what)
            # False for NaN.
            same[what] = abs(getattr(each, what) - expected) <= tolerance * abs(expected)
        for what, is_same in same.items():
            if not is_same:
                raise StepMismatch(
                    f"{name}: the first step's {what}: {getattr(each, what)}, of cached "
                    f"{getattr(ours, what)}; they do not compute the same, so nothing is reported"
                )


def _tuned(loop: Server, sizes: Sequence[int], step_s: float) -> tuple[int, float]:
    """The fastest of the batch sizes for a loop, and the seconds that a step then takes.

    step_s: of the first step, which was of the first size.
    """
    if len(sizes) == 1:
        if step_s < QUICK_STEP_S:
            step_s = loop.ask("run", 0, 1).seconds
        return sizes[0], step_s
    best: tuple[float, int, float] | None = None
    for size in sizes:
        loop.ask("batch_size", size)
        try:
            step_s = loop.ask("run", 1, 1).seconds
            done: Pass = loop.ask("run", 0, max(1, round(TUNE_S / step_s)))
        except ProviderError:  # it does not fit, nor would more
            if best is None:
                raise
            break
        rate = done.samples / done.seconds
        if best is not None and rate < best[0]:
            break
        best = (rate, size, done.seconds / done.steps)
    assert best is not None
    loop.ask("batch_size", best[1])
    return best[1], best[2]


def _counts(plan: StepPlan, step_s: float, ahead: int) -> tuple[int, int]:
    """(untimed, timed) steps of a pass. ahead: batches that may be ready when it begins, because
    nothing was trained on meanwhile: where steps are short, these are not timed."""
    warm = int(plan.warm_s / step_s)
    return max(warm, ahead) if warm else 0, max(plan.steps, math.ceil(plan.pass_s / step_s))


def _give_back(device: torch.device) -> None:
    """Memory of a GPU that this process has used and the loops will need."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------- rows


def sample_flop(plan: StepPlan, case: Case, lengths: Sequence[tuple[int, int]]) -> float:
    """Operations of a cached step a sample: the language model's and the connector's."""
    entry = plan.encoder
    llm = statistics.fmean(case.sizes.frozen_step_flop(*length) for length in lengths)
    connector = plan.config("tiny", case.tokens).connector
    tower = (entry.num_patches, entry.width)
    return llm + connector_step_flop(connector, [tower], case.sizes.hidden_size)


def rows_of(plan: StepPlan, case: Case, measured: Measured) -> list[dict[str, Any]]:
    """Result rows of a case; what bounds a figure stands beside it as its ceiling."""
    entry = plan.encoder
    cached_flop = sample_flop(plan, case, measured.lengths)
    encode_flop = entry.tflop * 1e12
    tokens, supervised = (float(n) for n in np.mean(measured.lengths, axis=0))
    matmul = statistics.median(measured.matmul)
    common: dict[str, Any] = {
        "model": plan.model,
        "llm": case.llm,
        "llm_weights": "random" if case.source != case.llm else "its own",
        "connector": plan.config("tiny", case.tokens).connector.name,
        "visual_tokens": case.tokens,
        "text_tokens": round(tokens - case.tokens, 1),
        "supervised_tokens": round(supervised, 1),
        "precision": plan.precision,
        "device": _device_name(plan.device),
        "threads": torch.get_num_threads(),
        "compile": plan.compile,
        "images": plan.images,
        "workers": plan.workers,
        "overrides": list(plan.overrides),
    }
    found: list[dict[str, Any]] = []

    def add(
        provider: str,
        metric: str,
        unit: str,
        values: Sequence[float],
        ceiling: float | None = None,
        **more: Any,
    ) -> None:
        found.append(
            results.row(
                provider, metric, unit, values, ceiling=ceiling, config=common | more,
                packages=("transformers", "pillow"),
            )
        )  # fmt: skip

    add(MATMUL, "rate", "TFLOP/s", [rate / 1e12 for rate in measured.matmul])
    in_order = {name: measured.passes[name] for name in plan.loops if name in measured.passes}
    for name, passes in in_order.items():
        flop = cached_flop + (0 if name == "cached" else encode_flop)
        of = {"batch": measured.batch_sizes[name], "steps": passes[-1].steps}
        rates = [each.samples / each.seconds for each in passes]
        add(name, "rate", "samples/s", rates, matmul / flop, **of)
        add(name, "throughput", "tokens/s", [r * tokens for r in rates], **of)
        add(name, "data wait", "ratio", [each.waited_s / each.seconds for each in passes], **of)
        add(name, "peak memory", "MB", [measured.peak_bytes[name] / 1e6], **of)
        add(name, "operations", "GFLOP/sample", [flop / 1e9], **of)
        add(name, "MFU", "ratio", [r * flop / matmul for r in rates], 1.0, **of)
        joules = [each.joules / each.samples for each in passes if each.joules is not None]
        if joules:
            add(name, "energy", "J/sample", joules, **of)
        first = measured.first[name]
        add(name, "first loss", "nats/token", [first.loss], **of)
        add(name, "first gradient norm", "nats/token", [first.grad_norm], **of)
    # In the rows of the ratios the ceiling is what operations alone would give: of the cached loop
    # without its own losses.
    predicted = (cached_flop + encode_flop) / cached_flop
    ours = measured.passes["cached"]
    for name, passes in in_order.items():
        if name != "cached":
            ratios = [
                (a.samples / a.seconds) / (b.samples / b.seconds)
                for a, b in zip(ours, passes, strict=True)
            ]
            add("cached", f"over {name}", "ratio", ratios, predicted)
    if measured.encode:
        rates = [each.samples / each.seconds for each in measured.encode]
        add("live", "encode", "images/s", rates, matmul / encode_flop)
    if measured.decode is not None:
        add("live", "decode", "images/s a core", [measured.decode], cores=num_cores())
    return found


def _device_name(device: str) -> str:
    resolved = resolve_device(device)
    return torch.cuda.get_device_name(resolved) if resolved.type == "cuda" else "cpu"
