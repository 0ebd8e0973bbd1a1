"""The simulated trials count as the gate does, and their bot is one user."""

import numpy as np
import pytest

from benchmarks.simulated_trials import (
    BOT_IMPRESSIONS,
    LOOKS,
    Population,
    Truth,
    UserLooks,
    draw_arm,
    sums_at_looks,
    with_bot,
)
from registry.experiment.outcomes import ArmOutcomes
from registry.experiment.statistics import ArmSums, arm_sums

POPULATION = Population("p", 0.2, 0.2, 10, 6.0)
NOBODY = UserLooks(*(np.zeros(0, np.int64),) * 2, (np.zeros(0, np.int64),) * 3)


@pytest.mark.parametrize("limit", [30, 100, 10**9])
def test_sums_at_each_look_are_those_that_the_gate_makes_of_the_same_outcomes(limit: int) -> None:
    users = draw_arm(np.random.default_rng(3), POPULATION, 300, Truth(0.9, 1.1))
    counts = np.zeros((300, LOOKS, 3), np.int64)
    counts[users.user, users.look] = np.stack(users.counts, axis=1)
    outcomes = ArmOutcomes(tuple(range(LOOKS)), counts).capped(limit)
    at_looks = sums_at_looks(users.capped(limit))
    assert at_looks == [arm_sums(outcomes.up_to(look).total()) for look in range(LOOKS)]


def test_a_bot_counts_up_to_the_limit_and_in_full_without_one() -> None:
    assert sums_at_looks(with_bot(NOBODY, 500))[-1] == ArmSums(1, 500, 250, 0, 500**2, 250**2, 0, 500 * 250)
    assert sums_at_looks(with_bot(NOBODY, 10**9))[-1].impressions == BOT_IMPRESSIONS
