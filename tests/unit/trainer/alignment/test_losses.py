"""Preference losses as functions of margins: what they equal, where they stay finite, what beta follows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from trainer.alignment.losses import DynamicBeta, mean_dpo, mean_margins, softmax_dpo

MARGIN = st.floats(-1000, 1000, allow_subnormal=False)
BETA = st.floats(0.01, 10)


def table(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Margins (B, K) in float64, and which are real."""
    most = max(map(len, rows))
    filled = [row + [7.0] * (most - len(row)) for row in rows]
    real = [[True] * len(row) + [False] * (most - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.float64), torch.tensor(real)


ROWS = st.lists(st.lists(MARGIN, min_size=1, max_size=5), min_size=1, max_size=6)


@given(st.lists(MARGIN, min_size=1, max_size=9), BETA)
def test_with_one_rejected_answer_softmax_dpo_is_dpo(margins: list[float], beta: float) -> None:
    single_margins, real = table([[margin] for margin in margins])
    torch.testing.assert_close(
        softmax_dpo(single_margins, real, beta), -F.logsigmoid(beta * single_margins[:, 0])
    )
    torch.testing.assert_close(
        mean_dpo(single_margins, real, beta), -F.logsigmoid(beta * single_margins[:, 0])
    )


@given(ROWS, BETA)
def test_softmax_dpo_is_the_cross_entropy_of_the_chosen_one_among_all(
    rows: list[list[float]], beta: float
) -> None:
    margins, real = table(rows)
    expected = []
    for row in rows:
        # Log-ratios that have these margins: the chosen one at 0, each rejected one its margin below.
        logits = beta * torch.tensor([0.0, *(-margin for margin in row)], dtype=torch.float64)
        expected.append(F.cross_entropy(logits[None], torch.tensor([0])))
    torch.testing.assert_close(softmax_dpo(margins, real, beta), torch.stack(expected))


@given(ROWS, BETA)
def test_dpo_over_several_rejected_answers_is_their_mean(rows: list[list[float]], beta: float) -> None:
    margins, real = table(rows)

    def one(margin: float) -> float:
        return math.log1p(math.exp(-abs(beta * margin))) + max(-beta * margin, 0)

    expected = [sum(map(one, row)) / len(row) for row in rows]
    torch.testing.assert_close(mean_dpo(margins, real, beta), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("loss", [softmax_dpo, mean_dpo])
@pytest.mark.parametrize("margin", [-1000.0, 1000.0])
def test_losses_and_gradients_are_finite_at_huge_margins(loss, margin: float) -> None:  # type: ignore[no-untyped-def]
    margins = torch.full((2, 3), margin, requires_grad=True)
    real = torch.tensor([[True, True, True], [True, False, False]])
    losses = loss(margins, real, 10.0)
    losses.sum().backward()
    assert bool(torch.isfinite(losses).all())
    assert margins.grad is not None
    assert bool(torch.isfinite(margins.grad).all())
    assert float(margins.grad[1, 1:].abs().max()) == 0


def test_the_gradient_of_softmax_dpo_weighs_the_rejected_ones_by_how_likely_they_are() -> None:
    margins = torch.tensor([[0.0, -3.0, 2.0]], dtype=torch.float64, requires_grad=True)
    softmax_dpo(margins, torch.ones(1, 3, dtype=torch.bool), 0.5).sum().backward()
    assert margins.grad is not None
    share = torch.softmax(-0.5 * margins.detach()[0], 0)
    torch.testing.assert_close(margins.grad[0] / margins.grad[0].sum(), share)


@given(ROWS)
def test_the_gap_of_a_pair_is_its_mean_margin(rows: list[list[float]]) -> None:
    margins, real = table(rows)
    expected = torch.tensor([sum(row) / len(row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(mean_margins(margins, real), expected)


def test_the_first_batch_is_its_own_mean_and_keeps_beta_where_it_was() -> None:
    # Published code starts its means at 0 uncorrected: its first beta is a multiple too large.
    dynamic = DynamicBeta(base=0.1)
    batch_beta = dynamic(torch.tensor([5.0, 7.0, 9.0]), training=True)
    assert dynamic.mean == pytest.approx(7.0)
    assert dynamic.deviation == pytest.approx(math.sqrt(8 / 3))
    assert batch_beta.beta == pytest.approx(0.1)
    assert bool(batch_beta.selected.all())


def test_running_figures_are_the_corrected_averages_said_by_hand() -> None:
    dynamic, batches = DynamicBeta(base=0.2, momentum=0.8, scale=0.5), [[1.0, 3.0], [4.0, 4.0], [0.0, 6.0]]
    mean = deviation = 0.0
    for step, batch in enumerate(batches, 1):
        batch_beta = dynamic(torch.tensor(batch), training=True)
        here = sum(batch) / 2
        mean = 0.8 * mean + 0.2 * here
        deviation = 0.8 * deviation + 0.2 * abs(batch[0] - batch[1]) / 2
        assert dynamic.mean == pytest.approx(mean / (1 - 0.8**step))
        assert dynamic.deviation == pytest.approx(deviation / (1 - 0.8**step))
        assert batch_beta.beta == pytest.approx(0.2 * (1 + 0.5 * (here - dynamic.mean)))


@given(st.lists(MARGIN, min_size=1, max_size=8), BETA)
def test_evaluation_moves_nothing_and_leaves_nobody_out(gap: list[float], base: float) -> None:
    dynamic = DynamicBeta(base=base, warm_steps=0)
    dynamic(torch.tensor([1.0, 2.0, 3.0]), training=True)
    before = (dynamic.mean, dynamic.deviation)
    batch_beta = dynamic(torch.tensor(gap), training=False)
    assert (dynamic.mean, dynamic.deviation) == before
    assert bool(batch_beta.selected.all())


@given(st.lists(st.lists(MARGIN, min_size=2, max_size=8), min_size=1, max_size=5), BETA)
def test_beta_stays_within_its_bound_and_some_pair_is_always_kept(
    batches: list[list[float]], base: float
) -> None:
    dynamic = DynamicBeta(base=base, warm_steps=0)
    for batch in batches:
        batch_beta = dynamic(torch.tensor(batch), training=True, generator=torch.Generator().manual_seed(1))
        assert base / 10 * (1 - 1e-9) <= batch_beta.beta <= base * 10 * (1 + 1e-9)
        assert int(batch_beta.selected.sum()) == max(1, round(0.8 * len(batch)))


def test_outliers_are_left_out_and_beta_is_of_those_that_are_kept() -> None:
    dynamic = DynamicBeta(base=0.1, warm_steps=0, momentum=0.99)
    usual = torch.linspace(-1, 1, 20)
    for _ in range(50):
        dynamic(usual, training=True, generator=torch.Generator().manual_seed(0))
    batch = usual.clone()
    batch[3], batch[11] = 500.0, -400.0
    batch_beta = dynamic(batch, training=True, generator=torch.Generator().manual_seed(2))
    assert not batch_beta.selected[3]
    assert not batch_beta.selected[11]
    expected = 0.1 * (1 + 0.6 * (float(batch[batch_beta.selected].mean()) - dynamic.mean))
    assert batch_beta.beta == pytest.approx(expected, rel=1e-4)


def test_devices_share_their_figures_and_their_beta() -> None:
    # Two devices that take turns here: what each gathers is its own batch and the other one's.
    batches = [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])]
    sent: list[list[Tensor]] = [[], []]

    def gathers(own: int, others: list[Tensor]):  # type: ignore[no-untyped-def]
        def gather(value: Tensor) -> Tensor:
            sent[own].append(value)
            other = others[len(sent[own]) - 1] if others else torch.zeros_like(value)
            return torch.cat([value, other] if own == 0 else [other, value])

        return gather

    # A first pass tells what the second device sends; its answers are thrown away.
    DynamicBeta(base=0.1, gather=gathers(1, []))(batches[1], training=True)
    second = list(sent[1])
    first_device = DynamicBeta(base=0.1, gather=gathers(0, second))
    batch_beta = first_device(batches[0], training=True)
    alone = DynamicBeta(base=0.1)
    expected = alone(torch.cat(batches), training=True)
    assert (first_device.mean, first_device.deviation) == pytest.approx((alone.mean, alone.deviation))
    assert batch_beta.beta == pytest.approx(expected.beta)
