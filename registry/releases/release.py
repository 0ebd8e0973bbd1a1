"""Release steps: start, trial and its ramp, conclusion, promotion by hand, rollback.

Each function decides what a step changes, given what is in service. registry.releases.journal carries out the
step so that it survives a kill -9. The caller holds the lease of registry.releases.lease.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Mapping
from typing import Any

from registry.arms import ANCHOR, CHAMPION, DPO, SFT
from registry.bundles.store import PREVIOUS_CHAMPION, STATE, Registry
from registry.experiment.decision import recompute
from registry.releases.journal import (
    Publisher,
    ReleaseStep,
    disagreement,
    finish_step,
    newest_step,
    take_step,
    unfinished,
)
from registry.settings import RolloutSettings
from streams.errors import SidstreamError
from streams.events import Arm, Rollout

__all__ = [
    "Publisher", "advance", "conclude", "disagreement", "finish_step", "promote", "rollback", "start",
    "start_trial", "unfinished",
]  # fmt: skip


def start(registry: Registry, client: Publisher, version: str) -> Rollout:
    """Put the first bundle in service, as champion and anchor.

    Raises SidstreamError when another champion is there: that takes a trial, or `sidstream promote`.
    """
    finish_step(registry, client)
    champion = registry.alias(CHAMPION)
    if champion not in (None, version):
        raise SidstreamError(
            f"version {champion} is champion already; put {version} on trial, "
            f"or use `sidstream promote {version}`"
        )
    arms = [_arm(registry, CHAMPION, version, 1.0)]
    aliases = _aliases(arms)
    if registry.alias(ANCHOR) is None:
        aliases[ANCHOR] = version
    # A derived id: a start that is repeated is the same step.
    step_id = _derived_id("start", registry.name, version)
    tags = [*_abandoned(registry), (version, STATE, "promoted")]
    return take_step(
        registry,
        client,
        ReleaseStep(action="start", step_id=step_id, arms=arms, aliases=aliases, tags=tags, ts=_now()),
    )


def start_trial(
    registry: Registry, client: Publisher, sft_version: str, dpo_version: str | None,
    rollout: RolloutSettings, step: float = 1.0,
) -> Rollout:  # fmt: skip
    """Start a trial, under a new trial id: the challengers get the share `step` of their full weights.

    Step 0 is a shadow: the challengers are loaded and measured, and nobody sees their answers. The champion
    alone, as `sft_version`, is an A/A trial: a difference in it is chance, or a fault in how users are dealt,
    served or counted. Raises SidstreamError without a champion, or where a version is compared with itself.
    """
    finished = finish_step(registry, client)
    versions = [version for version in (sft_version, dpo_version) if version is not None]
    if finished is not None and finished.action == "trial":
        challengers = [arm.version for arm in finished.arms if arm.name in (SFT, DPO)]
        if sorted(challengers) == sorted(versions):
            return finished
    champion = registry.alias(CHAMPION)
    if champion is None:
        raise SidstreamError(
            "nothing is in service to hold a trial against: register and start a champion first"
        )
    if len({champion, *versions}) <= len(versions) and versions != [champion]:
        raise SidstreamError(
            f"a trial of versions {', '.join([champion, *versions])} compares a version with itself"
        )
    arms = _trial_arms(registry, champion, sft_version, dpo_version, rollout, step)
    return take_step(registry, client, ReleaseStep(
        action="trial", step_id=uuid.uuid4().hex[:16], trial_id=uuid.uuid4().hex[:16], step=step, arms=arms,
        aliases=_aliases(arms), tags=[*_abandoned(registry), *_challenger_states(arms, step)], ts=_now(),
    ))  # fmt: skip


def advance(registry: Registry, client: Publisher, step: float, rollout: RolloutSettings) -> Rollout:
    """Take the running trial to the next step of its ramp.

    The trial id stays, so that users only move from the champion to a challenger. The step id is new, so that
    outcomes are summed under one set of weights. Raises SidstreamError when no trial is running, or where
    `step` is not above the current one, unless a crash interrupted that very step: then it is finished.
    """
    finished = finish_step(registry, client)
    if finished is not None and finished.action == "trial" and finished.step == step:
        return finished
    running = newest_step(registry)
    if running is None or running.action != "trial":
        raise SidstreamError("no trial is running, so there is no next step; `sidstream train` starts one")
    at = 1.0 if running.step is None else running.step
    if not at < step <= 1:
        raise SidstreamError(
            f"the trial is at step {at:g}, the next is {step:g}: it must be above, 1 at most"
        )
    versions: dict[str, str] = {arm.name: arm.version for arm in running.arms}
    trial_id = running.trial_id or running.step_id
    arms = _trial_arms(registry, versions[CHAMPION], versions[SFT], versions.get(DPO), rollout, step)
    return take_step(registry, client, ReleaseStep(
        action="trial", step_id=_derived_id("step", trial_id, f"{step:g}"), trial_id=trial_id, step=step,
        arms=arms, aliases=_aliases(arms), tags=_challenger_states(arms, step), ts=_now(),
    ))  # fmt: skip


def conclude(
    registry: Registry, client: Publisher, decision: Mapping[str, Any], rollout: RolloutSettings
) -> Rollout:
    """End a trial by its decision record: the record's winner serves all users.

    Idempotent by the decision's id. Raises SidstreamError when the record does not follow from its own
    inputs, when the winner's bundle is damaged, or when another step was taken since the decision.
    """
    finish_step(registry, client)
    record = dict(decision)
    verdict, winner = recompute(record)
    if (verdict, winner) != (record["verdict"], record["winner"]):
        raise SidstreamError(
            f"decision {record['decision']} says {record['verdict']}, winner {record['winner']}; "
            f"its sums say {verdict}, winner {winner}; run `sidstream gate` again"
        )
    versions = {name: arm["version"] for name, arm in record["arms"].items()}
    after = versions[winner]
    step_id = _derived_id("conclude", record["decision"])
    _check_not_outdated(registry, record, step_id)
    # The trial does not judge the anchor, which keeps the record that promoted it.
    judged = sorted(versions.keys() - {ANCHOR})
    state = "rejected" if verdict == "reject" else "inconclusive"
    # The sibling of a promoted challenger was not harmful, only not the best: inconclusive.
    tags = [(versions[name], STATE, state) for name in judged if versions[name] != versions[CHAMPION]]
    if after != versions[CHAMPION]:
        tags = [*(row for row in tags if row[0] != after), (after, STATE, "promoted")]
        tags.append((after, PREVIOUS_CHAMPION, versions[CHAMPION]))
    arms = _arms_without_trial(registry, after, rollout)
    return take_step(registry, client, ReleaseStep(
        action=verdict, step_id=step_id, arms=arms, aliases=_aliases(arms), tags=tags, ts=_now(),
        record=record["decision"], recorded=list(dict.fromkeys(versions[name] for name in judged)),
    ), record)  # fmt: skip


def promote(registry: Registry, client: Publisher, version: str, rollout: RolloutSettings) -> Rollout:
    """Put a version in service by hand, without a trial; running trials end.

    Raises SidstreamError when its bundle is damaged.
    """
    finish_step(registry, client)
    before = registry.alias(CHAMPION)
    record = _manual_record("promote", before, version)
    arms = _arms_without_trial(registry, version, rollout)
    aliases = _aliases(arms)
    tags = [*_abandoned(registry), (version, STATE, "promoted")]
    if before is None and registry.alias(ANCHOR) is None:
        aliases[ANCHOR] = version
    if before not in (None, version):
        tags.append((version, PREVIOUS_CHAMPION, str(before)))
    return take_step(registry, client, ReleaseStep(
        action="promote", step_id=record["decision"], arms=arms, aliases=aliases, tags=tags, ts=_now(),
        record=record["decision"], recorded=[version],
    ), record)  # fmt: skip


def rollback(
    registry: Registry,
    client: Publisher,
    rollout: RolloutSettings,
    guard_record: Mapping[str, Any] | None = None,
) -> Rollout:
    """Put the champion's predecessor back in service; running trials end.

    Raises SidstreamError without a predecessor, or when another step was taken since `guard_record` was made.
    A rollback that a crash interrupted is finished, and no second one follows.
    """
    finished = finish_step(registry, client)
    if finished is not None and finished.action == "rollback":
        return finished
    champion = registry.alias(CHAMPION)
    if champion is None:
        raise SidstreamError("nothing is in service, so there is nothing to roll back")
    previous = registry.tags(champion).get(PREVIOUS_CHAMPION)
    if not previous:
        raise SidstreamError(f"version {champion} is the first champion: there is none before it")
    if guard_record is None:
        record = _manual_record("rollback", champion, previous)
    else:
        _check_not_outdated(registry, guard_record)
        record = dict(guard_record)
    arms = _arms_without_trial(registry, previous, rollout)
    return take_step(registry, client, ReleaseStep(
        action="rollback", step_id=_derived_id("rollback", record["decision"]), arms=arms,
        aliases=_aliases(arms), ts=_now(),
        tags=[*_abandoned(registry), (champion, STATE, "rolled-back"), (previous, STATE, "promoted")],
        record=record["decision"], recorded=[champion],
    ), record)  # fmt: skip


def _check_not_outdated(registry: Registry, record: Mapping[str, Any], *own_step_ids: str) -> None:
    """Raise SidstreamError unless the last step is the one that the record judges, or the record's own."""
    last = newest_step(registry)
    if last is None or last.step_id not in (record["trial"], *own_step_ids):
        now = "nothing is in service" if last is None else f"the last step is {last.action} of {last.step_id}"
        raise SidstreamError(
            f"decision {record['decision']} is about trial {record['trial']}; by now {now}, "
            "so it is out of date"
        )


def _arms_without_trial(registry: Registry, champion: str, rollout: RolloutSettings) -> list[Arm]:
    """The arms when nothing is on trial: the champion, and the anchor for its hold-out."""
    anchor_arms = _anchor_arms(registry, champion, rollout)
    weight = 1.0 - sum(arm.weight for arm in anchor_arms)
    return [_arm(registry, CHAMPION, champion, weight), *anchor_arms]


def _trial_arms(
    registry: Registry, champion: str, sft: str, dpo: str | None, rollout: RolloutSettings, step: float
) -> list[Arm]:
    anchor_arms = _anchor_arms(registry, champion, rollout)
    left = 1.0 - sum(arm.weight for arm in anchor_arms)
    full = {CHAMPION: rollout.champion, SFT: rollout.sft} | ({} if dpo is None else {DPO: rollout.dpo})
    total = sum(full.values())
    challengers = {name: left * step * full[name] / total for name in full if name != CHAMPION}
    arms = [_arm(registry, SFT, sft, challengers[SFT])]
    # The champion comes between the challengers: see registry.releases.rollout.arm_of.
    arms.append(_arm(registry, CHAMPION, champion, left - sum(challengers.values())))
    if dpo is not None:
        arms.append(_arm(registry, DPO, dpo, challengers[DPO]))
    return [*arms, *anchor_arms]


def _anchor_arms(registry: Registry, champion: str, rollout: RolloutSettings) -> list[Arm]:
    """The arm of the hold-out, if any; none where the anchor is the champion.

    The anchor may have an earlier codebook: its SIDs stay on their topic, and serving translates histories.
    """
    version = registry.alias(ANCHOR)
    if version in (None, champion) or rollout.anchor == 0:
        return []
    return [_arm(registry, ANCHOR, str(version), rollout.anchor)]


def _aliases(arms: list[Arm]) -> dict[str, str | None]:
    """Every step sets or drops all three aliases, so that it can be repeated after any other write."""
    versions: dict[str, str] = {arm.name: arm.version for arm in arms}
    return {name: versions.get(name) for name in (CHAMPION, SFT, DPO)}


def _challenger_states(arms: list[Arm], step: float) -> list[tuple[str, str, str]]:
    """The state tags of the challengers at a step of the ramp."""
    state = "shadow" if step == 0 else "canary" if step < 1 else "trial"
    champion = next(arm.version for arm in arms if arm.name == CHAMPION)
    return [(arm.version, STATE, state) for arm in arms if arm.name in (SFT, DPO) and arm.version != champion]


def _abandoned(registry: Registry) -> list[tuple[str, str, str]]:
    """The state tags of challengers whose trial ends without a verdict."""
    challengers, champion = (registry.alias(name) for name in (SFT, DPO)), registry.alias(CHAMPION)
    return [(version, STATE, "inconclusive") for version in challengers if version not in (None, champion)]


def _arm(registry: Registry, name: str, version: str, weight: float) -> Arm:
    # A fetch verifies every digest, so that no user is sent to a damaged bundle.
    return Arm(name=name, bundle=registry.fetch(version).id, weight=weight, version=version)  # type: ignore[arg-type]


def _manual_record(action: str, before: str | None, after: str) -> dict[str, Any]:
    return {
        "decision": uuid.uuid4().hex[:16], "mode": "manual", "from": before, "to": after, "verdict": action,
        "sentence": f"{action} by hand, version {before or 'none'} to {after}", "ts": _now(),
    }  # fmt: skip


def _now() -> int:
    return time.time_ns() // 1_000_000


def _derived_id(*parts: str) -> str:
    """An id that only a repetition of the same step has, too: 16 hex digits of a hash."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
