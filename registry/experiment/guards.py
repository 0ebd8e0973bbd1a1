"""Guards: an arm that is shown to fail, be slow, waste probability or lose clicks is taken off at once.

Each guard compares the mean of a value in [0, 1] per request (for time: per call of the model) with a limit,
by a test that is valid after every request. A fault that the control arm has too is not the challenger's: a
slow Redis or a busy machine ends no trial.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from scipy.special import betaincc, betaln

from registry.arms import ANCHOR, CHAMPION
from registry.experiment import data_quality
from registry.experiment.gate import compare_with_anchor
from registry.experiment.health import ArmHealth
from registry.experiment.statistics import ArmSums
from registry.settings import GateSettings, GuardSettings
from streams.events import Arm

# Of every decision record. 3: orders per impression, and the alpha of each comparison.
FORMAT = 3


@dataclass(frozen=True)
class Alarm:
    """A guard that fired: the arm, the guard, the observed value, the limit, and one sentence."""

    arm: str
    guard: str
    value: float
    limit: float
    sentence: str


def log_evidence(total: float, count: int, limit: float) -> float:
    """log evidence that the mean of `count` values in [0, 1], whose sum is `total`, is above `limit`.

    The likelihood ratio of a Bernoulli(q) against Bernoulli(limit), mixed evenly over q in (limit, 1):
    int q^S (1-q)^(n-S) dq / ((1-p) p^S (1-p)^(n-S)). Each factor is convex in the value, so that for any
    values in [0, 1] whose mean, given the past, is at most the limit it is a supermartingale from 1, and by
    Ville's inequality P(evidence >= 1/alpha, ever) <= alpha (Robbins 1970; Waudby-Smith and Ramdas 2024).
    """
    if limit >= 1 or count == 0:
        return -math.inf if count else 0.0
    if limit <= 0:
        return math.inf if total > 0 else 0.0
    rest = count - total
    upper = float(betaincc(total + 1, rest + 1, limit))
    if upper <= 0:
        return -math.inf
    mixture = float(betaln(total + 1, rest + 1)) + math.log(upper) - math.log1p(-limit)
    return mixture - total * math.log(limit) - rest * math.log1p(-limit)


def health_alarms(
    health: Mapping[str, ArmHealth], arms: list[str], control: str | None, settings: GuardSettings
) -> list[Alarm]:
    """The guards on failures, model time and invalid mass that fire on one of `arms`.

    The guard on invalid mass needs a control: the mass depends on the catalogue and on the items that
    requests exclude. Its limit is therefore the control's mean plus `settings.invalid`.
    """
    reference = health.get(control, ArmHealth()) if control is not None else ArmHealth()
    alarms = []
    for arm in arms:
        observed = health.get(arm, ArmHealth())
        calls, control_calls = sum(observed.times.values()), sum(reference.times.values())
        slow, control_slow = observed.slower(settings.slow_ms), reference.slower(settings.slow_ms)
        # A model that learned repeats spends more on items that requests exclude: only an excess is a fault.
        invalid = reference.invalid / reference.requests + settings.invalid if reference.requests else 1.0
        for guard, total, count, limit, excused, text in (
            ("failed", observed.failed, observed.requests, settings.failed,
             reference.failed > settings.failed * reference.requests,
             "its model failed on {:.2%} of {} requests"),
            ("slow", slow, calls, settings.slow, control_slow > settings.slow * control_calls,
             f"{{:.2%}} of {{}} calls took more than {settings.slow_ms:g} ms"),
            ("invalid", observed.invalid, observed.requests, invalid, False,
             "it spends {:.2%} of its probability on no item, over {} requests"),
        ):  # fmt: skip
            if not excused and log_evidence(total, count, limit) > -math.log(settings.alpha):
                sentence = f"{arm}: {text.format(total / count, count)}, the limit is {limit:.2%}"
                alarms.append(Alarm(arm, guard, total / count, limit, sentence))
    return alarms


def click_alarms(
    sums: Mapping[str, ArmSums],
    arms: list[str],
    control: str,
    gate: GateSettings,
    alpha: float,
    margin: float,
) -> list[Alarm]:
    """The guard on clicks: CTR is shown to be below (1 - margin) of the control's, by the gate's own test."""
    strict = gate.model_copy(update={"alpha": alpha, "anchor_margin": margin})
    alarms = []
    for arm in arms:
        comparison = compare_with_anchor(arm, control, dict(sums), strict, "sequential")
        ctr = comparison.ctr
        if comparison.verdict == "reject" and ctr is not None and ctr["p_below"] < alpha:
            ratio = ctr["target"] / ctr["control"]
            sentence = (
                f"{arm}: CTR {ctr['target']:.2%} is shown to be below {1 - margin:.0%} of {control}'s "
                f"{ctr['control']:.2%}"
            )
            alarms.append(Alarm(arm, "ctr", ratio, 1 - margin, sentence))
    return alarms


def _sample_ratio_alarms(
    sums: Mapping[str, ArmSums], weights: Mapping[str, float], alpha: float
) -> list[Alarm]:
    """The guard on users: on a sample-ratio mismatch no rate can be trusted."""
    users = {name: sums[name].users for name in weights if name in sums}
    mismatch = data_quality.sample_ratio_mismatch(users, weights, alpha)
    return [Alarm("all", "users", 0.0, alpha, mismatch)] if mismatch else []


def alarms_of(record: Mapping[str, Any]) -> list[Alarm]:
    """The alarms that follow from a guard's record: its inputs, its settings."""
    inputs = record["inputs"]
    health = {name: _health_from_json(stored) for name, stored in inputs["health"].items()}
    sums = {name: ArmSums(**stored) for name, stored in inputs["sums"].items()}
    settings, gate = GuardSettings(**record["settings"]["guards"]), GateSettings(**record["settings"]["gate"])
    watched, control = list(record["watched"]), record["control"]
    alarms = health_alarms(health, watched, control, settings)
    weights = {name: arm["weight"] for name, arm in record["arms"].items()}
    if CHAMPION not in watched and len([weight for weight in weights.values() if weight > 0]) > 1:
        alarms += _sample_ratio_alarms(sums, weights, gate.srm_alpha)
    if control is not None:
        margin = gate.anchor_margin if control == ANCHOR else gate.margin
        alarms += click_alarms(sums, watched, control, gate, settings.alpha, margin)
    return alarms


def guard_decision(
    step_id: str,
    arms: list[Arm],
    watched: list[str],
    control: str | None,
    health: Mapping[str, ArmHealth],
    sums: Mapping[str, ArmSums],
    guards: GuardSettings,
    gate: GateSettings,
    ts: int | None = None,
) -> dict[str, Any] | None:
    """The decision record of the guards that fire; None where none fires. `alarms_of` recomputes it.

    `watched`: names of the arms that are guarded. `winner` in the record: the champion where challengers were
    watched, else `previous`, the champion's predecessor.
    """
    names = [arm.name for arm in arms]
    record: dict[str, Any] = {
        "format": FORMAT,
        "trial": step_id,
        "mode": "guard",
        "settings": {"guards": guards.model_dump(), "gate": gate.model_dump()},
        "arms": {
            arm.name: {"bundle": arm.bundle, "version": arm.version, "weight": arm.weight} for arm in arms
        },
        "watched": watched,
        "control": control,
        "inputs": {
            "health": {name: _health_to_json(health[name]) for name in names if name in health},
            "sums": {name: asdict(sums[name]) for name in names if name in sums},
        },
    }
    alarms = alarms_of(record)
    if not alarms:
        return None
    record["decision"] = decision_id(record)
    return record | _verdict(record, alarms) | {
        "ts": time.time_ns() // 1_000_000 if ts is None else ts,
        "sidstream": version("sidstream"),
    }  # fmt: skip


def recompute_verdict(record: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict, winner and sentence that follow from a guard's record."""
    return _verdict(record, alarms_of(record))


def _verdict(record: Mapping[str, Any], alarms: list[Alarm]) -> dict[str, Any]:
    if not alarms:
        return {"verdict": "inconclusive", "winner": CHAMPION, "alarms": [], "sentence": "no guard fires"}
    champion_watched = CHAMPION in record["watched"]
    effect = "back to its predecessor" if champion_watched else "the trial ends, the champion stays"
    return {
        "verdict": "reject",
        "winner": "previous" if champion_watched else CHAMPION,
        "alarms": [asdict(alarm) for alarm in alarms],
        "sentence": f"a guard fired, {effect}: {'; '.join(alarm.sentence for alarm in alarms)}",
    }


def decision_id(record: Mapping[str, Any]) -> str:
    """The id of a decision: a hash (16 hex digits) of its inputs and its rule."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _health_to_json(health: ArmHealth) -> dict[str, Any]:
    # JSON has no infinity, and its keys are text.
    return asdict(health) | {"times": {f"{bound:g}": count for bound, count in sorted(health.times.items())}}


def _health_from_json(stored: Mapping[str, Any]) -> ArmHealth:
    return ArmHealth(**(dict(stored) | {"times": {float(b): n for b, n in stored["times"].items()}}))
