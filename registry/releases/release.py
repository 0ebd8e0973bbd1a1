"""What is in service: start, trial and its steps, conclusion, promotion by hand, rollback.

Which step follows from what stands, and what it changes; how a step survives a kill -9 is in
registry.releases.journal. The caller holds the lease of registry.releases.lease.
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
    # The same id for the same start: a repetition is a repetition, not a second start.
    trial = _derived("start", registry.name, version)
    tags = [*_left(registry), (version, STATE, "promoted")]
    return take_step(
        registry,
        client,
        ReleaseStep(action="start", trial=trial, arms=arms, aliases=aliases, tags=tags, ts=_now()),
    )


def start_trial(
    registry: Registry, client: Publisher, sft_version: str, dpo_version: str | None,
    rollout: RolloutSettings, step: float = 1.0,
) -> Rollout:  # fmt: skip
    """Give the challengers `step` of their shares of users, under a new salt. Step 0 is a shadow: they are
    loaded and measured, and nobody sees their answers. The champion alone, as `sft_version`, is an A/A trial:
    what it finds is chance, or a fault of what deals, serves or counts.

    Raises SidstreamError without a champion, or where a version would be held against itself.
    """
    finished = finish_step(registry, client)
    versions = [version for version in (sft_version, dpo_version) if version is not None]
    if finished is not None and finished.action == "trial":
        begun = [arm.version for arm in finished.arms if arm.name in (SFT, DPO)]
        if sorted(begun) == sorted(versions):
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
        action="trial", trial=uuid.uuid4().hex[:16], salt=uuid.uuid4().hex[:16], step=step, arms=arms,
        aliases=_aliases(arms), tags=[*_left(registry), *_states(arms, step)], ts=_now(),
    ))  # fmt: skip


def advance(registry: Registry, client: Publisher, step: float, rollout: RolloutSettings) -> Rollout:
    """Take the running trial to the next step of its ramp: the same salt, so that users only move from the
    champion to a challenger; a new trial, so that sums are made under one set of weights.

    Raises SidstreamError when no trial is running, or where the step is not above the one that it is at,
    unless a crash cut that very step short: it is finished.
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
    salt = running.salt or running.trial
    arms = _trial_arms(registry, versions[CHAMPION], versions[SFT], versions.get(DPO), rollout, step)
    return take_step(registry, client, ReleaseStep(
        action="trial", trial=_derived("step", salt, f"{step:g}"), salt=salt, step=step, arms=arms,
        aliases=_aliases(arms), tags=_states(arms, step), ts=_now(),
    ))  # fmt: skip


def conclude(
    registry: Registry, client: Publisher, decision: Mapping[str, Any], rollout: RolloutSettings
) -> Rollout:
    """End a trial as its decision record says: the winner, or the champion, serves everybody.

    Idempotent by the decision's id. Raises SidstreamError when the record does not follow from its own
    inputs, when the winner's digests do not hold, or when another step was taken since.
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
    trial = _derived("conclude", record["decision"])
    _in_time(registry, record, trial)
    # The trial is not about the anchor: it keeps the record by which it came.
    about = sorted(versions.keys() - {ANCHOR})
    tags = [
        (versions[name], STATE, _ended(verdict)) for name in about if versions[name] != versions[CHAMPION]
    ]
    if after != versions[CHAMPION]:
        tags = [*(row for row in tags if row[0] != after), (after, STATE, "promoted")]
        tags.append((after, PREVIOUS_CHAMPION, versions[CHAMPION]))
    arms = _standing(registry, after, rollout)
    return take_step(registry, client, ReleaseStep(
        action=verdict, trial=trial, arms=arms, aliases=_aliases(arms), tags=tags, ts=_now(),
        record=record["decision"], recorded=list(dict.fromkeys(versions[name] for name in about)),
    ), record)  # fmt: skip


def promote(registry: Registry, client: Publisher, version: str, rollout: RolloutSettings) -> Rollout:
    """Put a version in service by hand, without a trial; running trials end.

    Raises SidstreamError when its digests do not hold.
    """
    finish_step(registry, client)
    before = registry.alias(CHAMPION)
    record = _by_hand("promote", before, version)
    arms = _standing(registry, version, rollout)
    aliases = _aliases(arms)
    tags = [*_left(registry), (version, STATE, "promoted")]
    if before is None and registry.alias(ANCHOR) is None:
        aliases[ANCHOR] = version
    if before not in (None, version):
        tags.append((version, PREVIOUS_CHAMPION, str(before)))
    return take_step(registry, client, ReleaseStep(
        action="promote", trial=record["decision"], arms=arms, aliases=aliases, tags=tags, ts=_now(),
        record=record["decision"], recorded=[version],
    ), record)  # fmt: skip


def rollback(
    registry: Registry, client: Publisher, rollout: RolloutSettings, why: Mapping[str, Any] | None = None
) -> Rollout:
    """Put the champion's predecessor back in service; running trials end. `why`: a guard's record.

    Raises SidstreamError where there is no predecessor, or when another step was taken since the guard
    looked. A rollback that a crash cut short is finished, not
    followed by another.
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
    if why is not None:
        _in_time(registry, why)
    record = _by_hand("rollback", champion, previous) if why is None else dict(why)
    arms = _standing(registry, previous, rollout)
    return take_step(registry, client, ReleaseStep(
        action="rollback", trial=_derived("rollback", record["decision"]), arms=arms, aliases=_aliases(arms),
        tags=[*_left(registry), (champion, STATE, "rolled-back"), (previous, STATE, "promoted")], ts=_now(),
        record=record["decision"], recorded=[champion],
    ), record)  # fmt: skip


def _in_time(registry: Registry, record: Mapping[str, Any], *own: str) -> None:
    """Raise SidstreamError unless the last step is the one that the record judges, or the record's own."""
    last = newest_step(registry)
    if last is None or last.trial not in (record["trial"], *own):
        now = "nothing is in service" if last is None else f"the last step is {last.action} of {last.trial}"
        raise SidstreamError(
            f"decision {record['decision']} is about trial {record['trial']}; by now {now}, "
            "so it is out of date"
        )


def _standing(registry: Registry, champion: str, rollout: RolloutSettings) -> list[Arm]:
    """What serves when nothing is on trial: the champion, and the anchor to its hold-out."""
    held = _anchor(registry, champion, rollout)
    return [_arm(registry, CHAMPION, champion, 1.0 - sum(arm.weight for arm in held)), *held]


def _trial_arms(
    registry: Registry, champion: str, sft: str, dpo: str | None, rollout: RolloutSettings, step: float
) -> list[Arm]:
    held = _anchor(registry, champion, rollout)
    left = 1.0 - sum(arm.weight for arm in held)
    full = {CHAMPION: rollout.champion, SFT: rollout.sft} | ({} if dpo is None else {DPO: rollout.dpo})
    total = sum(full.values())
    challengers = {name: left * step * full[name] / total for name in full if name != CHAMPION}
    arms = [_arm(registry, SFT, sft, challengers[SFT])]
    # Between the challengers: see registry.releases.rollout.arm_of.
    arms.append(_arm(registry, CHAMPION, champion, left - sum(challengers.values())))
    if dpo is not None:
        arms.append(_arm(registry, DPO, dpo, challengers[DPO]))
    return [*arms, *held]


def _anchor(registry: Registry, champion: str, rollout: RolloutSettings) -> list[Arm]:
    """The arm of the hold-out; none where the anchor is the champion.

    Its codebook may be an earlier one: its SIDs stay on their topic, and serving translates histories.
    """
    version = registry.alias(ANCHOR)
    if version in (None, champion) or rollout.anchor == 0:
        return []
    return [_arm(registry, ANCHOR, str(version), rollout.anchor)]


def _aliases(arms: list[Arm]) -> dict[str, str | None]:
    """Every step says them all: so it can be taken again, whatever was written in between."""
    versions: dict[str, str] = {arm.name: arm.version for arm in arms}
    return {name: versions.get(name) for name in (CHAMPION, SFT, DPO)}


def _states(arms: list[Arm], step: float) -> list[tuple[str, str, str]]:
    state = "shadow" if step == 0 else "canary" if step < 1 else "trial"
    champion = next(arm.version for arm in arms if arm.name == CHAMPION)
    return [(arm.version, STATE, state) for arm in arms if arm.name in (SFT, DPO) and arm.version != champion]


def _left(registry: Registry) -> list[tuple[str, str, str]]:
    """The states of challengers whose trial ends without a verdict."""
    named, champion = (registry.alias(name) for name in (SFT, DPO)), registry.alias(CHAMPION)
    return [(version, STATE, "inconclusive") for version in named if version not in (None, champion)]


def _ended(verdict: str) -> str:
    # The sibling of a promoted model was not harmful, only not the best.
    return {"reject": "rejected"}.get(verdict, "inconclusive")


def _arm(registry: Registry, name: str, version: str, weight: float) -> Arm:
    # Fetching verifies every digest: a damaged bundle is found before users are sent to it.
    return Arm(name=name, bundle=registry.fetch(version).id, weight=weight, version=version)  # type: ignore[arg-type]


def _by_hand(action: str, before: str | None, after: str) -> dict[str, Any]:
    return {
        "decision": uuid.uuid4().hex[:16], "mode": "manual", "from": before, "to": after, "verdict": action,
        "sentence": f"{action} by hand, version {before or 'none'} to {after}", "ts": _now(),
    }  # fmt: skip


def _now() -> int:
    return time.time_ns() // 1_000_000


def _derived(*parts: str) -> str:
    """A salt that a repetition of the same step gives again, and no other step."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
