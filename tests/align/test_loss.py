"""The chunked loss against torch's cross-entropy over whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import align.loss
from align.loss import linear_cross_entropy


@pytest.mark.parametrize(("N", "H", "V"), [(1, 8, 5), (7, 16, 33), (123, 64, 512), (256, 32, 1001)])
@pytest.mark.parametrize("rows", [1, 5, 10_000])
def test_equals_full_logits(
    monkeypatch: pytest.MonkeyPatch, N: int, H: int, V: int, rows: int
) -> None:
    monkeypatch.setattr(align.loss, "CHUNK_BYTES", rows * V * 4)
    torch.manual_seed(N)
    hidden = torch.randn(N, H, requires_grad=True)
    weight, targets = torch.randn(V, H), torch.randint(0, V, (N,))
    loss = linear_cross_entropy(hidden, weight, targets)
    (3 * loss).backward()
    exact = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ weight.double().T, targets, reduction="sum")
    (3 * expected).backward()
    assert hidden.grad is not None and exact.grad is not None
    # Measured worst case: 2.2e-7 of the loss, 2.1e-5 of gradients whose largest element is 19.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=0, atol=5e-5)


def test_bfloat16_sums_in_fp32() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, dtype=torch.bfloat16, requires_grad=True)
    weight, targets = torch.randn(512, 64, dtype=torch.bfloat16), torch.randint(0, 512, (300,))
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    logits = (hidden @ weight.T).float()
    assert loss.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(
        loss, F.cross_entropy(logits, targets, reduction="sum"), rtol=1e-6, atol=0
    )


def test_no_gradient_work_where_none_is_asked_for() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(16, 8)
    assert not linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.long)).requires_grad


def test_nothing_supervised_is_zero() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(16, 8), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
