"""The decision record: the One4All rule applied twice, with all that is needed to compute it again.

First the aligned model is compared with the fine-tuned one from which it was trained. The one that goes on is
compared with the champion. Where the first comparison is inconclusive and the fine-tuned model is shown to do
harm, the aligned model is compared with the champion itself. The order is fixed beforehand, and all
comparisons read the same trial. Two challengers that may be promoted are two chances of a false promotion:
their comparisons with the champion share alpha. A promotion also needs a candidate that kept its CTR against
the anchor, in a trial with a hold-out. A sample-ratio mismatch makes every verdict inconclusive.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from registry.arms import ANCHOR, CHAMPION, DPO, SFT
from registry.experiment import data_quality, guards
from registry.experiment.gate import (
    MODES,
    Comparison,
    Verdict,
    compare,
    compare_with_anchor,
    settings_against,
)
from registry.experiment.statistics import ArmSums, arm_sums
from registry.settings import GateSettings
from streams.errors import SidstreamError
from streams.events import Arm

if TYPE_CHECKING:
    from registry.experiment.outcomes import ArmOutcomes


@dataclass(frozen=True)
class Judgement:
    """The comparisons in order, the one with the anchor if any, the verdict, the winner's arm, a sentence."""

    comparisons: list[Comparison]
    anchor: Comparison | None
    verdict: Verdict
    winner: str
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def judge(
    arms: dict[str, ArmSums],
    settings: GateSettings,
    mode: str,
    weights: Mapping[str, float],
    bundles: Mapping[str, str],
) -> Judgement:
    """Judge a trial from the sums of its arms.

    `weights` are the arms' shares of users, `bundles` their bundles' ids. The aligned model goes on only
    where it is promoted over the fine-tuned one, or where their comparison is inconclusive and the fine-tuned
    one is shown to do harm. Without an aligned arm there is one comparison. The verdict is that of the last
    comparison, unless the anchor or the sample-ratio check objects: then a promotion is inconclusive (a
    reject where harm against the anchor is shown).
    """
    comparisons = []
    against_champion = settings_against(CHAMPION, 2 if DPO in weights else 1, settings)
    candidate = SFT
    if DPO in weights:
        first = compare(DPO, SFT, arms, settings, mode)
        comparisons.append(first)
        candidate = DPO if first.verdict == "promote" else SFT
    last = compare(candidate, CHAMPION, arms, against_champion, mode)
    comparisons.append(last)
    if DPO in weights and last.verdict == "reject" and comparisons[0].verdict == "inconclusive":
        # A harmful model is no control: the aligned model must beat the champion instead.
        candidate = DPO
        last = compare(candidate, CHAMPION, arms, against_champion, mode)
        comparisons.append(last)
    verdict, reason = last.verdict, _reason(last)
    anchor = None
    if ANCHOR in weights and bundles[ANCHOR] != bundles[candidate]:
        anchor = compare_with_anchor(candidate, ANCHOR, arms, settings, mode)
        if anchor.verdict == "reject" or (verdict == "promote" and anchor.verdict != "promote"):
            verdict, reason = anchor.verdict, f"against the anchor: {_reason(anchor)}"
    mismatch = data_quality.sample_ratio_mismatch(
        {name: arms[name].users for name in weights if name in arms}, weights, settings.srm_alpha
    )
    if mismatch:
        verdict, reason = "inconclusive", mismatch
    if bundles[candidate] == bundles[CHAMPION] and not mismatch:
        # An A/A trial: both arms serve one bundle, so that a difference is chance or a fault in the
        # measurement.
        if verdict == "inconclusive":
            reason = f"an A/A trial finds no difference, as it should ({_reason(last)})"
        else:
            reason = (
                f"an A/A trial finds a difference: chance, in {last.alpha:.1%} a side; if it comes "
                f"again, arms are not dealt, answered or counted alike ({_reason(last)})"
            )
            verdict = "reject"
    label = "" if mode == "sequential" else f" (mode {mode})"
    outcome = {
        "promote": f"promote {candidate}{label}",
        "reject": f"reject {candidate}{label}",
        "inconclusive": f"inconclusive on {candidate}{label}, the champion stays",
    }[verdict]
    winner = candidate if verdict == "promote" else CHAMPION
    return Judgement(comparisons, anchor, verdict, winner, f"{outcome}: {reason}")


def decide(
    step_id: str,
    arms: list[Arm],
    outcomes: Mapping[str, ArmOutcomes],
    settings: GateSettings,
    mode: str | None = None,
    ts: int | None = None,
) -> dict[str, Any]:
    """Judge a step of a trial and return its record, JSON-able. `ts` is in milliseconds (default: now).

    `decision` is a hash of the inputs: the same sums under the same rule are the same decision. `inputs`
    holds the sums of each arm over its mature cohorts, each user's first impressions up to
    gate.max_impressions_per_user, and, under `cohorts`, the users, impressions, clicks
    and orders of each cohort. Raises SidstreamError when the arms are no trial.
    """
    names = {arm.name for arm in arms}
    if not {CHAMPION, SFT} <= names:
        raise SidstreamError(
            f"trial {step_id} has the arms {', '.join(sorted(names))}: nothing is on trial; start one first"
        )
    record: dict[str, Any] = {
        "format": guards.FORMAT,
        "trial": step_id,
        "mode": mode or settings.mode,
        "settings": settings.model_dump(exclude={"mode"}),
        "arms": {
            arm.name: {"bundle": arm.bundle, "version": arm.version, "weight": arm.weight} for arm in arms
        },
        "inputs": {
            arm.name: _inputs(outcomes.get(arm.name), settings.max_impressions_per_user) for arm in arms
        },
    }
    record["decision"] = guards.decision_id(record)
    return (
        record
        | _judge_record(record).as_dict()
        | {
            "ts": time.time_ns() // 1_000_000 if ts is None else ts,
            "sidstream": version("sidstream"),
        }
    )


def rejudge(record: Mapping[str, Any]) -> Judgement:
    """The judgement that follows from a record's own sums and settings.

    Raises SidstreamError when the record was changed (its id is not the hash of its inputs), was made by
    hand, or has another format.
    """
    if record.get("mode") == "manual":
        raise SidstreamError(
            f"decision {record.get('decision')} was made by hand, not by sums: {record.get('sentence')}"
        )
    try:
        if record["format"] != guards.FORMAT:
            raise SidstreamError(
                f"the decision has format {record['format']}; this version of sidstream reads {guards.FORMAT}"
            )
        of_guards = ("watched", "control") if record["mode"] == "guard" else ()
        hashed = ("format", "trial", "mode", "settings", "arms", *of_guards, "inputs")
        actual_id = guards.decision_id({key: record[key] for key in hashed})
        if actual_id != record["decision"]:
            raise SidstreamError(
                f"decision {record['decision']} was changed: its inputs are those of {actual_id}"
            )
        if record["mode"] == "guard":
            verdict = guards.recompute_verdict(record)
            return Judgement([], None, verdict["verdict"], verdict["winner"], verdict["sentence"])
        return _judge_record(record)
    except (KeyError, TypeError, ValueError) as error:
        raise SidstreamError(f"the decision record is incomplete ({error})") from error


def recompute(record: Mapping[str, Any]) -> tuple[Verdict, str]:
    """The verdict and the winner's arm that follow from a record. Raises SidstreamError as `rejudge` does."""
    judgement = rejudge(record)
    return judgement.verdict, judgement.winner


def _judge_record(record: Mapping[str, Any]) -> Judgement:
    if record["mode"] not in MODES:
        raise ValueError(f"mode {record['mode']!r}")
    return judge(
        {name: _sums(inputs) for name, inputs in record["inputs"].items()},
        GateSettings(**record["settings"]),
        record["mode"],
        {name: arm["weight"] for name, arm in record["arms"].items()},
        {name: arm["bundle"] for name, arm in record["arms"].items()},
    )


def _inputs(outcomes: ArmOutcomes | None, max_impressions: int) -> dict[str, Any]:
    if outcomes is None:
        return asdict(ArmSums()) | {"cohorts": {}}
    outcomes = outcomes.capped(max_impressions)
    cohorts = {}
    for n, cohort in enumerate(outcomes.cohorts):
        rows = outcomes.counts[:, n]
        cohorts[str(cohort)] = [int((rows[:, 0] > 0).sum()), *map(int, rows[:, :3].sum(axis=0))]
    return asdict(arm_sums(outcomes.total())) | {"cohorts": cohorts}


def _sums(inputs: Mapping[str, Any]) -> ArmSums:
    return ArmSums(**{field.name: inputs[field.name] for field in fields(ArmSums)})


def _reason(comparison: Comparison) -> str:
    return comparison.sentence.partition("; ")[2]
