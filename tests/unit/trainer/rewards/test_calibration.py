"""Chances say how often something happens, and an item's rate has not seen what it is to tell."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.rewards.calibration import calibrate_chances, purchase_rates

RNG = np.random.default_rng(4)
NOTHING = np.zeros(0), np.zeros(0, dtype=np.int64)


def test_chances_are_calibrated_where_they_were_not_fitted() -> None:
    scores = RNG.normal(-6, 2, 20_000)
    clicked = (RNG.random(20_000) < 1 / (1 + np.exp(-(scores + 6)))).astype(np.int64)
    items = RNG.integers(0, 50, 20_000)
    often = RNG.beta(2, 5, 50)
    bought = (RNG.random(20_000) < often[items]).astype(np.int64)
    half = slice(None, 10_000)
    item_rates = purchase_rates(items[half], bought[half], 50)
    chances = calibrate_chances(
        item_rates, (scores[half], clicked[half]), (items[half], scores[half], bought[half]), min_outcomes=100
    )
    rest = slice(10_000, None)
    for predicted, outcome in (
        (chances.click(scores[rest]), clicked[rest]),
        (chances.purchase(items[rest], scores[rest]), bought[rest]),
    ):
        assert predicted is not None
        # In each fifth of what was said, as often as was said; the fifths lie apart.
        parts = np.array_split(np.argsort(predicted), 5)
        mean_predictions = np.array([predicted[part].mean() for part in parts])
        np.testing.assert_allclose(mean_predictions, [outcome[part].mean() for part in parts], atol=0.03)
        assert mean_predictions[-1] - mean_predictions[0] > 0.3


def test_an_outcome_is_taken_out_of_the_rate_that_is_to_tell_it() -> None:
    items, bought = np.array([0, 0, 0, 1, 1, 1, 1]), np.array([1, 0, 0, 0, 0, 0, 1])
    item_rates = purchase_rates(items, bought, 3)
    own = item_rates.logit(items, bought)
    for at in range(len(items)):
        left = np.arange(len(items)) != at
        others = (
            purchase_rates(items[left], bought[left], 3).clicks[items[at]],
            (items[left] == items[at]) & (bought[left] == 1),
        )
        rate = (others[1].sum() + 10 * 3 / 9) / (others[0] + 10)
        assert own[at] == pytest.approx(np.log(rate / (1 - rate)))
    # Nobody clicked the third one: its chance is that of all.
    assert item_rates.logit(np.array([2]))[0] == pytest.approx(np.log((3 / 9) / (6 / 9)))


def test_nothing_is_said_where_too_little_happened() -> None:
    scores, outcomes = np.arange(10.0), np.array([0, 1] * 5)
    none = purchase_rates(np.zeros(0, np.int64), np.zeros(0, np.int64), 4)
    few = calibrate_chances(none, (scores, outcomes), (np.zeros(0, np.int64), *NOTHING), min_outcomes=6)
    assert few.click(scores) is None
    assert few.purchase(np.zeros(10, np.int64), scores) is None
    enough = calibrate_chances(none, (scores, outcomes), (np.zeros(0, np.int64), *NOTHING), min_outcomes=5)
    assert enough.click(scores) is not None
