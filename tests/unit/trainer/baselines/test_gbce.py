"""gBCE: the loss of the paper, and the probabilities that it is there for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from trainer.baselines.gbce import beta_of, gbce_loss


@given(st.integers(1, 500), st.integers(2, 500), st.floats(0, 1))
def test_beta_is_the_formula_of_the_paper(negatives, items, calibration):
    alpha = min(1.0, negatives / (items - 1))
    expected = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    assert beta_of(negatives, items, calibration) == pytest.approx(expected)
    assert beta_of(negatives, items, 0.0) == 1.0


@given(st.floats(0.02, 0.98), st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_full_calibration_learns_the_probability_and_none_learns_too_much(probability, negatives):
    items = 40
    # The expected loss of one item that comes next with `probability`, and is drawn as a negative otherwise.
    drawn = (1 - probability) * negatives / (items - 1)

    def learned(calibration):
        beta = beta_of(negatives, items, calibration)
        expected_loss = lambda p: -beta * probability * np.log(p) - drawn * np.log1p(-p)  # noqa: E731
        return minimize_scalar(expected_loss, bounds=(1e-6, 1 - 1e-6), method="bounded").x

    assert learned(1.0) == pytest.approx(probability, abs=1e-3)
    assert learned(0.0) >= probability - 1e-3


@pytest.mark.parametrize("calibration", [0.0, 0.75])
def test_the_loss_is_the_binary_cross_entropy_of_powered_positives(calibration):
    random = torch.Generator().manual_seed(1)
    states, items = torch.randn(3, 4, 5, generator=random), torch.randn(9, 5, generator=random)
    targets = torch.tensor([[1, 2, -1, -1], [3, -1, -1, -1], [8, 0, 4, 7]])
    torch.manual_seed(7)
    loss = gbce_loss(states, items, targets, 6, calibration)
    torch.manual_seed(7)
    sampled = torch.randint(9, (3, 6))
    losses = []
    for row, place in (targets >= 0).nonzero().tolist():
        chosen = torch.cat((targets[row, place, None], sampled[row]))
        shares = torch.sigmoid(items[chosen] @ states[row, place])
        shares[0] = shares[0] ** beta_of(6, 9, calibration)
        losses.append(F.binary_cross_entropy(shares, torch.eye(7)[0]))
    assert float(loss) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_only_positions_with_a_target_are_learned():
    states = torch.randn(2, 3, 4, requires_grad=True)
    gbce_loss(states, torch.randn(7, 4), torch.tensor([[1, -1, -1], [2, 3, -1]]), 5, 0.75).backward()
    assert states.grad.abs().sum(-1).gt(0).tolist() == [[True, False, False], [True, True, False]]
