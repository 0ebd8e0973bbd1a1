"""Which data are fit to be judged."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from registry.experiment import data_quality
from registry.experiment.statistics import ArmSums

HALVES = {"a": 0.5, "b": 0.5}


@given(st.integers(0, 3000), st.integers(0, 3000), st.floats(0.05, 0.95))
def test_the_factor_is_the_ratio_of_two_published_likelihoods(a, b, share):
    weights = {"a": share, "b": 1 - share}
    prior = stats.betabinom.logpmf(a, a + b, 100 * share, 100 * (1 - share))
    null = stats.binom.logpmf(a, a + b, share)
    assert data_quality.log_bayes_factor({"a": a, "b": b}, weights) == pytest.approx(prior - null, abs=1e-6)


def test_three_arms_are_the_dirichlet_multinomial():
    users, weights = {"a": 430, "b": 290, "c": 300}, {"a": 0.4, "b": 0.3, "c": 0.3}
    counts, shares = list(users.values()), np.array(list(weights.values()))
    prior = stats.dirichlet_multinomial.logpmf(counts, 100 * shares, sum(counts))
    null = stats.multinomial.logpmf(counts, sum(counts), shares)
    assert data_quality.log_bayes_factor(users, weights) == pytest.approx(prior - null)


def test_arms_of_45_and_55_percent_are_found_and_fair_ones_are_not():
    sentence = data_quality.sample_ratio_mismatch({"a": 4500, "b": 5500}, HALVES, 0.001)
    assert "a 4500 (5000 expected), b 5500 (5000 expected)" in sentence
    assert data_quality.sample_ratio_mismatch({"a": 5030, "b": 4970}, HALVES, 0.001) == ""
    assert data_quality.sample_ratio_mismatch({"a": 45, "b": 55}, HALVES, 0.001) == ""
    # Weights count, not equality; and they need not sum to one.
    assert data_quality.sample_ratio_mismatch({"a": 4000, "b": 6000}, {"a": 4, "b": 6}, 0.001) == ""


def test_fair_splits_looked_at_again_and_again_seldom_fire():
    random = np.random.default_rng(3)
    trials, alpha = 1000, 0.05
    fired = 0
    for _ in range(trials):
        counts = random.multinomial(200, [0.4, 0.3, 0.3], 30).cumsum(axis=0)
        fired += any(
            data_quality.sample_ratio_mismatch(
                dict(zip("abc", map(int, row), strict=True)), {"a": 0.4, "b": 0.3, "c": 0.3}, alpha
            )
            for row in counts
        )
    assert 0 < fired / trials <= alpha


def test_users_of_an_arm_without_weight_are_a_mismatch():
    assert data_quality.log_bayes_factor({"a": 50, "b": 1}, {"a": 1.0, "b": 0.0}) == math.inf
    assert "b 1 (0 expected)" in data_quality.sample_ratio_mismatch(
        {"a": 50, "b": 1}, {"a": 1.0, "b": 0.0}, 0.001
    )
    assert data_quality.sample_ratio_mismatch({"a": 5}, {"a": 0.0}, 0.001) == ""
    assert data_quality.sample_ratio_mismatch({}, HALVES, 0.001) == ""


def test_an_arm_that_lost_all_its_users_is_a_mismatch():
    assert data_quality.sample_ratio_mismatch({"a": 500}, HALVES, 0.001)


@pytest.mark.parametrize(
    ("arm", "sentence"),
    [
        (ArmSums(), "has no user in a mature cohort yet"),
        (ArmSums(users=99, impressions=5000, clicks=9), "99 users and 5000 impressions"),
        (ArmSums(users=500, impressions=999, clicks=9), "500 users and 999 impressions"),
        (ArmSums(users=500, impressions=5000), "do not exist"),
        (ArmSums(users=500, impressions=5000, clicks=5001), "above 1"),
        (ArmSums(users=500, impressions=5000, clicks=50, orders=51), "above 1"),
        (ArmSums(users=500, impressions=5000, clicks=5000, orders=5000), ""),
    ],
)
def test_sums_that_give_no_rates_are_named(arm, sentence):
    reason = data_quality.unusable_reason({"x": arm}, 100, 1000)
    assert sentence in reason
    assert bool(reason) == bool(sentence)
