"""The gate's arithmetic: ratio metrics over users, their variance, one-sided tests, intervals of ratios.

Users are randomised to arms, so that the variance is over users: the impressions of one user are not
independent. Every function is pure. A test needs nothing but `ArmSums`, so that a stored record recomputes
exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

_NORMAL = NormalDist()


@dataclass(frozen=True)
class ArmSums:
    """One arm: users, totals, and the second moments over users (sums of squares and of products).

    `value` is the revenue or the commission of the orders, in hundredths of the currency.
    """

    users: int = 0
    impressions: int = 0
    clicks: int = 0
    orders: int = 0
    impressions_squared: int = 0
    clicks_squared: int = 0
    orders_squared: int = 0
    impressions_clicks: int = 0
    clicks_orders: int = 0
    impressions_orders: int = 0
    value: int = 0
    value_squared: int = 0


@dataclass(frozen=True)
class Estimate:
    """A ratio metric of one arm and the variance of that estimate."""

    value: float
    variance: float


@dataclass(frozen=True)
class ZTest:
    """A one-sided z test of `estimate > 0`; `p_below` is the p-value of the opposite side."""

    estimate: float
    standard_error: float
    z: float
    p_above: float
    p_below: float


def arm_sums(per_user: npt.NDArray[np.int64]) -> ArmSums:
    """Sums of an array (users, 3): impressions, clicks, orders of each user. Whole numbers, so exact.

    A fourth column, where there is one, is the value of the user's orders (hundredths of the currency).
    """
    columns = np.asarray(per_user, dtype=np.int64).T
    shown, clicked, bought = columns[:3]
    value = columns[3] if len(columns) > 3 else np.zeros_like(shown)
    return ArmSums(
        users=len(shown),
        impressions=int(shown.sum()),
        clicks=int(clicked.sum()),
        orders=int(bought.sum()),
        impressions_squared=int((shown**2).sum()),
        clicks_squared=int((clicked**2).sum()),
        orders_squared=int((bought**2).sum()),
        impressions_clicks=int((shown * clicked).sum()),
        clicks_orders=int((clicked * bought).sum()),
        impressions_orders=int((shown * bought).sum()),
        value=int(value.sum()),
        # Of one user 10^9 hundredths and a thousand such users: past what int64 holds, and exact in Python.
        value_squared=sum(int(amount) ** 2 for amount in value[value != 0]),
    )


def ratio_metric(
    users: int, num: int, den: int, num_squared: int, den_squared: int, product: int
) -> Estimate | None:
    """R = sum(num) / sum(den) with the user-clustered variance of the delta method.

    Var(R) = 1/n * var_u(num_u - R den_u) / mean(den)^2, var_u with n - 1 (Deng, Knoblich and Lu 2018,
    "Applying the delta method in metric analytics", section 3). The residuals num_u - R den_u sum to zero,
    so their variance is their mean square. None where the ratio or its variance does not exist.
    """
    if users < 2 or den <= 0:
        return None
    value = num / den
    # In whole numbers, times den^2: users who all behave alike have a variance of exactly zero.
    square = num_squared * den**2 - 2 * num * den * product + num**2 * den_squared
    return Estimate(value, users / (users - 1) * (square / den**4))


def ctr(arm: ArmSums) -> Estimate | None:
    """Click-through rate: clicks / impressions."""
    return ratio_metric(
        arm.users,
        arm.clicks,
        arm.impressions,
        arm.clicks_squared,
        arm.impressions_squared,
        arm.impressions_clicks,
    )


def cvr(arm: ArmSums) -> Estimate | None:
    """Conversion rate: orders / clicks."""
    return ratio_metric(
        arm.users, arm.orders, arm.clicks, arm.orders_squared, arm.clicks_squared, arm.clicks_orders
    )


def opm(arm: ArmSums) -> Estimate | None:
    """Orders per impression: orders / impressions, which is CTR times CVR."""
    return ratio_metric(
        arm.users,
        arm.orders,
        arm.impressions,
        arm.orders_squared,
        arm.impressions_squared,
        arm.impressions_orders,
    )


def value_per_user(arm: ArmSums) -> Estimate | None:
    """Revenue or commission per user, in units of the currency. None where no user has any."""
    if arm.users < 2:
        return None
    estimate = ratio_metric(arm.users, arm.value, arm.users, arm.value_squared, arm.users, arm.value)
    return None if estimate is None else Estimate(estimate.value / 100, estimate.variance / 10_000)


def contrast(target: Estimate, control: Estimate, factor: float = 1.0) -> ZTest | None:
    """z = (T - f C) / sqrt(Var T + f^2 Var C): superiority with f = 1, non-inferiority with f = 1 - margin.

    The margin as a linear contrast needs no approximation of a quotient (Fieller 1954, the same statistic).
    None where neither arm varies.
    """
    error = math.sqrt(target.variance + factor**2 * control.variance)
    if error == 0.0:
        return None
    estimate = target.value - factor * control.value
    z = estimate / error
    return ZTest(estimate, error, z, upper_tail(z), upper_tail(-z))


def upper_tail(z: float) -> float:
    """P(Z > z) of the standard normal distribution."""
    return 0.5 * math.erfc(z / math.sqrt(2.0))


def quantile(probability: float) -> float:
    """z below which `probability` of the standard normal distribution lies."""
    return _NORMAL.inv_cdf(probability)


def normal_interval(estimate: float, standard_error: float, alpha: float) -> tuple[float, float]:
    """The two-sided 1 - 2 alpha interval of the normal approximation: each end is a one-sided alpha bound.

    Zero is outside exactly when a one-sided z test at alpha rejects.
    """
    half = quantile(1.0 - alpha) * standard_error
    return estimate - half, estimate + half


def ratio_interval(target: Estimate, control: Estimate, critical: float) -> tuple[float, float] | None:
    """Fieller's interval of T / C for independent arms (Fieller 1954), `critical` its value of |z|.

    The ratios r with |T - r C| <= critical sqrt(Var T + r^2 Var C). None where that set is unbounded: the
    control is not itself different from zero.
    """
    z2 = critical**2
    a = control.value**2 - z2 * control.variance
    if a <= 0:
        return None
    b = target.value * control.value
    root = math.sqrt(max(b**2 - a * (target.value**2 - z2 * target.variance), 0.0))
    return (b - root) / a, (b + root) / a
