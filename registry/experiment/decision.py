"""The decision record: One4All applied twice, with everything that is needed to compute it again.

First the aligned model against the fine-tuned one it came from; whichever goes on is then held against the
champion. Where the two are not told apart and the fine-tuned one is shown to harm, the aligned one is held
against the champion itself. The order is fixed beforehand, and all comparisons read the same trial. A
candidate that would be promoted must also have kept its CTR against the anchor, where the trial holds users
out on one, and nothing is promoted or rejected on arms whose users are not those that were dealt to them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from registry.arms import ANCHOR, CHAMPION, DPO, SFT
from registry.experiment import data_quality, guards
from registry.experiment.gate import MODES, Comparison, Verdict, compare, compare_with_anchor
from registry.experiment.statistics import ArmSums, arm_sums
from registry.settings import GateSettings
from streams.errors import SidstreamError
from streams.events import Arm

if TYPE_CHECKING:
    from registry.experiment.outcomes import ArmOutcomes

FORMAT = 2


@dataclass(frozen=True)
class Judgement:
    """The comparisons in order, that with the anchor if any, the verdict, the winner's arm, one sentence."""

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
    anchored: Mapping[str, str],
) -> Judgement:
    """Judge a trial from the sums of its arms.

    `weights` are the arms' shares of users, `anchored` their bundles. The aligned model goes on only where it
    is promoted over the fine-tuned one, or where the fine-tuned one is shown to harm and the two are not told
    apart; without an aligned arm there is one comparison. The verdict is that
    of the last one, unless the anchor or the sample-ratio check objects: then a promotion is inconclusive (a
    reject where the anchor shows harm).
    """
    comparisons = []
    candidate = SFT
    if DPO in weights:
        first = compare(DPO, SFT, arms, settings, mode)
        comparisons.append(first)
        candidate = DPO if first.verdict == "promote" else SFT
    last = compare(candidate, CHAMPION, arms, settings, mode)
    comparisons.append(last)
    if DPO in weights and last.verdict == "reject" and comparisons[0].verdict == "inconclusive":
        # What is shown to do harm is no yardstick: the aligned model need not beat it, but the champion.
        candidate = DPO
        last = compare(candidate, CHAMPION, arms, settings, mode)
        comparisons.append(last)
    verdict, reason = last.verdict, _reason(last)
    anchor = None
    if ANCHOR in weights and anchored[ANCHOR] != anchored[candidate]:
        anchor = compare_with_anchor(candidate, ANCHOR, arms, settings, mode)
        if anchor.verdict == "reject" or (verdict == "promote" and anchor.verdict != "promote"):
            verdict, reason = anchor.verdict, f"against the anchor: {_reason(anchor)}"
    mismatch = data_quality.sample_ratio_mismatch(
        {name: arms[name].users for name in weights if name in arms}, weights, settings.srm_alpha
    )
    if mismatch:
        verdict, reason = "inconclusive", mismatch
    if anchored[candidate] == anchored[CHAMPION] and not mismatch:
        # An A/A trial: both arms are one bundle, so whatever is found is chance, or a fault of what measures.
        if verdict == "inconclusive":
            reason = f"an A/A trial finds no difference, as it should ({_reason(last)})"
        else:
            reason = (
                f"an A/A trial finds a difference: chance, in {settings.alpha:.0%} a side; if it comes "
                f"again, arms are not dealt, answered or counted alike ({_reason(last)})"
            )
            verdict = "reject"
    label = "" if mode == "sequential" else f" (mode {mode})"
    said = {
        "promote": f"promote {candidate}{label}",
        "reject": f"reject {candidate}{label}",
        "inconclusive": f"inconclusive on {candidate}{label}, the champion stays",
    }[verdict]
    winner = candidate if verdict == "promote" else CHAMPION
    return Judgement(comparisons, anchor, verdict, winner, f"{said}: {reason}")


def decide(
    trial: str,
    arms: list[Arm],
    seen: Mapping[str, ArmOutcomes],
    settings: GateSettings,
    mode: str | None = None,
    ts: int | None = None,
) -> dict[str, Any]:
    """The record of a decision about a trial, JSON-able. `ts` is in milliseconds (default: now).

    `decision` is a hash of what was decided on: the same sums under the same rule are the same decision.
    `inputs` holds for each arm the sums over its mature cohorts and, under `cohorts`, for each of them the
    users, impressions, clicks and orders. Raises SidstreamError when the arms are no trial.
    """
    names = {arm.name for arm in arms}
    if not {CHAMPION, SFT} <= names:
        raise SidstreamError(
            f"trial {trial} has the arms {', '.join(sorted(names))}: nothing is on trial; start one first"
        )
    record: dict[str, Any] = {
        "format": FORMAT,
        "trial": trial,
        "mode": mode or settings.mode,
        "settings": settings.model_dump(exclude={"mode"}),
        "arms": {
            arm.name: {"bundle": arm.bundle, "version": arm.version, "weight": arm.weight} for arm in arms
        },
        "inputs": {arm.name: _inputs(seen.get(arm.name)) for arm in arms},
    }
    record["decision"] = guards.decision_id(record)
    return (
        record
        | _judge(record).as_dict()
        | {
            "ts": time.time_ns() // 1_000_000 if ts is None else ts,
            "sidstream": version("sidstream"),
        }
    )


def rejudge(record: Mapping[str, Any]) -> Judgement:
    """What follows from a record's own sums and settings.

    Raises SidstreamError when the record was changed (its inputs are not those that it is named by), was made
    by hand, or has another format.
    """
    if record.get("mode") == "manual":
        raise SidstreamError(
            f"decision {record.get('decision')} was made by hand, not by sums: {record.get('sentence')}"
        )
    try:
        if record["format"] != FORMAT:
            raise SidstreamError(
                f"the decision has format {record['format']}; this version of sidstream reads {FORMAT}"
            )
        guarded = ("watched", "control") if record["mode"] == "guard" else ()
        what = ("format", "trial", "mode", "settings", "arms", *guarded, "inputs")
        named = {key: record[key] for key in what}
        if guards.decision_id(named) != record["decision"]:
            raise SidstreamError(
                f"decision {record['decision']} was changed: its inputs are those of {guards.decision_id(named)}"
            )
        if record["mode"] == "guard":
            made = guards.recompute_verdict(record)
            return Judgement([], None, made["verdict"], made["winner"], made["sentence"])
        return _judge(record)
    except (KeyError, TypeError, ValueError) as error:
        raise SidstreamError(f"the decision record is incomplete ({error})") from error


def recompute(record: Mapping[str, Any]) -> tuple[Verdict, str]:
    """The verdict and the winner's arm that follow from a record. Raises SidstreamError as `rejudge` does."""
    made = rejudge(record)
    return made.verdict, made.winner


def _judge(record: Mapping[str, Any]) -> Judgement:
    if record["mode"] not in MODES:
        raise ValueError(f"mode {record['mode']!r}")
    return judge(
        {name: _sums(inputs) for name, inputs in record["inputs"].items()},
        GateSettings(**record["settings"]),
        record["mode"],
        {name: arm["weight"] for name, arm in record["arms"].items()},
        {name: arm["bundle"] for name, arm in record["arms"].items()},
    )


def _inputs(seen: ArmOutcomes | None) -> dict[str, Any]:
    if seen is None:
        return asdict(ArmSums()) | {"cohorts": {}}
    cohorts = {}
    for n, cohort in enumerate(seen.cohorts):
        rows = seen.counts[:, n]
        cohorts[str(cohort)] = [int((rows[:, 0] > 0).sum()), *map(int, rows.sum(axis=0))]
    return asdict(arm_sums(seen.total())) | {"cohorts": cohorts}


def _sums(inputs: Mapping[str, Any]) -> ArmSums:
    return ArmSums(**{field.name: inputs[field.name] for field in fields(ArmSums)})


def _reason(comparison: Comparison) -> str:
    return comparison.sentence.partition("; ")[2]
