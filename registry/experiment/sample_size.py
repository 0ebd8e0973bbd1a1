"""How many users a trial needs before it starts, and how likely it is to promote with fewer.

A promotion takes every condition of the whole judgement: three tests against the other challenger, three
against the champion, the estimate of CTR against the anchor. The chance of a promotion is at least the
product of their chances: they share arms and orders, and what rises together passes together more often than
what is independent (Slepian 1962, for normal estimates none of which correlate negatively).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from registry.arms import CHAMPION, SFT
from registry.experiment import sequential, statistics
from registry.experiment.gate import settings_against
from registry.settings import GateSettings
from streams.errors import SidstreamError

_MAX_USERS = 10**12


@dataclass(frozen=True)
class ExpectedRates:
    """The expected rates of a trial: the control's rates, the relative changes of CVR and of CTR.

    The better challenger has these changes against the champion and against the other challenger.
    `impressions_per_user`: of a user who comes within the trial. `design_effect`: the user-clustered variance
    over that of independent impressions and clicks, of the metric where it is largest.
    """

    cvr: float
    lift: float
    ctr: float = 0.05
    impressions_per_user: float = 7.0
    design_effect: float = 1.2
    ctr_change: float = 0.0

    @property
    def opm_lift(self) -> float:
        """Relative change of orders per impression."""
        return (1.0 + self.lift) * (1.0 + self.ctr_change) - 1.0

    def __post_init__(self) -> None:
        for name, value, valid, requirement in (
            ("cvr", self.cvr, 0 < self.cvr < 1, "between 0 and 1"),
            (
                "lift",
                self.lift,
                self.lift > 0 and self.cvr * (1 + self.lift) < 1,
                "above 0, CVR with it below 1",
            ),
            ("ctr", self.ctr, 0 < self.ctr < 1, "between 0 and 1"),
            ("impressions-per-user", self.impressions_per_user, self.impressions_per_user > 0, "above 0"),
            (
                "ctr-change",
                self.ctr_change,
                self.ctr_change > -1 and self.ctr * (1 + self.ctr_change) < 1 and self.opm_lift > 0,
                "small enough that more is ordered per impression than without it, CTR with it below 1",
            ),
            ("design-effect", self.design_effect, self.design_effect > 0, "above 0"),
        ):
            if not valid:
                raise SidstreamError(f"{name} is {value}: it must be {requirement}")


@dataclass(frozen=True)
class TrialArms:
    """How many challengers are on trial, and the hold-out's users for each user of the smallest arm."""

    challengers: int = 2
    anchor: float = 0.0


def power(users: float, expected: ExpectedRates, settings: GateSettings, mode: str, arms: TrialArms) -> float:
    """A lower bound of the chance that the gate promotes at one look with `users` in each arm.

    One test passes with probability Phi(theta / sqrt(V) - c), c its critical value: the normal quantile in
    mode fixed, the boundary of the confidence sequence at that V in mode sequential, 0 for an estimate. There
    earlier looks add to it, so the figure is on the safe side. All pass with the product at least. 0 where an
    arm is too small for the gate.
    """
    if not _is_large_enough(users * min(arms.anchor or 1.0, 1.0), expected, settings):
        return 0.0
    tests = _tests(expected, settings, mode, arms)
    return math.prod(_pass_probability(users, test, settings) for test in tests)


def anchor_power(users: float, expected: ExpectedRates, settings: GateSettings, arms: TrialArms) -> float:
    """The chance that the hold-out does not stop such a candidate, with `users` in each arm.

    1 where there is no hold-out, 0 where it is too small for the gate.
    """
    if arms.anchor and not _is_large_enough(users * arms.anchor, expected, settings):
        return 0.0
    return math.prod(
        _pass_probability(users, test, settings) for test in _anchor_tests(expected, settings, arms)
    )


def _is_large_enough(users: float, expected: ExpectedRates, settings: GateSettings) -> bool:
    shown = users * expected.impressions_per_user
    return users >= settings.min_users and shown >= settings.min_impressions


def users_needed(
    expected: ExpectedRates, settings: GateSettings, mode: str, arms: TrialArms, target_power: float = 0.9
) -> int:
    """The smallest number of users in each arm with which `power` is at least `target_power`, by bisection.

    Raises SidstreamError for a power that no trial has, and where no number of users would do.
    """
    if not 0 < target_power < 1:
        raise SidstreamError(f"power is {target_power}: it must be between 0 and 1")
    return _smallest_users(lambda users: power(users, expected, settings, mode, arms) >= target_power)


def power_curve(
    users: int,
    expected: ExpectedRates,
    settings: GateSettings,
    mode: str,
    arms: TrialArms,
    steps: int = 8,
) -> list[tuple[int, float]]:
    """(users in each arm, power) from a quarter of `users` to twice as many."""
    return [
        (n, power(n, expected, settings, mode, arms))
        for n in (math.ceil(users * 2 * step / steps) for step in range(1, steps + 1))
    ]


def power_curve_text(points: list[tuple[int, float]], width: int = 40) -> str:
    """The power curve as text: one row a size, with a bar."""
    digits = max(len(f"{users:,}") for users, _ in points)
    return "\n".join(
        f"  {users:>{digits},}  {value:4.0%}  {'#' * round(value * width)}" for users, value in points
    )


@dataclass(frozen=True)
class _Test:
    theta: float  # the true contrast
    variance: float  # of the contrast's estimate, times users in each arm
    rate: float  # the control's, for the mixture's scale
    mode: str  # sequential, fixed, or point for an estimate
    alpha: float


def _tests(expected: ExpectedRates, settings: GateSettings, mode: str, arms: TrialArms) -> Iterator[_Test]:
    """The tests and estimates that a promotion takes."""
    for control in (SFT, CHAMPION)[2 - arms.challengers :]:
        alpha = settings_against(control, arms.challengers, settings).alpha
        for rate, change, units, margin in _metrics(expected, settings.margin):
            yield _test(rate, change, units, margin, expected.design_effect, 1.0, mode, alpha)
    yield from _anchor_tests(expected, settings, arms)


def _anchor_tests(expected: ExpectedRates, settings: GateSettings, arms: TrialArms) -> Iterator[_Test]:
    """CTR must be estimated above the margin. That orders are shown to fall is no matter where they rise."""
    if arms.anchor:
        _, (rate, change, units, margin), _ = _metrics(expected, settings.anchor_margin)
        yield _test(rate, change, units, margin, expected.design_effect, arms.anchor, "point", 0.5)


def _metrics(expected: ExpectedRates, ctr_margin: float) -> tuple[tuple[float, float, float, float], ...]:
    """(the control's rate, its relative change, trials of it by one user, margin) of CVR, CTR and OPM."""
    shown, rate = expected.impressions_per_user, expected.ctr
    return (
        (expected.cvr, expected.lift, shown * rate, 0.0),
        (rate, expected.ctr_change, shown, ctr_margin),
        (rate * expected.cvr, expected.opm_lift, shown, 0.0),
    )


def _test(
    rate: float, change: float, units: float, margin: float, design_effect: float, control_users: float,
    mode: str, alpha: float,
) -> _Test:  # fmt: skip
    """The test of one metric; `control_users` for each user of the target's arm."""
    target, factor = rate * (1.0 + change), 1.0 - margin
    variance = target * (1 - target) + factor**2 * rate * (1 - rate) / control_users
    return _Test(target - factor * rate, design_effect * variance / units, rate, mode, alpha)


def _pass_probability(users: float, test: _Test, settings: GateSettings) -> float:
    variance = test.variance / users
    critical = {
        "sequential": lambda: sequential.boundary(variance, settings.effect * test.rate, test.alpha),
        "fixed": lambda: statistics.quantile(1.0 - test.alpha),
        "point": lambda: 0.0,
    }[test.mode]()
    return statistics.upper_tail(critical - test.theta / math.sqrt(variance))


def _smallest_users(enough: Callable[[int], bool]) -> int:
    high = 1
    while not enough(high):
        high *= 2
        if high > _MAX_USERS:
            raise SidstreamError(
                "no number of users is enough: a model whose CTR is at the margin or below it cannot show "
                "that it keeps it; raise gate.margin (and gate.anchor_margin, where there is a hold-out)"
            )
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
