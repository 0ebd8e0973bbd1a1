"""Off-policy estimates against enumeration, against plain loops, and what must always hold."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.experiment import offpolicy
from registry.experiment.offpolicy import effective_sample_size
from registry.experiment.statistics import Estimate

# A bandit of 2 contexts and 3 actions: their chances, both policies, rewards, and a wrong model of these.
CONTEXTS = (0.3, 0.7)
LOGGING = ((0.5, 0.3, 0.2), (0.1, 0.6, 0.3))
TARGET = ((0.2, 0.2, 0.6), (0.7, 0.3, 0.0))
REWARDS = ((1.0, 0.0, 0.5), (0.25, 0.75, 0.0))
WRONG = ((0.1, 0.9, 0.4), (0.6, 0.2, 0.3))
VALUE = sum(
    chance * sum(p * r for p, r in zip(pi, rewards, strict=True))
    for chance, pi, rewards in zip(CONTEXTS, TARGET, REWARDS, strict=True)
)
CELLS = list(itertools.product(range(2), range(3)))


def row(context: int, action: int, model: Any = WRONG) -> tuple[float, float, float, float]:
    """w, r, q_chosen, q_pi of one row."""
    q_pi = sum(p * q for p, q in zip(TARGET[context], model[context], strict=True))
    w = TARGET[context][action] / LOGGING[context][action]
    return w, REWARDS[context][action], model[context][action], q_pi


def value_of(estimate: Estimate | None) -> float:
    assert estimate is not None
    return estimate.value


def test_ips_and_doubly_robust_are_unbiased_over_every_possible_log() -> None:
    expected = {"ips": 0.0, "dr": 0.0, "contrast": 0.0, "logged": 0.0}
    users = np.array([0, 1])
    for cells in itertools.product(CELLS, repeat=2):
        chance = math.prod(CONTEXTS[x] * LOGGING[x][a] for x, a in cells)
        w, r, q, q_pi = np.array([row(*cell) for cell in cells]).T
        expected["ips"] += chance * value_of(offpolicy.ips(w, r, users))
        expected["dr"] += chance * value_of(offpolicy.doubly_robust(w, r, q, q_pi, users))
        expected["logged"] += chance * value_of(offpolicy.mean(r, users))
        expected["contrast"] += chance * value_of(offpolicy.doubly_robust_contrast(w, r, q, q_pi, users, 0.9))
    logged = sum(CONTEXTS[x] * LOGGING[x][a] * REWARDS[x][a] for x, a in CELLS)
    assert expected["ips"] == pytest.approx(VALUE, rel=1e-12)
    assert expected["dr"] == pytest.approx(VALUE, rel=1e-12)
    assert expected["logged"] == pytest.approx(logged, rel=1e-12)
    assert expected["contrast"] == pytest.approx(VALUE - 0.9 * logged, rel=1e-12)


def test_doubly_robust_is_exact_where_the_reward_model_is() -> None:
    for cells in itertools.product(CELLS, repeat=2):
        w, r, q, q_pi = np.array([row(*cell, model=REWARDS) for cell in cells]).T
        true = [sum(p * r for p, r in zip(TARGET[x], REWARDS[x], strict=True)) for x, _ in cells]
        estimate = offpolicy.doubly_robust(w, r, q, q_pi, np.array(["u", "v"]))
        assert value_of(estimate) == pytest.approx(sum(true) / 2, rel=1e-12)


def users_log(random: np.random.Generator, users: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Users with 1 to 12 rows each, who click never or twice as often: rows of a user resemble each other."""
    counts = random.integers(1, 13, users)
    of = np.repeat(np.arange(users), counts)
    context = (random.random(users) < CONTEXTS[1]).astype(int)[of]
    draws = random.random(len(of))
    action = (draws[:, None] >= np.cumsum(np.array(LOGGING)[context], axis=1)[:, :2]).sum(1)
    w, r, q, q_pi = np.array([row(x, a) for x, a in zip(context.tolist(), action.tolist(), strict=True)]).T
    return w, r * (2 * random.integers(0, 2, users))[of], q, q_pi, of


@pytest.mark.parametrize("name", ["ips", "snips", "doubly_robust"])
def test_nine_tenths_of_the_intervals_hold_the_true_value(name: str) -> None:
    random = np.random.default_rng(11)
    covered, runs = 0, 600
    for _ in range(runs):
        w, r, q, q_pi, of = users_log(random, 80)
        model = (q, q_pi) if name == "doubly_robust" else ()
        estimate = getattr(offpolicy, name)(w, r, *model, of)
        low, high = offpolicy.interval(estimate, 0.05)
        covered += low <= VALUE <= high
    # Binomial: 0.9 +- 0.05 is four standard deviations. Rows taken as independent: 0.62 to 0.7.
    assert 0.85 <= covered / runs <= 0.95


Row = st.tuples(
    st.floats(0, 50, allow_subnormal=False), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1),
    st.integers(0, 4),
)  # fmt: skip
Log = st.lists(Row, min_size=2, max_size=30)


def arrays(rows: list[Any]) -> tuple[np.ndarray[Any, Any], ...]:
    w, r, q, q_pi, users = (np.array(column) for column in zip(*rows, strict=True))
    return w.astype(float), r.astype(float), q.astype(float), q_pi.astype(float), users


def loops(numbers: list[float], weights: list[float], users: list[int]) -> tuple[float, float] | None:
    """sum n / sum d and its variance, user by user, without arrays."""
    names = sorted(set(users))
    top, bottom = math.fsum(numbers), math.fsum(weights)
    if len(names) < 2 or bottom <= 0:
        return None
    value = top / bottom
    squares = 0.0
    for name in names:
        residual = 0.0
        for number, weight, user in zip(numbers, weights, users, strict=True):
            if user == name:
                residual += (number - value * weight) / bottom
        squares += residual**2
    return value, len(names) / (len(names) - 1) * squares


@given(Log)
def test_every_estimate_is_that_of_plain_loops(rows: list[Any]) -> None:
    w, r, q, q_pi, users = arrays(rows)
    of = [row[4] for row in rows]
    one = [1.0] * len(rows)
    estimates = {
        "ips": offpolicy.ips(w, r, users),
        "clipped": offpolicy.clipped_ips(w, r, users, 5.0),
        "snips": offpolicy.snips(w, r, users),
        "dr": offpolicy.doubly_robust(w, r, q, q_pi, users),
        "contrast": offpolicy.doubly_robust_contrast(w, r, q, q_pi, users, 0.9),
        "mean": offpolicy.mean(r, users),
    }
    loop_sums = {
        "ips": loops([w * r for w, r, _, _, _ in rows], one, of),
        "clipped": loops([min(w, 5.0) * r for w, r, _, _, _ in rows], one, of),
        "snips": loops([w * r for w, r, _, _, _ in rows], [w for w, *_ in rows], of),
        "dr": loops([p + w * (r - q) for w, r, q, p, _ in rows], one, of),
        "contrast": loops([p + w * (r - q) - 0.9 * r for w, r, q, p, _ in rows], one, of),
        "mean": loops([r for _, r, _, _, _ in rows], one, of),
    }
    for name, estimate in estimates.items():
        expected = loop_sums[name]
        assert (estimate is None) == (expected is None), name
        if estimate is not None and expected is not None:
            assert estimate.value == pytest.approx(expected[0], rel=1e-9, abs=1e-9), name
            assert estimate.variance == pytest.approx(expected[1], rel=1e-6, abs=1e-9), name


@given(Log)
def test_snips_stays_within_the_rewards_and_clipping_only_takes_away(rows: list[Any]) -> None:
    w, r, _, _, users = arrays(rows)
    inside = offpolicy.snips(w, r, users)
    if inside is not None:
        assert r.min() - 1e-9 <= inside.value <= r.max() + 1e-9
    full, cut = offpolicy.ips(w, r, users), offpolicy.clipped_ips(w, r, users, 2.0)
    loose = offpolicy.clipped_ips(w, r, users, 50.0)
    if full is not None and cut is not None:
        assert cut.value <= full.value + 1e-12
        assert loose == full


@given(Log)
def test_the_logging_policy_itself_has_the_value_that_was_logged(rows: list[Any]) -> None:
    _, r, q, _, users = arrays(rows)
    w = np.ones(len(rows))
    own = offpolicy.mean(r, users)
    for estimate in (
        offpolicy.ips(w, r, users), offpolicy.snips(w, r, users), offpolicy.clipped_ips(w, r, users, 1.0),
        offpolicy.doubly_robust(w, r, q, q, users),
    ):  # fmt: skip
        assert (estimate is None) == (own is None)
        if estimate is not None and own is not None:
            assert estimate.value == pytest.approx(r.mean(), abs=1e-12)
            assert estimate.variance == pytest.approx(own.variance, rel=1e-6, abs=1e-12)
    assert effective_sample_size(w) == pytest.approx(len(rows))


@given(Log)
def test_without_a_reward_model_doubly_robust_is_ips(rows: list[Any]) -> None:
    w, r, _, _, users = arrays(rows)
    nothing = np.zeros(len(rows))
    assert offpolicy.doubly_robust(w, r, nothing, nothing, users) == offpolicy.ips(w, r, users)


@given(Log, st.randoms(use_true_random=False))
def test_the_order_of_rows_and_the_names_of_users_do_not_matter(rows: list[Any], random: Any) -> None:
    shuffled = rows[:]
    random.shuffle(shuffled)
    renamed = {0: "d", 1: "b", 2: "a", 3: "e", 4: "c"}
    w, r, q, q_pi, users = arrays(rows)
    v, s, p, p_pi, others = arrays(shuffled)
    names = np.array([renamed[user] for user in others.tolist()])
    for one, other in (
        (offpolicy.snips(w, r, users), offpolicy.snips(v, s, names)),
        (offpolicy.doubly_robust(w, r, q, q_pi, users), offpolicy.doubly_robust(v, s, p, p_pi, names)),
    ):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.value == pytest.approx(other.value, rel=1e-9, abs=1e-9)
            assert one.variance == pytest.approx(other.variance, rel=1e-6, abs=1e-9)
    assert effective_sample_size(w) == pytest.approx(effective_sample_size(v))


# Down to 1e-290: below, another unit makes a weight a subnormal number, or none.
@given(st.lists(st.just(0.0) | st.floats(1e-290, 1e300), max_size=30), st.floats(1e-3, 1e3))
def test_the_effective_sample_size_is_at_most_the_rows_and_has_no_unit(w: list[float], unit: float) -> None:
    size = effective_sample_size(np.array(w))
    assert 0.0 <= size <= len(w) + 1e-9
    assert size == 0.0 or size >= 1 - 1e-9
    assert effective_sample_size(np.array(w) * unit) == pytest.approx(size, rel=1e-6)


def test_one_row_that_counts_for_all_is_one_sample() -> None:
    assert effective_sample_size(np.array([1e200, 1.0, 2.0])) == pytest.approx(1.0)
    assert effective_sample_size(np.array([3.0, 3.0, 0.0])) == pytest.approx(2.0)
