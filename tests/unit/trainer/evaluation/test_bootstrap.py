"""Intervals: those of an independent implementation, wider where a user's answers are alike."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trainer.evaluation.bootstrap import differences, intervals


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
