"""The rule that ends a trial: more is bought for each click and each item shown, and clicks did not suffer.

One comparison of two arms, in one of three modes:
- sequential (the default): tests that hold however often one looks (registry.experiment.sequential);
- fixed: the same tests for one look, at the end;
- point: the rule on point estimates, which promotes a model without effect about half of the time.

By tests, each one-sided at alpha:
- promote: CVR (orders per click) is shown to be higher, CTR (clicks per impression) is shown to be above
  (1 - margin) of the control's, and OPM (orders per impression) is shown to be higher. All must hold, so
  alpha needs no correction (intersection-union). CVR and CTR are the published rule. OPM is what a shop sells
  with a page: CTR x.92 with CVR x1.06 keeps the published rule and sells 2.5 % less. A model that sells no
  more for each item shown is promoted with probability alpha at most, whatever its CTR and CVR; an estimate
  of OPM that is no lower than the control's would not do, because the same luck that shows CVR to be higher
  raises it, too (docs/decisions/0019-orders-per-impression.md).
- reject: harm is shown: CVR or OPM is lower, or CTR is below that margin.
- inconclusive: all other cases, and figures that cannot be computed.

With `gate.value` the revenue or commission per user must also be estimated at no less than the control's, and
is harm where it is shown to be lower. Sums of money vary so much between users that a proof that they rise
would end all promotions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from registry.arms import CHAMPION
from registry.experiment import data_quality, sequential, statistics
from registry.experiment.statistics import ArmSums, Estimate
from registry.settings import GateSettings

Verdict = Literal["promote", "reject", "inconclusive"]
MODES = ("sequential", "fixed", "point")
# The metrics of a comparison, as a sentence names them.
METRIC_NAMES: Final = {
    "cvr": "CVR",
    "ctr": "CTR",
    "opm": "orders per impression",
    "value": "value per user",
}
_METRICS: Final = {
    "cvr": statistics.cvr,
    "ctr": statistics.ctr,
    "opm": statistics.opm,
    "value": statistics.value_per_user,
}
_NO_VARIANCE: Final = "every user behaved alike, and without variance there is no test"


@dataclass(frozen=True)
class Comparison:
    """Target against control: figures (None where they cannot be computed), verdict and its reason.

    `alpha`: the error rate of each of its one-sided tests. `value` is None also where `gate.value` is none.
    """

    target: str
    control: str
    alpha: float
    cvr: dict[str, Any] | None
    ctr: dict[str, Any] | None
    opm: dict[str, Any] | None
    value: dict[str, Any] | None
    verdict: Verdict
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def settings_against(control: str, challengers: int, settings: GateSettings) -> GateSettings:
    """The settings of a comparison with `control` in a trial of so many challengers.

    Each challenger that is compared with the champion is one more chance of a false promotion: they share
    alpha equally (Bonferroni), so that the whole judgement promotes a model that is no better with
    probability alpha at most. Which of two challengers goes on promotes nothing, and is tested at alpha.
    """
    if control != CHAMPION:
        return settings
    return settings.model_copy(update={"alpha": settings.alpha / challengers})


def compare(
    target: str, control: str, arms: dict[str, ArmSums], settings: GateSettings, mode: str | None = None
) -> Comparison:
    """Judge `target` against `control`. Never raises on data: what cannot be judged is inconclusive."""
    mode = mode or settings.mode
    pair = {name: arms.get(name, ArmSums()) for name in (target, control)}
    figures = _all_figures(pair, {"ctr": settings.margin}, settings, mode)
    verdict: Verdict = "inconclusive"
    reason = _unusable_reason(pair, settings, mode)
    if not reason and all(arm.orders == 0 for arm in pair.values()):
        reason = "neither arm has an order yet"
    if not reason and settings.value != "none" and all(arm.value == 0 for arm in pair.values()):
        reason = f"no order of either arm has a {settings.value}; gate.value asks for one"
    if not reason and figures["cvr"] and figures["ctr"]:
        verdict, reason = (
            _verdict_by_points(figures) if mode == "point" else _verdict_by_tests(figures, settings)
        )
    sentence = f"{target} against {control}: {verdict}; {reason}"
    return Comparison(target, control, settings.alpha, **figures, verdict=verdict, sentence=sentence)


def compare_with_anchor(
    candidate: str, anchor: str, arms: dict[str, ArmSums], settings: GateSettings, mode: str | None = None
) -> Comparison:
    """Has the candidate kept (1 - anchor_margin) of the anchor's CTR? promote: yes, by the point estimate.

    Each promotion may lose up to the margin of CTR, so that ten of -5 % add up to -40 %. No comparison with
    the champion detects that; the hold-out on a fixed anchor does. The hold-out is small (a few percent of
    users), so that it cannot show non-inferiority in every cycle, and such a rule would end all promotions.
    The rule is therefore that the point estimate keeps the margin and that harm is not shown. For a model
    exactly on the margin the estimate is wrong half of the time. But with every further loss a candidate is
    less likely to pass, so that the total loss stays near the margin.

    Each promotion is shown to raise OPM, so that no series of legal steps lowers it. Against the anchor it is
    harm where it is shown to be lower; the estimate of a few hundred users' orders is too rough for more.

    reject: CTR is shown to be below the margin, or OPM to be lower. In mode point only CTR is compared.
    """
    mode = mode or settings.mode
    pair = {name: arms.get(name, ArmSums()) for name in (candidate, anchor)}
    figures = _all_figures(pair, {"ctr": settings.anchor_margin}, settings, mode)
    verdict: Verdict = "inconclusive"
    reason = _unusable_reason({candidate: pair[candidate]}, settings, mode)
    anchor_reason = _unusable_reason({anchor: pair[anchor]}, settings, mode)
    if anchor_reason and not reason:
        reason = (
            f"{anchor_reason}; raise rollout.anchor where trials end before that: until then nothing is "
            "promoted"
        )
    ctr, opm = figures["ctr"], figures["opm"]
    if not reason and ctr and opm:
        verdict, reason = _verdict_against_anchor(ctr, opm, settings, mode)
    sentence = f"{candidate} against {anchor}: {verdict}; {reason}"
    return Comparison(candidate, anchor, settings.alpha, **figures, verdict=verdict, sentence=sentence)


def _unusable_reason(arms: dict[str, ArmSums], settings: GateSettings, mode: str) -> str:
    """Why these sums cannot be judged. The published rule needs no exposure beyond that rates exist."""
    if mode == "point":
        return data_quality.unusable_reason(arms)
    return data_quality.unusable_reason(arms, settings.min_users, settings.min_impressions)


def _all_figures(
    pair: dict[str, ArmSums], margins: dict[str, float], settings: GateSettings, mode: str
) -> dict[str, dict[str, Any] | None]:
    """The figures of every metric, target first in `pair`; a metric without an entry has the margin 0."""
    target, control = pair.values()
    return {
        name: None
        if name == "value" and settings.value == "none"
        else _figures(metric(target), metric(control), margins.get(name, 0.0), settings, mode)
        for name, metric in _METRICS.items()
    }


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
    figures: dict[str, dict[str, Any] | None], settings: GateSettings
) -> tuple[Verdict, str]:
    tested = {name: metric for name, metric in figures.items() if metric is not None}
    if any(metric["z"] is None for metric in tested.values()):
        return "inconclusive", _NO_VARIANCE
    alpha, bound = settings.alpha, 1.0 - settings.margin
    rates = _rates(tested)
    harms = [
        harm
        for name, harm in (
            ("cvr", "CVR is lower"),
            ("ctr", f"CTR is below {bound:.0%} of the control's"),
            ("opm", "orders per impression are lower"),
            ("value", f"{settings.value} per user is lower"),
        )
        if name in tested and tested[name]["p_below"] < alpha
    ]
    if harms:
        return "reject", f"{' and '.join(harms)} ({rates})"
    claims = {
        "cvr": "CVR is higher",
        "ctr": f"CTR keeps {bound:.0%} of the control's",
        "opm": "orders per impression are higher",
    }
    missing = [f"that {claim}" for name, claim in claims.items() if tested[name]["p_above"] >= alpha]
    if missing:
        return "inconclusive", f"not shown yet: {' and '.join(missing)} ({rates})"
    if "value" in tested and tested["value"]["difference"] < 0:
        return "inconclusive", f"{settings.value} per user is estimated lower ({rates})"
    return "promote", f"{claims['cvr']}, {claims['ctr']} and {claims['opm']} ({rates})"


def _verdict_by_points(figures: dict[str, dict[str, Any] | None]) -> tuple[Verdict, str]:
    compared = {name: metric for name, metric in figures.items() if metric is not None}
    bound = 1.0 - compared["ctr"]["margin"]
    rates = f"point estimates, no evidence: {_rates(compared)}"
    if compared["cvr"]["difference"] <= 0:
        return "reject", f"CVR is not higher ({rates})"
    if compared["ctr"]["target"] <= bound * compared["ctr"]["control"]:
        return "reject", f"CTR is not above {bound:.0%} of the control's ({rates})"
    for name in ("opm", "value"):
        if name in compared and compared[name]["difference"] < 0:
            return "reject", f"by {METRIC_NAMES[name]} it sells less ({rates})"
    return (
        "promote",
        f"CVR is higher, CTR is above {bound:.0%} of the control's and orders per impression are no fewer "
        f"({rates})",
    )


def _verdict_against_anchor(
    ctr: dict[str, Any], opm: dict[str, Any], settings: GateSettings, mode: str
) -> tuple[Verdict, str]:
    bound = f"{1.0 - settings.anchor_margin:.0%} of the anchor's in all"
    rates = _rates({"ctr": ctr, "opm": opm})
    if mode != "point":
        if ctr["z"] is None:
            return "inconclusive", _NO_VARIANCE
        if ctr["p_below"] < settings.alpha:
            return "reject", f"CTR is shown to be below {bound} ({rates})"
        # Where nobody has ordered yet there is no such test.
        if opm["z"] is not None and opm["p_below"] < settings.alpha:
            return "reject", f"{METRIC_NAMES['opm']} are shown to be lower than the anchor's ({rates})"
    if ctr["target"] < (1.0 - ctr["margin"]) * ctr["control"]:
        return "inconclusive", f"CTR is estimated below {bound} ({rates})"
    return "promote", f"CTR keeps {bound} ({rates})"


def _rates(figures: dict[str, dict[str, Any]]) -> str:
    return ", ".join(_rate(name, metric) for name, metric in figures.items())


def _rate(name: str, figures: dict[str, Any]) -> str:
    form = ".2f" if name == "value" else ".2%"
    text = f"{METRIC_NAMES[name]} {figures['target']:{form}} against {figures['control']:{form}}"
    interval = figures["ratio_interval"]
    if interval:
        text += f", x{figures['ratio']:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
    return text
