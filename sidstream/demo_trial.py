"""The plan of the demo's trial: how many users its gate needs, and how many come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sidstream.settings import Settings

# What the trial is planned for: a little less than alignment gives with these shoppers, CVR +20 % and CTR
# +2.6 % in the mean of ten seeds (docs/results/demo.md), and the variance of CVR by users over that of
# independent clicks in such a trial.
LIFT, CTR_CHANGE, DESIGN_EFFECT = 0.18, 0.02, 1.6


def planned_trial(
    settings: Settings, before: dict[str, Any], sessions: int, everybody: int
) -> dict[str, Any]:
    """What `sidstream gate plan` says of a trial of so many sessions, by the rates of the champion so far.

    `before`: what `sidstream shoppers` said of the champion's sessions; `everybody`: users who may come. The
    smallest arm is planned for: users_needed in it for the power of .9, and the power of those who come.
    """
    import math

    from registry.experiment import sample_size

    rollout, s = settings.rollout, settings.shoppers
    weights = (rollout.champion, rollout.sft, rollout.dpo)
    came = everybody * (1 - math.exp(-sessions / everybody))
    users = round(came * (1 - rollout.anchor) * min(weights) / sum(weights))
    clicks, shown, purchases = (
        sum(arm[name] for arm in before["arms"].values()) for name in ("clicks", "shown", "purchases")
    )
    planned: dict[str, Any] = {"lift": LIFT, "users": users, "users_needed": None, "power": None}
    if not 0 < purchases * (1 + LIFT) < clicks < shown:
        return planned | {"sentence": "too little was bought to plan it"}
    expected = sample_size.ExpectedRates(
        purchases / clicks, LIFT, clicks / shown, s.k * sessions / came, DESIGN_EFFECT, CTR_CHANGE
    )
    # While the first model is the champion it is the anchor as well: nobody is held out on another one.
    arms = sample_size.TrialArms()
    needed = sample_size.users_needed(expected, settings.gate, "fixed", arms)
    power = sample_size.power(users, expected, settings.gate, "fixed", arms)
    return planned | {
        "users_needed": needed,
        "power": round(power, 3),
        "sentence": f"{users:,} users in the smallest arm, {needed:,} planned for CVR +{LIFT:.0%} and "
        f"CTR +{CTR_CHANGE:.0%}",
    }
