"""The rule that ends a trial: conversion went up and click-through did not fall by the margin.

One comparison of two arms, by tests (the default) or by point estimates (the published rule, which promotes a
model without effect about half of the time).

test mode, each test one-sided at alpha:
- promote: CVR is significantly higher and CTR is significantly above (1 - margin) of the control's. Both must
  hold, so alpha needs no correction (intersection-union).
- reject: harm is shown: CVR is significantly lower, or CTR is significantly below that margin.
- inconclusive: anything else, and whatever cannot be computed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from registry import statistics
from registry.settings import GateSettings
from registry.statistics import Estimate, Sums

Verdict = Literal["promote", "reject", "inconclusive"]


@dataclass(frozen=True)
class Comparison:
    """Target against control: figures (None where they cannot be computed), verdict and its reason."""

    target: str
    control: str
    cvr: dict[str, Any] | None
    ctr: dict[str, Any] | None
    verdict: Verdict
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def compare(
    target: str, control: str, arms: dict[str, Sums], settings: GateSettings, mode: str | None = None
) -> Comparison:
    """Judge `target` against `control`. Never raises on data: what cannot be judged is inconclusive."""
    mode = mode or settings.mode
    named = {name: arms.get(name, Sums()) for name in (target, control)}
    cvr = _figures(statistics.cvr(named[target]), statistics.cvr(named[control]), 1.0, settings)
    ctr = _figures(
        statistics.ctr(named[target]), statistics.ctr(named[control]), 1.0 - settings.margin, settings
    )
    verdict: Verdict = "inconclusive"
    reason = _unusable(named, settings if mode == "test" else None)
    if not reason and cvr and ctr:
        verdict, reason = _by_tests(cvr, ctr, settings) if mode == "test" else _by_points(cvr, ctr, settings)
    return Comparison(target, control, cvr, ctr, verdict, f"{target} against {control}: {verdict}; {reason}")


def _unusable(named: dict[str, Sums], settings: GateSettings | None) -> str:
    """Why these sums cannot be judged, or an empty string. `settings`: also demand enough users."""
    for name, arm in named.items():
        if arm.users == 0:
            return f"{name} has served no user yet"
        if settings and (arm.users < settings.min_users or arm.impressions < settings.min_impressions):
            return (
                f"{name} has {arm.users} users and {arm.impressions} impressions; the gate wants at least "
                f"{settings.min_users} and {settings.min_impressions}"
            )
        if arm.users < 2:
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
    if all(arm.orders == 0 for arm in named.values()):
        return "neither arm has an order yet"
    return ""


def _figures(
    target: Estimate | None, control: Estimate | None, factor: float, settings: GateSettings
) -> dict[str, Any] | None:
    if target is None or control is None:
        return None
    test = statistics.contrast(target, control, factor)
    plain = statistics.contrast(target, control)
    interval = statistics.ratio_interval(target, control, settings.alpha)
    return {
        "target": target.value,
        "control": control.value,
        "difference": target.value - control.value,
        "difference_interval": (
            list(statistics.difference_interval(plain, settings.alpha)) if plain else None
        ),
        "ratio": target.value / control.value if control.value else None,
        "ratio_interval": list(interval) if interval else None,
        "z": test.z if test else None,
        "p_above": test.p_above if test else None,
        "p_below": test.p_below if test else None,
    }


def _by_tests(cvr: dict[str, Any], ctr: dict[str, Any], settings: GateSettings) -> tuple[Verdict, str]:
    if cvr["z"] is None or ctr["z"] is None:
        return "inconclusive", "every user behaved alike, and without variance there is no test"
    alpha, bound = settings.alpha, 1.0 - settings.margin
    higher, lower = cvr["p_above"] < alpha, cvr["p_below"] < alpha
    kept, fallen = ctr["p_above"] < alpha, ctr["p_below"] < alpha
    figures = f"{_rate('CVR', cvr)}, {_rate('CTR', ctr)}"
    if lower or fallen:
        harm = (
            "CVR is significantly lower"
            if lower
            else f"CTR is significantly below {bound:.0%} of the control's"
        )
        return "reject", f"{harm} ({figures})"
    if higher and kept:
        return "promote", f"CVR is higher and CTR keeps {bound:.0%} of the control's ({figures})"
    missing = []
    if not higher:
        missing.append("that CVR is higher")
    if not kept:
        missing.append(f"that CTR keeps {bound:.0%} of the control's")
    return "inconclusive", f"not shown yet: {' and '.join(missing)} ({figures})"


def _by_points(cvr: dict[str, Any], ctr: dict[str, Any], settings: GateSettings) -> tuple[Verdict, str]:
    bound = 1.0 - settings.margin
    figures = f"point estimates, no evidence: {_rate('CVR', cvr)}, {_rate('CTR', ctr)}"
    if cvr["difference"] > 0 and ctr["target"] > bound * ctr["control"]:
        return "promote", f"CVR is higher and CTR is above {bound:.0%} of the control's ({figures})"
    reason = (
        "CVR is not higher" if cvr["difference"] <= 0 else f"CTR is not above {bound:.0%} of the control's"
    )
    return "reject", f"{reason} ({figures})"


def _rate(name: str, figures: dict[str, Any]) -> str:
    text = f"{name} {figures['target']:.2%} against {figures['control']:.2%}"
    interval = figures["ratio_interval"]
    if interval:
        text += f", x{figures['ratio']:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
    return text
