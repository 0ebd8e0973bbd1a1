"""Are a trial's data fit to be judged? A check answers with a sentence, an empty one where all is well."""

from __future__ import annotations

import math
from collections.abc import Mapping

from registry.experiment.statistics import ArmSums

# Weight of the prior that the arms' true shares are near the wanted ones, in users: a half share is then
# expected within some .05. Real faults are that large (a lost arm, a cache, a crash) or found later.
_CONCENTRATION = 100.0


def unusable_reason(named: Mapping[str, ArmSums], min_users: int = 0, min_impressions: int = 0) -> str:
    """Why the sums of these arms cannot give rates with a variance, or are fewer than the gate wants."""
    for name, arm in named.items():
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
    """log of the evidence that the arms' shares are not the weights: Dirichlet prior against the weights.

    BF = B(a + n) / B(a) / prod w^n with a = 100 w, B the multivariate beta function and n the users of each
    arm (Lindon and Malek 2022, "Anytime-valid inference for multinomial count data"). A martingale
    where the weights are true, so P(BF >= 1/alpha at any look) <= alpha. Infinite where an arm without weight
    has users. `weights` need not sum to one.
    """
    total = math.fsum(weights.values())
    arms = [(users.get(name, 0), weight / total) for name, weight in weights.items() if weight > 0]
    if sum(users.values()) > sum(count for count, _ in arms):
        return math.inf
    count = sum(number for number, _ in arms)
    factor = math.lgamma(_CONCENTRATION) - math.lgamma(_CONCENTRATION + count)
    for number, weight in arms:
        prior = _CONCENTRATION * weight
        factor += math.lgamma(prior + number) - math.lgamma(prior) - number * math.log(weight)
    return factor


def sample_ratio_mismatch(users: Mapping[str, int], weights: Mapping[str, float], alpha: float) -> str:
    """Why the users of the arms are not those that the weights dealt out, by a test valid at every look.

    An arm that loses users (its model fails, its answers are not shown) is compared on those who are left,
    and no test of rates can tell.
    """
    total = math.fsum(weights.values())
    if total <= 0 or log_bayes_factor(users, weights) < -math.log(alpha):
        return ""
    count = sum(users.values())
    told = ", ".join(
        f"{name} {users.get(name, 0)} ({weight / total * count:.0f} expected)"
        for name, weight in weights.items()
    )
    return (
        f"the users of the arms do not match their weights: {told}; find out which users an arm lost before "
        "its rates are compared"
    )
