"""The rule that ends a trial: conversion went up and click-through did not fall by the margin.

One comparison of two arms, in one of three modes:
- sequential (the default): tests that hold however often one looks (registry.experiment.sequential);
- fixed: the same tests for one look, at the end;
- point: the published rule on point estimates, which promotes a model without effect about half of the time.

By tests, each one-sided at alpha:
- promote: CVR is shown to be higher and CTR is shown to be above (1 - margin) of the control's. Both must
  hold, so alpha needs no correction (intersection-union).
- reject: harm is shown: CVR is lower, or CTR is below that margin.
- inconclusive: all other cases, and figures that cannot be computed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from registry.experiment import data_quality, sequential, statistics
from registry.experiment.statistics import ArmSums, Estimate
from registry.settings import GateSettings

Verdict = Literal["promote", "reject", "inconclusive"]
MODES = ("sequential", "fixed", "point")


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
    target: str, control: str, arms: dict[str, ArmSums], settings: GateSettings, mode: str | None = None
) -> Comparison:
    """Judge `target` against `control`. Never raises on data: what cannot be judged is inconclusive."""
    mode = mode or settings.mode
    pair = {name: arms.get(name, ArmSums()) for name in (target, control)}
    cvr = _figures(statistics.cvr(pair[target]), statistics.cvr(pair[control]), 0.0, settings, mode)
    ctr = _figures(
        statistics.ctr(pair[target]), statistics.ctr(pair[control]), settings.margin, settings, mode
    )
    verdict: Verdict = "inconclusive"
    reason = _unusable_reason(pair, settings, mode)
    if not reason and all(arm.orders == 0 for arm in pair.values()):
        reason = "neither arm has an order yet"
    if not reason and cvr and ctr:
        verdict, reason = (
            _verdict_by_points(cvr, ctr) if mode == "point" else _verdict_by_tests(cvr, ctr, settings)
        )
    return Comparison(target, control, cvr, ctr, verdict, f"{target} against {control}: {verdict}; {reason}")


def compare_with_anchor(
    candidate: str, anchor: str, arms: dict[str, ArmSums], settings: GateSettings, mode: str | None = None
) -> Comparison:
    """Has the candidate kept (1 - anchor_margin) of the anchor's CTR? promote: yes, by the point estimate.

    Each promotion may lose up to the margin, so that ten of -5 % add up to -40 %. No comparison with the
    champion detects that; the hold-out on a fixed anchor does. The hold-out is small (a few percent of
    users), so that it cannot show non-inferiority in every cycle, and such a rule would end all promotions.
    The rule is therefore that the point estimate keeps the margin and that harm is not shown. For a model
    exactly on the margin the estimate is wrong half of the time. But with every further loss a candidate is
    less likely to pass, so that the total loss stays near the margin.

    reject: CTR is shown to be below the margin. In mode point only the estimates are compared.
    """
    mode = mode or settings.mode
    pair = {name: arms.get(name, ArmSums()) for name in (candidate, anchor)}
    cvr = _figures(statistics.cvr(pair[candidate]), statistics.cvr(pair[anchor]), 0.0, settings, mode)
    ctr = _figures(
        statistics.ctr(pair[candidate]),
        statistics.ctr(pair[anchor]),
        settings.anchor_margin,
        settings,
        mode,
    )
    verdict: Verdict = "inconclusive"
    reason = _unusable_reason({candidate: pair[candidate]}, settings, mode)
    anchor_reason = _unusable_reason({anchor: pair[anchor]}, settings, mode)
    if anchor_reason and not reason:
        reason = (
            f"{anchor_reason}; raise rollout.anchor where trials end before that: until then nothing is "
            "promoted"
        )
    if not reason and ctr:
        bound = 1.0 - settings.anchor_margin
        figures = _rate("CTR", ctr)
        if mode != "point" and ctr["z"] is None:
            reason = "every user behaved alike, and without variance there is no test"
        elif mode != "point" and ctr["p_below"] < settings.alpha:
            verdict, reason = (
                "reject",
                f"CTR is shown to be below {bound:.0%} of the anchor's in all ({figures})",
            )
        elif ctr["target"] < bound * ctr["control"]:
            reason = f"CTR is estimated below {bound:.0%} of the anchor's in all ({figures})"
        else:
            verdict, reason = "promote", f"CTR keeps {bound:.0%} of the anchor's in all ({figures})"
    return Comparison(
        candidate, anchor, cvr, ctr, verdict, f"{candidate} against {anchor}: {verdict}; {reason}"
    )


def _unusable_reason(arms: dict[str, ArmSums], settings: GateSettings, mode: str) -> str:
    """Why these sums cannot be judged. The published rule needs no exposure beyond that rates exist."""
    if mode == "point":
        return data_quality.unusable_reason(arms)
    return data_quality.unusable_reason(arms, settings.min_users, settings.min_impressions)


def _figures(
    target: Estimate | None, control: Estimate | None, margin: float, settings: GateSettings, mode: str
) -> dict[str, Any] | None:
    """The figures of one metric; intervals are two-sided at 1 - 2 alpha, to agree with the tests."""
    if target is None or control is None:
        return None
    alpha = settings.alpha
    test = statistics.contrast(target, control, 1.0 - margin)
    no_margin = statistics.contrast(target, control)
    difference: tuple[float, float] | None = None
    if mode == "sequential":
        tau = sequential.prior_scale(target, control, settings.effect)
        if no_margin:
            difference = sequential.difference_interval(no_margin, tau, alpha)
        ratio = sequential.ratio_interval(target, control, tau, alpha)
        above, below = sequential.p_values(test, tau) if test else (None, None)
    else:
        if no_margin:
            difference = statistics.normal_interval(no_margin.estimate, no_margin.standard_error, alpha)
        ratio = statistics.ratio_interval(target, control, statistics.quantile(1.0 - alpha))
        above, below = (test.p_above, test.p_below) if test else (None, None)
    return {
        "target": target.value,
        "control": control.value,
        "margin": margin,
        "difference": target.value - control.value,
        "difference_interval": list(difference) if difference else None,
        "ratio": target.value / control.value if control.value else None,
        "ratio_interval": list(ratio) if ratio else None,
        "z": test.z if test else None,
        "p_above": above,
        "p_below": below,
    }


def _verdict_by_tests(
    cvr: dict[str, Any], ctr: dict[str, Any], settings: GateSettings
) -> tuple[Verdict, str]:
    if cvr["z"] is None or ctr["z"] is None:
        return "inconclusive", "every user behaved alike, and without variance there is no test"
    alpha, bound = settings.alpha, 1.0 - settings.margin
    cvr_rises, cvr_falls = cvr["p_above"] < alpha, cvr["p_below"] < alpha
    ctr_holds, ctr_falls = ctr["p_above"] < alpha, ctr["p_below"] < alpha
    figures = f"{_rate('CVR', cvr)}, {_rate('CTR', ctr)}"
    if cvr_falls or ctr_falls:
        harm = "CVR is lower" if cvr_falls else f"CTR is below {bound:.0%} of the control's"
        return "reject", f"{harm} ({figures})"
    if cvr_rises and ctr_holds:
        return "promote", f"CVR is higher and CTR keeps {bound:.0%} of the control's ({figures})"
    missing = []
    if not cvr_rises:
        missing.append("that CVR is higher")
    if not ctr_holds:
        missing.append(f"that CTR keeps {bound:.0%} of the control's")
    return "inconclusive", f"not shown yet: {' and '.join(missing)} ({figures})"


def _verdict_by_points(cvr: dict[str, Any], ctr: dict[str, Any]) -> tuple[Verdict, str]:
    bound = 1.0 - ctr["margin"]
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
