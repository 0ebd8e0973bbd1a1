"""How many users a trial needs before it starts, and how likely it is to promote with fewer.

Both of the gate's tests must pass, so each is planned with half of the allowed misses, beta / 2: then both
pass with power 1 - beta at least (union bound; Spotify's rule for one success metric and one guardrail).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from registry.experiment import sequential, statistics
from registry.settings import GateSettings
from streams.errors import SidstreamError

_MAX_USERS = 10**12


@dataclass(frozen=True)
class ExpectedRates:
    """The expected rates of a trial: the control's rates, the relative lift of CVR, no change of CTR.

    `design_effect` is the user-clustered variance over that of independent impressions and clicks.
    """

    cvr: float
    lift: float
    ctr: float = 0.05
    impressions_per_user: float = 7.0
    design_effect: float = 1.2

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
            ("design-effect", self.design_effect, self.design_effect > 0, "above 0"),
        ):
            if not valid:
                raise SidstreamError(f"{name} is {value}: it must be {requirement}")


def power(users: float, expected: ExpectedRates, settings: GateSettings, mode: str) -> float:
    """A lower bound of the chance that the gate promotes at one look with `users` in each arm.

    One test passes with probability Phi(theta / sqrt(V) - c), c its critical value: the normal quantile in
    mode fixed, the boundary of the confidence sequence at that V in mode sequential. There earlier looks add
    to it, so the figure is on the safe side. Both pass with at least the sum of both minus one.
    """
    return max(
        sum(_pass_probability(users, test, settings, mode) for test in _tests(expected, settings)) - 1.0, 0.0
    )


def users_needed(
    expected: ExpectedRates, settings: GateSettings, mode: str, target_power: float = 0.8
) -> int:
    """Users in each arm with which each test passes with probability 1 - (1 - target_power) / 2.

    Fixed: n = (z_alpha + z_(beta/2))^2 v / theta^2 of the harder test, v the variance of one user's contrast.
    Sequential: the smallest n of the same condition, by bisection; power grows with n there. Raises
    SidstreamError for a power that no trial has, and where no number of users would do.
    """
    if not 0 < target_power < 1:
        raise SidstreamError(f"power is {target_power}: it must be between 0 and 1")
    each = 1.0 - (1.0 - target_power) / 2.0

    def enough(users: int) -> bool:
        return all(
            _pass_probability(users, test, settings, mode) >= each for test in _tests(expected, settings)
        )

    return max(_smallest_users(enough), settings.min_users)


def power_curve(
    users: int, expected: ExpectedRates, settings: GateSettings, mode: str, steps: int = 8
) -> list[tuple[int, float]]:
    """(users in each arm, power) from a quarter of `users` to twice as many."""
    return [
        (n, power(n, expected, settings, mode))
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


def _tests(expected: ExpectedRates, settings: GateSettings) -> tuple[_Test, _Test]:
    p, q = expected.cvr, expected.cvr * (1.0 + expected.lift)
    shown = expected.impressions_per_user
    clicks = shown * expected.ctr
    factor, c = 1.0 - settings.margin, expected.ctr
    return (
        _Test(q - p, expected.design_effect * (p * (1 - p) + q * (1 - q)) / clicks, p),
        _Test(settings.margin * c, expected.design_effect * c * (1 - c) * (1 + factor**2) / shown, c),
    )


def _pass_probability(users: float, test: _Test, settings: GateSettings, mode: str) -> float:
    variance = test.variance / users
    critical = (
        sequential.boundary(variance, settings.effect * test.rate, settings.alpha)
        if mode == "sequential"
        else statistics.quantile(1.0 - settings.alpha)
    )
    return statistics.upper_tail(critical - test.theta / math.sqrt(variance))


def _smallest_users(enough: Callable[[int], bool]) -> int:
    high = 1
    while not enough(high):
        high *= 2
        if high > _MAX_USERS:
            raise SidstreamError(
                "no number of users is enough: with gate.margin 0 a model that leaves CTR as it is cannot "
                "show that it keeps it; raise gate.margin"
            )
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
