"""Guards: an arm that is shown to fail, to be slow, to waste its probability or to lose clicks goes at once.

Each guard holds the mean of something between 0 and 1 per request (of time: per call of the model) against a
limit, by a test that may be
looked at after every request. A fault that the control arm has as well is not the challenger's: a slow Redis
or a busy machine ends no trial.
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


@dataclass(frozen=True)
class Alarm:
    """A guard that fired: on which arm, the value that it saw, the limit, and one sentence."""

    arm: str
    guard: str
    value: float
    limit: float
    sentence: str


def log_evidence(total: float, count: int, limit: float) -> float:
    """log of the evidence that the mean of `count` values in [0, 1], `total` in sum, is above `limit`.

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

    The last needs a control: what a model spends on no item hangs on the catalogue and on what requests
    exclude, so the limit is the control's mean and `settings.invalid` more.
    """
    reference = health.get(control, ArmHealth()) if control is not None else ArmHealth()
    found = []
    for arm in arms:
        seen = health.get(arm, ArmHealth())
        calls, others = sum(seen.times.values()), sum(reference.times.values())
        slow, slow_there = seen.slower(settings.slow_ms), reference.slower(settings.slow_ms)
        # Who learned repeats spends more on items that requests exclude: only an excess is a fault.
        spent = reference.invalid / reference.requests + settings.invalid if reference.requests else 1.0
        for guard, total, count, limit, excused, told in (
            ("failed", seen.failed, seen.requests, settings.failed,
             reference.failed > settings.failed * reference.requests,
             "its model failed on {:.2%} of {} requests"),
            ("slow", slow, calls, settings.slow, slow_there > settings.slow * others,
             f"{{:.2%}} of {{}} calls took more than {settings.slow_ms:g} ms"),
            ("invalid", seen.invalid, seen.requests, spent, False,
             "it spends {:.2%} of its probability on no item, over {} requests"),
        ):  # fmt: skip
            if not excused and log_evidence(total, count, limit) > -math.log(settings.alpha):
                sentence = f"{arm}: {told.format(total / count, count)}, the limit is {limit:.2%}"
                found.append(Alarm(arm, guard, total / count, limit, sentence))
    return found


def click_alarms(
    sums: Mapping[str, ArmSums],
    arms: list[str],
    control: str,
    gate: GateSettings,
    alpha: float,
    margin: float,
) -> list[Alarm]:
    """The guard on clicks: CTR shown to be below (1 - margin) of the control's, by the gate's own test."""
    strict = gate.model_copy(update={"alpha": alpha, "anchor_margin": margin})
    found = []
    for arm in arms:
        made = compare_with_anchor(arm, control, dict(sums), strict, "sequential")
        if made.verdict == "reject" and made.ctr is not None:
            ratio = made.ctr["target"] / made.ctr["control"]
            sentence = (
                f"{arm}: CTR {made.ctr['target']:.2%} is shown to be below {1 - margin:.0%} of {control}'s "
                f"{made.ctr['control']:.2%}"
            )
            found.append(Alarm(arm, "ctr", ratio, 1 - margin, sentence))
    return found


def _dealt(sums: Mapping[str, ArmSums], weights: Mapping[str, float], alpha: float) -> list[Alarm]:
    """The guard on users: are they those that the weights dealt out? If not, no rate can be trusted."""
    users = {name: sums[name].users for name in weights if name in sums}
    told = data_quality.sample_ratio_mismatch(users, weights, alpha)
    return [Alarm("all", "users", 0.0, alpha, told)] if told else []


def alarms_of(record: Mapping[str, Any]) -> list[Alarm]:
    """The alarms that follow from a guard's record: its inputs, its settings."""
    inputs = record["inputs"]
    health = {name: _health(seen) for name, seen in inputs["health"].items()}
    sums = {name: ArmSums(**seen) for name, seen in inputs["sums"].items()}
    settings, gate = GuardSettings(**record["settings"]["guards"]), GateSettings(**record["settings"]["gate"])
    watched, control = list(record["watched"]), record["control"]
    found = health_alarms(health, watched, control, settings)
    weights = {name: arm["weight"] for name, arm in record["arms"].items()}
    if CHAMPION not in watched and len([weight for weight in weights.values() if weight > 0]) > 1:
        found += _dealt(sums, weights, gate.srm_alpha)
    if control is not None:
        margin = gate.anchor_margin if control == ANCHOR else gate.margin
        found += click_alarms(sums, watched, control, gate, settings.alpha, margin)
    return found


def guard_decision(
    trial: str,
    arms: list[Arm],
    watched: list[str],
    control: str | None,
    health: Mapping[str, ArmHealth],
    sums: Mapping[str, ArmSums],
    guards: GuardSettings,
    gate: GateSettings,
    ts: int | None = None,
) -> dict[str, Any] | None:
    """A guard's record, as a decision: None where all is well. It recomputes from itself (`judge`).

    `winner`: the champion where challengers were watched, else its predecessor.
    """
    names = [arm.name for arm in arms]
    record: dict[str, Any] = {
        "format": 2,
        "trial": trial,
        "mode": "guard",
        "settings": {"guards": guards.model_dump(), "gate": gate.model_dump()},
        "arms": {
            arm.name: {"bundle": arm.bundle, "version": arm.version, "weight": arm.weight} for arm in arms
        },
        "watched": watched,
        "control": control,
        "inputs": {
            "health": {name: _plain(health[name]) for name in names if name in health},
            "sums": {name: asdict(sums[name]) for name in names if name in sums},
        },
    }
    found = alarms_of(record)
    if not found:
        return None
    record["decision"] = decision_id(record)
    return record | _verdict(record, found) | {
        "ts": time.time_ns() // 1_000_000 if ts is None else ts,
        "sidstream": version("sidstream"),
    }  # fmt: skip


def recompute_verdict(record: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict, winner and sentence that follow from a guard's record."""
    return _verdict(record, alarms_of(record))


def _verdict(record: Mapping[str, Any], found: list[Alarm]) -> dict[str, Any]:
    watched = "champion" if "champion" in record["watched"] else "challengers"
    if not found:
        return {"verdict": "inconclusive", "winner": "champion", "alarms": [], "sentence": "no guard fires"}
    told = "; ".join(alarm.sentence for alarm in found)
    said = "back to its predecessor" if watched == "champion" else "the trial ends, the champion stays"
    return {
        "verdict": "reject",
        "winner": "previous" if watched == "champion" else "champion",
        "alarms": [asdict(alarm) for alarm in found],
        "sentence": f"a guard fired, {said}: {told}",
    }


def decision_id(record: Mapping[str, Any]) -> str:
    """The id of a decision: a hash of what was decided on, and by which rule."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _plain(health: ArmHealth) -> dict[str, Any]:
    # JSON has no infinity, and its keys are text.
    return asdict(health) | {"times": {f"{bound:g}": count for bound, count in sorted(health.times.items())}}


def _health(stored: Mapping[str, Any]) -> ArmHealth:
    return ArmHealth(**(dict(stored) | {"times": {float(b): n for b, n in stored["times"].items()}}))
