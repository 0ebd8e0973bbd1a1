"""Softened targets are what they say: cross-entropy against a distribution, computed the long way."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from trainer.tuning.losses import ItemBias, softmax_loss
from trainer.tuning.soft_targets import SoftTargets, code_tree, sibling_term, teacher_term

SIZES = (4, 3, 3)
FIRST = 5


def _codes(seed: int, count: int) -> torch.Tensor:
    """Up to `count` distinct SIDs as token ids, ascending."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randint(0, size, (count,), generator=generator) for size in SIZES], dim=1)
    starts = torch.tensor([FIRST, FIRST + 4, FIRST + 7])
    return drawn.unique(dim=0) + starts


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 30), st.integers(1, 20))
def test_smoothing_along_the_tree_spreads_over_codes_that_real_items_have_below_the_prefix(
    seed: int, items: int, count: int
) -> None:
    torch.manual_seed(seed)
    codes, table = _codes(seed, items), torch.randn(FIRST + sum(SIZES), 6)
    rows = torch.randint(0, len(codes), (count,))
    vectors = [torch.randn(count, 6) for _ in SIZES]
    share, expected, weights = 0.2, torch.zeros(()), torch.rand(count) + 0.1
    for level, vector in enumerate(vectors):
        logs = (vector @ table.T).log_softmax(-1)
        for at, row in enumerate(rows.tolist()):
            same = (codes[:, :level] == codes[row, :level]).all(-1)
            siblings = codes[same, level].unique()
            aim = torch.zeros(len(table))
            aim[siblings] = share / len(siblings)
            aim[codes[row, level]] += 1 - share
            expected = expected - weights[at] * (aim * logs[at]).sum() / (weights.sum() * len(SIZES))
    hard = softmax_loss(torch.cat(vectors), table, codes[rows].T.reshape(-1), weights=weights.repeat(3))
    actual = hard + share * sibling_term(vectors, codes[rows], rows, code_tree(codes), table, weights)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.floats(0.0, 1.0), st.booleans())
def test_a_teacher_takes_its_share_of_the_target(seed: int, share: float, biased: bool) -> None:
    torch.manual_seed(seed)
    queries, every = torch.randn(9, 6, requires_grad=True), torch.randn(20, 6, requires_grad=True)
    targets = torch.randint(0, 20, (9,))
    named = torch.stack([torch.randperm(20)[:4] for _ in range(9)])
    probabilities = torch.rand(9, 4).softmax(-1)
    aim = (1 - share) * F.one_hot(targets, 20).float()
    aim = aim.scatter_add(1, named, share * probabilities)
    weights = torch.rand(9) + 0.1
    # Items of the past, the last place of each query empty.
    past = torch.stack([torch.randperm(20)[:5] for _ in range(9)])
    past[:, 4] = -1
    values = torch.randn(9, 5, requires_grad=True)
    bias = ItemBias(past, values) if biased else None
    logits = queries @ every.T
    if biased:
        logits = logits.scatter_add(1, past[:, :4], values[:, :4])
    each = F.cross_entropy(logits, aim, reduction="none")
    expected = (each * weights).sum() / weights.sum()
    soft = SoftTargets(named, probabilities, share)
    hard = softmax_loss(queries, every, targets, bias=bias, weights=weights)
    actual = hard + teacher_term(queries, every, targets, soft, weights, bias)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    inputs = (queries, every, values) if biased else (queries, every)
    ours, plain = torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs)
    for gradient, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)
