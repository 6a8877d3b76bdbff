"""The schedule, and which parameters are decayed."""

from __future__ import annotations

import math
from itertools import pairwise
from math import inf, nan

import pytest
import torch

from align.connectors import build_connector
from align.connectors.resampler import ResamplerConfig
from align.connectors.sva import SvaConfig
from align.optim import OptimConfig, build_optimizer, lr_at, set_lr, split_by_decay
from align.trainer import update


def test_warm_up_then_cosine_to_a_tenth() -> None:
    config = OptimConfig(lr=1.0, warmup_ratio=0.1)
    rates = [lr_at(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0 == max(rates)
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert all(a > b for a, b in pairwise(rates[10:]))
    middle = 10 + 89 / 2
    assert (rates[math.floor(middle)] + rates[math.ceil(middle)]) / 2 == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs_have_rates(total: int) -> None:
    for step in range(total):
        assert 0 < lr_at(OptimConfig(), step, total) <= 1e-4


def test_decay_only_on_matrices_that_multiply() -> None:
    config = ResamplerConfig(vision_norm=True, kv_norm=True, final_norm=True, position="learned")
    connector = config.build([(9, 12)], 20)
    decayed, plain = split_by_decay(connector)
    assert {name for name in plain if plain[name].ndim > 1} == {"latents", "position"}
    assert all(p.ndim == 2 and name.endswith("weight") for name, p in decayed.items())
    assert "blocks.0.attn.in_proj_weight" in decayed
    assert len(decayed) + len(plain) == len(list(connector.parameters()))
    optimizer = build_optimizer(OptimConfig(weight_decay=0.5), connector)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_update_divides_clips_and_clears() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [weight], "lr_ratio": 1.0}], lr=1.0, fused=True)
    weight.grad = torch.tensor([30.0, 40.0])
    loss = torch.tensor(3.0)
    norm = update(optimizer, lr=1.0, tokens=5, clip=1.0, loss=loss)
    assert float(norm) == pytest.approx(10.0)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))
    assert weight.grad is None
    weight.grad = torch.tensor([30.0, 40.0])
    update(optimizer, lr=0.0, tokens=5, clip=0.0, loss=loss)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))


@pytest.mark.parametrize(("grad", "loss"), [(nan, 1.0), (inf, 1.0), (2.0, nan), (2.0, inf)])
def test_what_is_not_finite_changes_neither_weights_nor_moments(grad: float, loss: float) -> None:
    linear = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(OptimConfig(), linear)

    def step(grad: float, loss: float) -> list[torch.Tensor]:
        for parameter in linear.parameters():
            parameter.grad = torch.full_like(parameter, grad)
        update(optimizer, lr=0.1, tokens=5, clip=1.0, loss=torch.tensor(loss))
        moments = [value for p in linear.parameters() for value in optimizer.state[p].values()]
        return [each.detach().clone() for each in (*linear.parameters(), *moments)]

    before = step(2.0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, step(grad, loss), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, step(2.0, 1.0), strict=True))


def test_a_warm_up_over_the_whole_run_rises_to_its_end() -> None:
    config = OptimConfig(lr=1.0, warmup_ratio=1.0)
    rates = [lr_at(config, step, 10) for step in range(10)]
    assert rates == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert 0 < lr_at(config, 0, 1) < 1


def test_the_svas_queries_and_layers_have_a_rate_of_their_own() -> None:
    config = SvaConfig(width=16, side=2, depth=1, heads=2)
    connector = build_connector(config, [(4, 6), (16, 5)], 8)
    optimizer = build_optimizer(OptimConfig(lr=1e-3, slow_lr=1e-4), connector)
    set_lr(optimizer, 5e-4)
    rate_of = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rate_of) == len(list(connector.parameters()))
    for name, parameter in connector.named_parameters():
        is_slow = name.startswith(("core.vision_query", "core.samplers."))
        assert rate_of[parameter] == pytest.approx(5e-5 if is_slow else 5e-4), name
    same = build_optimizer(OptimConfig(lr=1e-3), connector)
    set_lr(same, 5e-4)
    assert {group["lr"] for group in same.param_groups} == {5e-4}
