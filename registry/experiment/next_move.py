"""The next move for the bundles in service: a pure function of the evidence, which benchmarks can call, too.

CANDIDATE -> offline checks -> off-policy veto (trainer) -> shadow (no exposure) -> canary -> trial at full
weights until the gate or the longest duration -> promoted, rejected or inconclusive. A guard that fires ends
the trial, or takes a freshly promoted champion back, at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from registry.arms import ANCHOR, CHAMPION, DPO, SFT
from registry.experiment import guards
from registry.experiment.decision import decide
from registry.experiment.health import ArmHealth
from registry.experiment.outcomes import ArmOutcomes
from registry.experiment.statistics import ArmSums, arm_sums
from registry.settings import GateSettings, GuardSettings, RolloutSettings
from streams.events import Rollout

_HOUR_MS = 3_600_000


@dataclass(frozen=True)
class Evidence:
    """The data about the rollout in service.

    `mature`: outcomes of mature cohorts by arm; `recent`: outcomes of all cohorts, for the guard on clicks
    (all arms are equally young); `health` by arm; `cohort_ms`: length of a cohort in milliseconds.
    """

    mature: Mapping[str, ArmOutcomes]
    recent: Mapping[str, ArmOutcomes]
    health: Mapping[str, ArmHealth]
    cohort_ms: int


@dataclass(frozen=True)
class Move:
    """What to do next, and why.

    `step`: the step of the ramp to advance to; `record`: the decision record to conclude or to roll back by.
    """

    do: Literal["wait", "advance", "conclude", "rollback", "train"]
    sentence: str
    step: float | None = None
    record: dict[str, Any] | None = None


def next_move(
    current: Rollout, evidence: Evidence, rollout: RolloutSettings, guard: GuardSettings, gate: GateSettings
) -> Move:
    """The next move. With nothing on trial: train, or wait while a freshly promoted model is watched."""
    if current.action == "trial":
        return _on_trial(current, evidence, rollout, guard, gate)
    if current.action == "promote":
        return _while_watched(current, evidence, rollout, guard, gate)
    return Move("train", "nothing is on trial")


def _on_trial(
    current: Rollout, evidence: Evidence, rollout: RolloutSettings, guard: GuardSettings, gate: GateSettings
) -> Move:
    challengers: list[str] = [arm.name for arm in current.arms if arm.name in (SFT, DPO)]
    alarm = guards.guard_decision(
        current.trial,
        current.arms,
        challengers,
        CHAMPION,
        evidence.health,
        _sums(evidence.recent, gate),
        guard,
        gate,
    )
    if alarm is not None:
        return Move("conclude", alarm["sentence"], record=alarm)
    at = 1.0 if current.step is None else current.step
    if at < 1:
        return _ramp(at, challengers, evidence.health, rollout)
    hours = _hours(evidence)
    time_is_up = hours >= rollout.max_hours
    if gate.mode == "fixed" and not time_is_up:
        return Move("wait", f"mode fixed looks once, at the end: {hours:g} of {rollout.max_hours:g} hours")
    record = decide(current.trial, current.arms, evidence.mature, gate)
    if record["verdict"] != "inconclusive" or time_is_up:
        return Move("conclude", record["sentence"], record=record)
    return Move("wait", f"{record['sentence']}; {hours:g} of {rollout.max_hours:g} hours", record=record)


def _ramp(
    at: float, challengers: list[str], health: Mapping[str, ArmHealth], rollout: RolloutSettings
) -> Move:
    phase = "shadow" if at == 0 else f"canary at {at:.0%}"
    requests = {name: health.get(name, ArmHealth()).requests for name in challengers}
    counts = ", ".join(f"{name} {count}" for name, count in requests.items())
    if min(requests.values()) < rollout.step_requests:
        return Move("wait", f"{phase}: answered {counts} of {rollout.step_requests} requests each")
    step = next((step for step in rollout.steps if step > at), 1.0)
    return Move(
        "advance", f"{phase} is passed ({counts} requests, no guard fired): on to {step:.0%}", step=step
    )


def _while_watched(
    current: Rollout, evidence: Evidence, rollout: RolloutSettings, guard: GuardSettings, gate: GateSettings
) -> Move:
    control = ANCHOR if any(arm.name == ANCHOR for arm in current.arms) else None
    alarm = guards.guard_decision(
        current.trial,
        current.arms,
        [CHAMPION],
        control,
        evidence.health,
        _sums(evidence.recent, gate),
        guard,
        gate,
    )
    if alarm is not None:
        return Move("rollback", alarm["sentence"], record=alarm)
    answered = evidence.health.get(CHAMPION, ArmHealth()).requests
    if answered < rollout.watch_requests:
        return Move(
            "wait", f"the new champion is watched: {answered} of {rollout.watch_requests} requests answered"
        )
    return Move("train", f"the new champion answered {answered} requests and no guard fired")


def _hours(evidence: Evidence) -> float:
    """Event time (hours) from the first mature cohort to the last, both included."""
    cohorts = [cohort for outcomes in evidence.mature.values() for cohort in outcomes.cohorts]
    if not cohorts:
        return 0.0
    return (max(cohorts) - min(cohorts) + 1) * evidence.cohort_ms / _HOUR_MS


def _sums(outcomes: Mapping[str, ArmOutcomes], gate: GateSettings) -> dict[str, ArmSums]:
    return {
        name: arm_sums(rows.capped(gate.max_impressions_per_user).total()) for name, rows in outcomes.items()
    }
