"""The plan of a trial: users and days for each mode, the power of fewer, and what the hold-out can decide."""

from __future__ import annotations

import math
from typing import Any

from registry.experiment import sample_size
from registry.experiment.sample_size import ExpectedRates, TrialArms
from registry.settings import GateSettings, RolloutSettings


def plan_trial(
    expected: ExpectedRates, arms: TrialArms, power: float, mode: str, share: float,
    users_per_day: float | None, gate: GateSettings, rollout: RolloutSettings,
) -> dict[str, Any]:  # fmt: skip
    """The plan, JSON-able; `mode` is that of the curve, `share` the smallest arm's share of all users.

    `users_per_day`: new users, over all arms; None: days are not planned. Raises SidstreamError as
    sample_size.users_needed does.
    """
    modes: dict[str, dict[str, Any]] = {}
    for name in ("sequential", "fixed"):
        users = sample_size.users_needed(expected, gate, name, arms, power)
        modes[name] = {
            "users_per_arm": users,
            "impressions_per_arm": round(users * expected.impressions_per_user),
            "held_out_users": round(users * arms.anchor),
            "anchor_power": round(sample_size.anchor_power(users, expected, gate, arms), 4),
            "days": math.ceil(users / (users_per_day * share)) if users_per_day else None,
        }
    points = sample_size.power_curve(modes[mode]["users_per_arm"], expected, gate, mode, arms)
    return {
        "expected": vars(expected), "power": power, "modes": modes, "share": share, "arms": vars(arms),
        "value": gate.value, "warnings": _warnings(modes[mode], users_per_day, gate, rollout),
        "curve": {"mode": mode, "points": [list(point) for point in points]},
    }  # fmt: skip


def _warnings(
    planned: dict[str, Any], users_per_day: float | None, gate: GateSettings, rollout: RolloutSettings
) -> list[str]:
    """What stands between such a plan and a verdict."""
    warnings = []
    if users_per_day is not None:
        coming = users_per_day * rollout.max_hours / 24
        held_out = coming * rollout.anchor
        if rollout.anchor and held_out < gate.min_users:
            share = gate.min_users / coming
            remedy = (
                f"raise rollout.anchor to {math.ceil(1000 * share) / 1000:.1%} at least"
                if share < 0.5
                else "lengthen rollout.max_hours"
            )
            warnings.append(
                f"the hold-out of {rollout.anchor:.1%} has {held_out:.0f} users within the "
                f"{rollout.max_hours:g} hours of a trial, and the gate wants {gate.min_users}: after the "
                f"first promotion no model is promoted, ever; {remedy}"
            )
        if planned["days"] * 24 > rollout.max_hours:
            warnings.append(
                f"the trial ends after {rollout.max_hours:g} hours (rollout.max_hours), before its users "
                "have come: lengthen it, or hope for a larger lift"
            )
    if gate.value != "none":
        warnings.append(
            f"that {gate.value} per user is estimated no lower (gate.value) is not planned: a good model "
            "fails it by chance where few buyers make most of it"
        )
    return warnings


def plan_text(planned: dict[str, Any]) -> str:
    """A plan for people."""
    rates, arms = planned["expected"], planned["arms"]
    moved = f"changes by {rates['ctr_change']:+.1%}" if rates["ctr_change"] else "does not change"
    lines = [
        f"to promote with power {planned['power']:.0%} where CVR rises from {rates['cvr']:.2%} to "
        f"{rates['cvr'] * (1 + rates['lift']):.2%} and CTR {rates['ctr']:.2%} {moved}, of "
        f"{arms['challengers']} challenger{'s' if arms['challengers'] > 1 else ''}:"
    ]
    for name, figures in planned["modes"].items():
        when = (
            ""
            if figures["days"] is None
            else f", {figures['days']:,} days at {planned['share']:.0%} of the users"
        )
        lines.append(
            f"  {name:<10}  {figures['users_per_arm']:>12,} users an arm "
            f"({figures['impressions_per_arm']:,} impressions){when}"
        )
        if arms["anchor"]:
            lines.append(
                f"              {figures['held_out_users']:,} held-out users let such a model pass "
                f"{figures['anchor_power']:.0%} of the time"
            )
    lines += [f"warning: {warning}" for warning in planned["warnings"]]
    curve = planned["curve"]
    points = [(users, value) for users, value in curve["points"]]
    lines += [
        "",
        f"power by users an arm (mode {curve['mode']}, one look):",
        sample_size.power_curve_text(points),
    ]
    return "\n".join(lines)
