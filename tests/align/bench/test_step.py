"""`align bench step`, small: what a row holds, that loops agree, and who is caught."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from align.bench import break_even, random_llm, yardsticks
from align.bench.loops import LOOPS, FirstStep, Live
from align.bench.plain_loops import Plain
from align.bench.process import ProviderError
from align.bench.step import (
    TOLERANCES,
    Case,
    StepFindings,
    StepMismatch,
    StepPlan,
    measure,
    require_same_step,
    sample_flop,
)
from align.bench.step_plot import write_plot
from align.bench.step_tables import COLUMNS, break_even_tables, cases, tables
from align.config import load_config
from align.errors import ModelError
from align.flop import LanguageModel, find_language_model
from align.llm import LLMConfig, load_llm
from align.plan import Plan, Workload
from align.trainer import train
from featcache.errors import ConfigError
from featcache.registry import ENCODERS

HERE = "tests.align.bench.test_step"
SMALL = StepPlan(
    "tiny",
    tokens=(8,),
    images=6,
    rounds=2,
    steps=1,
    pass_s=0.0,
    warm_s=0.0,
    workers=0,
    apart=False,
)
ONE = replace(SMALL, rounds=1)
MLP = replace(ONE, tokens=(64,), loops=LOOPS)  # as many as the encoder has patches


class OtherImages(Live):
    """Sees the images of a batch in another order than their captions."""

    def encode_only(self, fed: object) -> Tensor:
        return super().encode_only(fed).flip(0)  # type: ignore[arg-type]


class OtherOrder(Plain):
    def first(self) -> FirstStep:
        self.done = 1
        return super().first()


class Breaks(Plain):
    """As where the memory does not suffice for a step."""

    def step(self, fed: object) -> tuple[float, float]:
        raise ProviderError("no room")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("step")


@pytest.fixture(scope="module")
def findings(folder: Path) -> StepFindings:
    return measure(folder, SMALL)


@pytest.fixture(scope="module")
def of_mlp(tmp_path_factory: pytest.TempPathFactory) -> StepFindings:
    return measure(tmp_path_factory.mktemp("mlp"), MLP)


def test_rows(findings: StepFindings, of_mlp: StepFindings) -> None:
    assert findings.failed == of_mlp.failed == {}
    for plan, rows in ((SMALL, findings.rows), (MLP, of_mlp.rows)):
        [(key, by_loop)] = cases(rows).items()
        tokens = plan.tokens[0]
        assert key == ("tiny", tokens)
        assert list(by_loop) == ["matmul", *plan.loops]
        matmul = by_loop["matmul"]["rate"]["p50"] * 1e12
        for name in plan.loops:
            of = by_loop[name]
            flop = of["operations"]["p50"] * 1e9
            assert of["rate"]["n"] == plan.rounds
            assert of["rate"]["p50"] > 0
            assert of["rate"]["ceiling"] == pytest.approx(matmul / flop)
            length = tokens + of["rate"]["config"]["text_tokens"]
            assert of["throughput"]["p50"] == pytest.approx(of["rate"]["p50"] * length, rel=0.01)
            assert of["MFU"]["p50"] == pytest.approx(of["rate"]["p50"] / of["rate"]["ceiling"])
            assert 0 <= of["data wait"]["p50"] < 1
            assert of["peak memory"]["p50"] > 0
        encoder = ENCODERS["tiny"].tflop * 1e3
        gflop = {name: by_loop[name]["operations"]["p50"] for name in plan.loops}
        assert gflop["live"] == gflop["plain"] == pytest.approx(gflop["cached"] + encoder)
        for name in set(plan.loops) - {"cached"}:
            over = by_loop["cached"][f"over {name}"]
            assert over["ceiling"] == pytest.approx(gflop[name] / gflop["cached"])
        connector = "mlp" if tokens == 64 else "resampler"
        assert by_loop["cached"]["rate"]["config"]["connector"] == connector


def test_loops_agree(findings: StepFindings, of_mlp: StepFindings) -> None:
    """Much nearer than is asked for: what is left is that the store rounds to fp16."""
    for by_loop in cases([*findings.rows, *of_mlp.rows]).values():
        loss = by_loop["cached"]["first loss"]["p50"]
        norm = by_loop["cached"]["first gradient norm"]["p50"]
        for name in set(by_loop) - {"cached", "matmul"}:
            assert by_loop[name]["first loss"]["p50"] == pytest.approx(loss, rel=2e-5)
            assert by_loop[name]["first gradient norm"]["p50"] == pytest.approx(norm, rel=2e-3)


def test_cached_is_the_training(findings: StepFindings, folder: Path) -> None:
    config = load_config(None, [*SMALL.settings("tiny", 8), "train.steps=1", "train.eval_every=0"])
    done = train(config, [folder / "store.zarr"], folder / "trained")
    first = cases(findings.rows)["tiny", 8]["cached"]["first loss"]["p50"]
    assert done.loss == pytest.approx(first, rel=1e-6)


def test_operations_are_the_mean_of_the_samples() -> None:
    case = Case("tiny", find_language_model("tiny"), "tiny", 8)
    both = sample_flop(SMALL, case, [(30, 20), (40, 10)])
    each = [sample_flop(SMALL, case, [length]) for length in ((30, 20), (40, 10))]
    assert both == pytest.approx(sum(each) / 2)
    assert each[0] < each[1]


@pytest.mark.parametrize("other", ["OtherImages", "OtherOrder"])
def test_a_loop_that_computes_something_else_is_refused(other: str, tmp_path: Path) -> None:
    loops = {"cached": LOOPS["cached"], other: f"{HERE}:{other}"}
    with pytest.raises(StepMismatch, match=f"{other}: the first step's .* nothing is reported"):
        measure(tmp_path, replace(ONE, loops=loops))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"loss": 5.01}, "loss"),
        ({"loss": float("nan")}, "loss"),
        ({"grad_norm": 1.2}, "grad_norm"),
        ({"supervised": 19}, "supervised"),
        ({"ids": ("b", "a")}, "ids"),
    ],
)
def test_every_difference_is_refused(change: dict[str, object], what: str) -> None:
    ours = FirstStep(5.0, 1.0, ("a", "b"), 20)
    require_same_step({"cached": ours, "live": ours}, *TOLERANCES["fp32"])
    other = replace(ours, **change)  # type: ignore[arg-type]
    with pytest.raises(StepMismatch, match=f"live: the first step's {what}: "):
        require_same_step({"cached": ours, "live": other}, *TOLERANCES["fp32"])


def test_a_loop_that_fails_is_told_of(tmp_path: Path) -> None:
    loops = {"cached": LOOPS["cached"], "breaks": f"{HERE}:Breaks"}
    kept = []
    found = measure(tmp_path, replace(ONE, loops=loops), on_rows=lambda rows: kept.append(rows))
    assert found.failed == {"breaks, tiny, 8 tokens": "no room"}
    assert {row["provider"] for row in found.rows} == {"cached", "matmul"}
    assert kept == [found.rows]


def test_each_loop_takes_its_best_batch_size_and_rounds_end_in_time(tmp_path: Path) -> None:
    plan = replace(SMALL, batch_sizes=(2, 4), loops={"cached": LOOPS["cached"]}, limit_s=0.0)
    [row] = [row for row in measure(tmp_path, plan).rows if row["metric"] == "MFU"]
    assert row["config"]["batch"] in (2, 4)
    assert row["n"] == 1 < plan.rounds


def test_settings_of_ours_do_not_reach_plain() -> None:
    plan = replace(SMALL, overrides=("connector.depth=1", "train.read_threads=1"))
    assert "train.read_threads=1" in plan.settings("tiny", 8)
    assert plan.settings("tiny", 8, plain=True)[-1] == "connector.depth=1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "dinov2-small"}, "--model dinov2-small: the plain loop is written for SigLIP"),
        ({"batch_sizes": (8,)}, "--batch-size 8: more than the 6 images"),
        ({"loops": LOOPS}, "--loops llava: has the MLP, which makes 64 tokens of an image"),
        ({"loops": {"live": LOOPS["live"]}}, "cached is what the others are compared with"),
        ({"overrides": ("train.stops=1",)}, "train.stops: no such field"),
    ],
)
def test_wrong_plans(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **change)  # type: ignore[arg-type]


def test_break_even_by_the_measured_rates() -> None:
    def row(provider: str, metric: str, p50: float) -> dict[str, object]:
        config = {"llm": "tiny", "visual_tokens": 64}
        return {"provider": provider, "metric": metric, "p50": p50, "config": config}

    rows = [row("cached", "rate", 100), row("live", "rate", 20), row("plain", "rate", 10)]
    assert break_even.measured(rows) == []
    found = break_even.measured([*rows, row("live", "encode", 25)])
    # Of an image: 40 ms of extraction; an epoch saves 50 - 10 ms, and 100 - 10.
    assert [each.against for each in found] == ["live", "plain"]
    assert [each.epochs for each in found] == pytest.approx([1.0, 40 / 90])
    assert [each.gain for each in found] == pytest.approx([5.0, 10.0])
    slower = break_even.measured([*rows, row("live", "encode", 25), row("cached", "rate", 15)])
    assert slower[0].epochs is None


def test_break_even_of_every_size(findings: StepFindings) -> None:
    machine = break_even.machine_of(findings.rows)
    assert machine is not None
    assert machine.train_efficiency > 0 and machine.encode_efficiency > 0
    planned = break_even.planned(findings.rows)
    llms, tokens = len(break_even.PLANNED_LLMS), len(break_even.PLANNED_TOKENS)
    assert len(planned) == llms * tokens * len(break_even.DECODING)
    text = findings.rows[0]["config"]["text_tokens"]
    workload = Workload(
        encoder=ENCODERS["tiny"],
        llm=find_language_model("qwen3-0.6b"),
        images=break_even.PLANNED_IMAGES,
        text_tokens=round(text),
        supervised_tokens=20,
    )
    [ours] = [
        each
        for each in planned
        if (each.llm, each.visual_tokens, each.against) == ("Qwen3-0.6B", 64, "as here")
    ]
    assert ours.gain == pytest.approx(Plan(workload, machine).gain, rel=0.01)
    measured = break_even.measured(findings.rows)
    assert len(break_even_tables(measured, planned)) == 2


def test_tables_and_plot(findings: StepFindings, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    [first] = tables(findings.rows)
    assert "tiny, 8 visual + 30 text tokens, resampler, fp32 on cpu" in first.title
    assert [line[0] for line in first.rows] == ["cached", "live", "plain"]
    assert all(len(line) == len(COLUMNS) for line in first.rows)
    write_plot(findings.rows, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="no rows"):
        write_plot([], tmp_path / "none.png")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_llm(tmp_path: Path, dtype: torch.dtype) -> None:
    sizes = LanguageModel("small", 64, 2, 4, 2, 16, 96, 500)
    device = torch.device("cpu")
    for name in ("a", "b"):
        random_llm.write(tmp_path / name, sizes, device, dtype)
    llm = load_llm(LLMConfig(name=str(tmp_path / "a")), device, dtype)
    assert replace(find_language_model(str(tmp_path / "a")), name="small") == sizes
    table = sizes.vocab_size * sizes.hidden_size
    matrices = sum(p.numel() for p in llm.model.parameters() if p.ndim == 2)
    assert matrices == sizes.block_parameters + table
    again = load_llm(LLMConfig(name=str(tmp_path / "b")), device, dtype)
    assert torch.equal(llm.head, again.head) and llm.head.dtype == dtype
    huge = replace(sizes, num_layers=10**9)
    with pytest.raises(ConfigError, match=r"--llm small: its weights take .* give another --dir"):
        random_llm.write(tmp_path / "c", huge, device, dtype)


def test_which_llms_are_random() -> None:
    assert random_llm.sizes_of("mid", False) is random_llm.MID
    assert random_llm.sizes_of("qwen3-0.6b", True).name == "Qwen3-0.6B"
    assert not random_llm.is_random("tiny", True)
    with pytest.raises(ModelError, match="--llm Qwen3-8B: give --random-weights"):
        random_llm.sizes_of("Qwen3-8B", False)


def test_joules_of_the_cpu(tmp_path: Path) -> None:
    assert yardsticks._cpu_meter(tmp_path) is None
    package, core = tmp_path / "intel-rapl:0", tmp_path / "intel-rapl:0:0"
    for zone, microjoules in ((package, 900_000), (core, 5)):
        zone.mkdir()
        (zone / "max_energy_range_uj").write_text("999999\n")
        (zone / "energy_uj").write_text(f"{microjoules}\n")
    joules = yardsticks._cpu_meter(tmp_path)
    assert joules is not None
    assert joules() == 0
    (package / "energy_uj").write_text("100000\n")  # over its limit once
    assert joules() == pytest.approx(0.2)


def test_matmul() -> None:
    assert yardsticks.Matmul("cpu", "fp32").run(0.0) > 1e8


@pytest.mark.slow
def test_each_in_a_process_of_its_own(tmp_path: Path) -> None:
    """With workers, and a language model that is written for it."""
    plan = replace(ONE, llms=("mid",), apart=True, workers=1)
    found = measure(tmp_path, plan)
    assert found.failed == {}
    rows = {(row["provider"], row["metric"]): row for row in found.rows}
    assert rows["plain", "peak memory"]["p50"] > rows["cached", "peak memory"]["p50"]
    assert json.dumps(found.rows)
    assert not (tmp_path / "llm").exists()
