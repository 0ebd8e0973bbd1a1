"""The fused softmax gives the loss and the gradients of the plain one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from trainer.tuning.losses import ItemBias, softmax_loss


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 600),
    st.integers(2, 40),
    st.sampled_from([0.0, 0.1]),
    st.integers(0, 6),
    st.booleans(),
    st.integers(0, 99),
)
def test_loss_and_gradients_are_those_of_the_plain_cross_entropy(
    count: int, items: int, smoothing: float, pairs: int, weighted: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    queries = torch.randn(count, 6, requires_grad=True)
    table = torch.randn(items, 6, requires_grad=True)
    targets = torch.randint(0, items, (count,))
    # Distinct items of each query, some places empty; with smoothing and without.
    places = torch.stack([torch.randperm(items)[: min(items, pairs)] for _ in range(count)])
    places = torch.where(torch.rand(places.shape) < 0.7, places, -1)
    values = torch.randn(places.shape, requires_grad=True)
    inputs = (queries, table, values) if pairs else (queries, table)
    bias = ItemBias(places, values) if pairs else None
    weights = torch.rand(count) + 0.1 if weighted else None
    actual = softmax_loss(queries, table, targets, smoothing, bias, weights)
    row, column = (places >= 0).nonzero(as_tuple=True)
    logits = (queries @ table.T).index_put((row, places[row, column]), values[row, column], accumulate=True)
    each = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    expected = each.mean() if weights is None else (each * weights).sum() / weights.sum()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    ours, plain = torch.autograd.grad(3 * actual, inputs), torch.autograd.grad(3 * expected, inputs)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_large_logits_stay_finite() -> None:
    queries = torch.full((3, 2), 1e4, requires_grad=True)
    loss = softmax_loss(queries, torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), torch.tensor([0, 1, 0]))
    loss.backward()
    assert torch.isfinite(loss)
    assert queries.grad is not None
    assert torch.isfinite(queries.grad).all()


def test_under_autocast_the_loss_is_near_the_one_in_full_precision() -> None:
    torch.manual_seed(0)
    queries, table = torch.randn(64, 32), torch.randn(100, 32)
    targets = torch.randint(0, 100, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        actual = softmax_loss(queries, table, targets)
    assert float(actual) == pytest.approx(float(F.cross_entropy(queries @ table.T, targets)), rel=0.02)


def test_rows_that_weigh_nothing_leave_a_loss_of_zero_and_no_gradient() -> None:
    queries = torch.randn(3, 4, requires_grad=True)
    loss = softmax_loss(queries, torch.randn(5, 4), torch.tensor([0, 1, 2]), weights=torch.zeros(3))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert queries.grad is not None
    assert not queries.grad.any()
