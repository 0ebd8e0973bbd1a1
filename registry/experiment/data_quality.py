"""Checks that a trial's data can be judged. A check returns the problem as a sentence, or an empty one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from registry.experiment.statistics import ArmSums

# Weight (users) of the prior that the arms' true shares are near their weights: it expects a share of one
# half within about .05. Real faults are that large (a lost arm, a cache, a crash), or take more users to
# detect.
_PRIOR_USERS = 100.0


def unusable_reason(arms: Mapping[str, ArmSums], min_users: int = 0, min_impressions: int = 0) -> str:
    """Why these arms give no rates with a variance, or have too few users or impressions for the gate."""
    for name, arm in arms.items():
        if arm.users == 0:
            return f"{name} has no user in a mature cohort yet"
        if arm.users < min_users or arm.impressions < min_impressions:
            return (
                f"{name} has {arm.users} users and {arm.impressions} impressions; the gate wants at least "
                f"{min_users} and {min_impressions}"
            )
        if arm.users == 1:
            return f"{name} has one user, and one user has no variance"
        if arm.impressions <= 0 or arm.clicks <= 0:
            return (
                f"{name} has {arm.impressions} impressions and {arm.clicks} clicks, so its rates do not exist"
            )
        if arm.clicks > arm.impressions or arm.orders > arm.clicks:
            return (
                f"{name} has {arm.impressions} impressions, {arm.clicks} clicks and {arm.orders} orders: "
                "a rate above 1 means that events are counted twice or lost"
            )
    return ""


def log_bayes_factor(users: Mapping[str, int], weights: Mapping[str, float]) -> float:
    """log Bayes factor for arms whose shares differ from the weights: Dirichlet prior against the weights.

    BF = B(a + n) / B(a) / prod w^n with a = 100 w, B the multivariate beta function and n the users of each
    arm (Lindon and Malek 2022, "Anytime-valid inference for multinomial count data"). A martingale
    where the weights are true, so P(BF >= 1/alpha at any look) <= alpha. Infinite where an arm without weight
    has users. `weights` need not sum to one.
    """
    total = math.fsum(weights.values())
    arms = [(users.get(name, 0), weight / total) for name, weight in weights.items() if weight > 0]
    all_users = sum(count for count, _ in arms)
    if sum(users.values()) > all_users:
        return math.inf
    factor = math.lgamma(_PRIOR_USERS) - math.lgamma(_PRIOR_USERS + all_users)
    for count, weight in arms:
        prior = _PRIOR_USERS * weight
        factor += math.lgamma(prior + count) - math.lgamma(prior) - count * math.log(weight)
    return factor


def sample_ratio_mismatch(users: Mapping[str, int], weights: Mapping[str, float], alpha: float) -> str:
    """Sample-ratio mismatch: why the arms' users do not match their weights, by a test valid at every look.

    An arm that loses users (its model fails, its answers are not shown) is judged by the users who remain,
    and no test of rates can detect that.
    """
    total = math.fsum(weights.values())
    if total <= 0 or log_bayes_factor(users, weights) < -math.log(alpha):
        return ""
    all_users = sum(users.values())
    counts = ", ".join(
        f"{name} {users.get(name, 0)} ({weight / total * all_users:.0f} expected)"
        for name, weight in weights.items()
    )
    return (
        f"the users of the arms do not match their weights: {counts}; find out which users an arm lost "
        "before its rates are compared"
    )
