"""Intervals: those of an independent implementation, wider where a user's answers are alike."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trainer.offline_checks.bootstrap import (
    differences,
    intervals,
    intervals_over_seeds,
    mean_over_seeds,
    relative_changes,
    relative_changes_over_seeds,
)


def test_with_one_row_a_user_the_interval_is_the_plain_bootstrap():
    values = np.random.default_rng(1).exponential(size=400)
    result = intervals(values[:, None], np.arange(400), resamples=4000)[0]
    plain = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, random_state=2)
    assert result.value == pytest.approx(values.mean())
    width = plain.confidence_interval.high - plain.confidence_interval.low
    assert result.low == pytest.approx(plain.confidence_interval.low, abs=0.08 * width)
    assert result.high == pytest.approx(plain.confidence_interval.high, abs=0.08 * width)


def test_repeating_every_answer_ten_times_adds_no_evidence():
    values = np.random.default_rng(2).random((300, 1))
    once = intervals(values, np.arange(300))[0]
    tenfold = intervals(np.repeat(values, 10, axis=0), np.repeat(np.arange(300), 10))[0]
    assert tenfold == pytest.approx(once)
    careless = intervals(np.repeat(values, 10, axis=0), np.arange(3000))[0]
    assert careless.high - careless.low < 0.4 * (once.high - once.low)


def test_a_small_gain_that_every_user_has_is_found_by_the_difference_only():
    random = np.random.default_rng(3)
    theirs = random.random((300, 1))
    ours = theirs + 0.01 + 0.01 * random.standard_normal((300, 1))
    users = np.arange(300)
    alone = intervals(ours, users)[0], intervals(theirs, users)[0]
    assert alone[0].low < alone[1].high
    gain = differences(ours, theirs, users)[0]
    assert 0.008 < gain.low < gain.value < gain.high < 0.012


def test_a_true_mean_is_covered_about_as_often_as_promised():
    random = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        users = np.repeat(np.arange(120), random.integers(1, 4, 120))
        rates = random.random(120)
        values = (random.random(len(users)) < rates[users]).astype(float)
        result = intervals(values[:, None], users, seed=trial, resamples=300)[0]
        covered += result.low <= 0.5 <= result.high
    assert 180 <= covered <= 199


@given(st.integers(1, 30), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=30)
def test_the_same_seed_gives_the_same_interval_around_the_mean(rows, figures, seed):
    random = np.random.default_rng(seed)
    values, users = random.random((rows, figures)), random.integers(0, 5, rows)
    result = intervals(values, users, seed, resamples=100)
    assert result == intervals(values, users, seed, resamples=100)
    for column, (value, low, high) in zip(values.T, result, strict=True):
        assert value == pytest.approx(column.mean())
        assert column.min() - 1e-9 <= low <= high <= column.max() + 1e-9


def test_no_answers_have_no_interval():
    assert all(np.isnan(intervals(np.zeros((0, 2)), np.zeros(0, np.int64))).ravel())


sides = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


@given(sides, st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_a_relative_change_is_never_below_minus_one_hundred_per_cent(pairs, user_count, seed):
    ours, theirs = np.array(pairs, dtype=float).T[:, :, None]
    users = np.arange(len(pairs)) % user_count
    value, low, high = relative_changes(ours, theirs, users, seed, resamples=60)[0]
    if not theirs.any():
        assert np.isnan([value, low, high]).all()
        return
    assert value == pytest.approx(ours.sum() / theirs.sum() - 1)
    assert -1 <= low <= high
    reversed_value, reversed_low, _ = relative_changes(theirs, ours, users, seed, resamples=60)[0]
    if ours.any():
        assert (1 + reversed_value) * (1 + value) == pytest.approx(1)
        assert reversed_low >= -1


@given(sides, st.integers(2, 4))
@settings(max_examples=100, deadline=None)
def test_a_relative_change_over_seeds_is_never_below_minus_one_hundred_per_cent(pairs, seeds):
    ours, theirs = np.array(pairs, dtype=float).T[:, :, None]
    random = np.random.default_rng(len(pairs))
    runs = [[np.roll(side, random.integers(5), axis=0) for _ in range(seeds)] for side in (ours, theirs)]
    value, low, high = relative_changes_over_seeds(*runs, np.arange(len(pairs)))[0]
    if theirs.any():
        assert value == pytest.approx(ours.sum() / theirs.sum() - 1)
        assert -1 <= low <= value <= high
    else:
        assert np.isnan([value, low, high]).all()


def test_a_base_of_one_user_bounds_no_rise():
    ours, theirs = np.zeros((50, 1)), np.zeros((50, 1))
    theirs[0], ours[1] = 1.0, 2.0
    value, low, high = relative_changes(ours, theirs, np.arange(50))[0]
    assert (value, low, high) == (1.0, -1.0, np.inf)


def test_the_true_ratio_is_covered_about_as_often_as_promised_though_the_base_is_uncertain():
    random, covered, covered_with_a_constant_base = np.random.default_rng(6), 0, 0
    for trial in range(300):
        users = np.arange(150)
        theirs = (random.random((150, 1)) < 0.1).astype(float)
        ours = (random.random((150, 1)) < 0.2).astype(float)
        _, low, high = relative_changes(ours, theirs, users, trial, resamples=400)[0]
        covered += low <= 1.0 <= high
        change = differences(ours, theirs, users, trial, resamples=400)[0]
        base = theirs.mean()
        covered_with_a_constant_base += change.low / base <= 1.0 <= change.high / base
    assert covered >= 0.91 * 300
    # What this function is for: a base that counts as a constant promises too much.
    assert covered_with_a_constant_base < covered


def test_values_below_zero_have_no_ratio():
    with pytest.raises(ValueError, match="0 or more"):
        relative_changes(np.array([[-1.0]]), np.array([[1.0]]), np.array([0]))


def simulated_runs(random, seeds, seed_spread, users=200):
    """Values of a model whose true mean is 0.5: users differ, and so do the seeds that it is trained from."""
    of_users = 0.3 * random.standard_normal((users, 1))
    return [
        0.5 + of_users + seed_spread * random.standard_normal() + 0.1 * random.standard_normal((users, 1))
        for _ in range(seeds)
    ]


@pytest.mark.parametrize("seed_spread", [0.0, 0.02, 0.2])
def test_an_interval_over_seeds_covers_what_other_seeds_and_users_would_give(seed_spread):
    random, users = np.random.default_rng(7), np.arange(200)
    covered = covered_by_users_alone = 0
    for trial in range(300):
        runs = simulated_runs(random, 3, seed_spread)
        _, low, high = intervals_over_seeds(runs, users)[0]
        covered += low <= 0.5 <= high
        mean = intervals(np.mean(runs, axis=0), users, trial, resamples=200)[0]
        covered_by_users_alone += mean.low <= 0.5 <= mean.high
    assert covered >= 0.92 * 300
    if seed_spread == 0.2:
        assert covered_by_users_alone < 0.5 * 300


def test_seeds_that_agree_leave_the_interval_of_the_users():
    values = np.random.default_rng(8).random((400, 1))
    over_users = intervals(values, np.arange(400), resamples=4000)[0]
    over_seeds = intervals_over_seeds([values, values, values], np.arange(400))[0]
    assert over_seeds == pytest.approx(over_users, abs=0.004)


def test_seeds_of_users_of_their_own_have_students_interval():
    means = np.array([[0.1, 3.0], [0.2, 5.0], [0.4, 4.0]])
    for column, (value, low, high) in zip(means.T, mean_over_seeds(means), strict=True):
        expected = stats.ttest_1samp(column, 0).confidence_interval(0.95)
        assert (value, low, high) == pytest.approx((column.mean(), expected.low, expected.high))
