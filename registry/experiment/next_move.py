"""What comes next for what is in service: a pure function of what was seen, so that a bench may call it too.

CANDIDATE -> offline checks -> off-policy veto (trainer) -> shadow (no exposure) -> canary -> trial at full
weights until the gate or the longest duration -> promoted, rejected or inconclusive; a guard that fires ends
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
    """What is known of the current rollout.

    `mature`: outcomes of mature cohorts by arm; `recent`: the same with the cohorts that are still open, for
    the guard on clicks (all arms are equally young); `health` by arm; `cohort_ms`: length of a cohort.
    """

    mature: Mapping[str, ArmOutcomes]
    recent: Mapping[str, ArmOutcomes]
    health: Mapping[str, ArmHealth]
    cohort_ms: int


@dataclass(frozen=True)
class Move:
    """What to do next, and why. `step`: of the ramp, to advance to; `record`: to conclude or roll back by."""

    do: Literal["wait", "advance", "conclude", "rollback", "train"]
    sentence: str
    step: float | None = None
    record: dict[str, Any] | None = None


def next_move(
    current: Rollout, sight: Evidence, rollout: RolloutSettings, guard: GuardSettings, gate: GateSettings
) -> Move:
    """The next move. With nothing on trial that is to train, or to wait until a promoted model is watched."""
    if current.action == "trial":
        return _on_trial(current, sight, rollout, guard, gate)
    if current.action == "promote":
        return _watched(current, sight, rollout, guard, gate)
    return Move("train", "nothing is on trial")


def _on_trial(
    current: Rollout, sight: Evidence, rollout: RolloutSettings, guard: GuardSettings, gate: GateSettings
) -> Move:
    challengers: list[str] = [arm.name for arm in current.arms if arm.name in (SFT, DPO)]
    alarm = guards.guard_decision(
        current.trial, current.arms, challengers, CHAMPION, sight.health, _sums(sight.recent), guard, gate
    )
    if alarm is not None:
        return Move("conclude", alarm["sentence"], record=alarm)
    at = 1.0 if current.step is None else current.step
    if at < 1:
        return _ramp(at, challengers, sight.health, rollout)
    hours = _hours(sight)
    over = hours >= rollout.max_hours
    if gate.mode == "fixed" and not over:
        return Move("wait", f"mode fixed looks once, at the end: {hours:g} of {rollout.max_hours:g} hours")
    record = decide(current.trial, current.arms, sight.mature, gate)
    if record["verdict"] != "inconclusive" or over:
        return Move("conclude", record["sentence"], record=record)
    return Move("wait", f"{record['sentence']}; {hours:g} of {rollout.max_hours:g} hours", record=record)


def _ramp(
    at: float, challengers: list[str], health: Mapping[str, ArmHealth], rollout: RolloutSettings
) -> Move:
    stage = "shadow" if at == 0 else f"canary at {at:.0%}"
    answered = {name: health.get(name, ArmHealth()).requests for name in challengers}
    told = ", ".join(f"{name} {count}" for name, count in answered.items())
    if min(answered.values()) < rollout.step_requests:
        return Move("wait", f"{stage}: answered {told} of {rollout.step_requests} requests each")
    step = next((step for step in rollout.steps if step > at), 1.0)
    return Move(
        "advance", f"{stage} is passed ({told} requests, no guard fired): on to {step:.0%}", step=step
    )


def _watched(
    current: Rollout, sight: Evidence, rollout: RolloutSettings, guard: GuardSettings, gate: GateSettings
) -> Move:
    control = ANCHOR if any(arm.name == ANCHOR for arm in current.arms) else None
    alarm = guards.guard_decision(
        current.trial, current.arms, [CHAMPION], control, sight.health, _sums(sight.recent), guard, gate
    )
    if alarm is not None:
        return Move("rollback", alarm["sentence"], record=alarm)
    answered = sight.health.get(CHAMPION, ArmHealth()).requests
    if answered < rollout.watch_requests:
        return Move(
            "wait", f"the new champion is watched: {answered} of {rollout.watch_requests} requests answered"
        )
    return Move("train", f"the new champion answered {answered} requests and no guard fired")


def _hours(sight: Evidence) -> float:
    """Event time (hours) from the first mature cohort to the last, both included."""
    cohorts = [cohort for seen in sight.mature.values() for cohort in seen.cohorts]
    if not cohorts:
        return 0.0
    return (max(cohorts) - min(cohorts) + 1) * sight.cohort_ms / _HOUR_MS


def _sums(seen: Mapping[str, ArmOutcomes]) -> dict[str, ArmSums]:
    return {name: arm_sums(rows.total()) for name, rows in seen.items()}
