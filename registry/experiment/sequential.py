"""Always-valid inference on a contrast of two ratio metrics, for any number of looks and any stopping time.

A contrast D of user-clustered ratios is, in large samples, normal around its true value theta with variance
V. In information time I = 1 / V the sums D I behave like a Brownian motion with drift theta (Jennison and
Turnbull 2000, chapter 3). Mixing the likelihood ratio of theta against zero over theta ~ N(0, tau^2) gives

    Lambda = (1 + r)^(-1/2) exp(z^2 / 2 * r / (1 + r)),   r = tau^2 I,  z = D / sqrt(V),

a martingale under theta = 0, so that P(Lambda >= 1/a at any look) <= a (Ville 1939; Robbins 1970; the mSPRT
of Johari, Koomen, Pekelis and Walsh 2022). V is estimated, so the guarantee is the asymptotic one of
Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas 2024, "Time-uniform central limit theory". So is that of tau,
a share of the control's rate as it is estimated at each look: Lambda is a martingale for a fixed tau, and
near one as that rate settles. What both cost is in the simulated error rates (docs/results/gate.md). Where r
is small, at the first looks, the boundary is much higher than that of a fixed test, so that few data decide
nothing.

The one-sided test at alpha uses the two-sided boundary at 2 alpha, with the right sign. A walk that crosses
both sides in one trial counts once for the two-sided error rate and twice for the one-sided ones. That is so
rare that it does not show in the simulated error rates.
"""

from __future__ import annotations

import math

from registry.experiment import statistics
from registry.experiment.statistics import Estimate, ZTest


def prior_scale(target: Estimate, control: Estimate, effect: float) -> float:
    """tau of the mixture in the metric's unit: the relative effect that matters times the control's rate.

    A control without a single event has the rate 0: then the target's rate takes its place.
    """
    return effect * (control.value or target.value)


def log_likelihood_ratio(estimate: float, variance: float, tau: float) -> float:
    """log Lambda of a contrast against zero (module docstring). `variance` > 0, `tau` >= 0."""
    r = tau * tau / variance
    return -0.5 * math.log1p(r) + 0.5 * estimate * estimate / variance * r / (1.0 + r)


def boundary(variance: float, tau: float, alpha: float) -> float:
    """|z| at which a one-sided test at `alpha` rejects: Lambda = 1 / (2 alpha), solved for z.

    z^2 = (1 + 1/r) (2 log(1 / (2 alpha)) + log(1 + r)). Infinite where tau is zero.
    """
    r = tau * tau / variance
    if r == 0.0:
        return math.inf
    return math.sqrt((1.0 + 1.0 / r) * (2.0 * math.log(0.5 / alpha) + math.log1p(r)))


def p_values(test: ZTest, tau: float) -> tuple[float, float]:
    """Always-valid one-sided p-values (above zero, below zero).

    min(1, 1 / (2 Lambda)) on the side of the estimate, 1 on the other: below alpha exactly where |z| is
    beyond `boundary` on that side (Johari et al. 2022, section 3).
    """
    log_lambda = log_likelihood_ratio(test.estimate, test.standard_error**2, tau)
    p = 0.5 * math.exp(-log_lambda) if log_lambda > math.log(0.5) else 1.0
    return (p if test.estimate > 0 else 1.0), (p if test.estimate < 0 else 1.0)


def difference_interval(test: ZTest, tau: float, alpha: float) -> tuple[float, float] | None:
    """The 1 - 2 alpha confidence sequence at this look: zero is outside when a one-sided test rejects.

    None where it is unbounded (tau is zero).
    """
    half = boundary(test.standard_error**2, tau, alpha) * test.standard_error
    return (test.estimate - half, test.estimate + half) if math.isfinite(half) else None


def ratio_interval(
    target: Estimate, control: Estimate, tau: float, alpha: float
) -> tuple[float, float] | None:
    """The ratios q for which the contrast T - q C is not rejected, so that it agrees with every such test.

    Fieller's interval whose critical value is the boundary at that very end: the boundary hardly moves with
    q, so substituting it again and again settles in a few rounds. None where it is unbounded.
    """
    ends = []
    for side in (0, 1):
        q = 1.0
        for _ in range(100):
            variance = target.variance + q**2 * control.variance
            critical = boundary(variance, tau, alpha) if variance > 0 else 0.0
            interval = statistics.ratio_interval(target, control, critical)
            if interval is None:
                return None
            previous, q = q, interval[side]
            if abs(q - previous) <= 1e-12 * abs(q):
                break
        ends.append(q)
    return ends[0], ends[1]
