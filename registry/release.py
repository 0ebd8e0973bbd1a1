"""What is in service: start, trial, conclusion, promotion by hand, rollback.

Each step keeps one order: the record, then the aliases, then the event that serving acts on. A crash in
between leaves the old bundles in service, and the same step taken again ends where it would have ended.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

from registry.decision import recompute
from registry.settings import RolloutSettings
from registry.store import ANCHOR, CHAMPION, DPO, PREVIOUS, SFT, Registry
from streams.errors import SidstreamError
from streams.events import Arm, Event, Rollout

_ROLLBACK = "rollback-under-way"


class Publisher(Protocol):
    """What a release needs of streams.client.Client."""

    def publish(self, event: Event) -> object:
        """Return when the broker has the event."""
        ...


def start(registry: Registry, client: Publisher, version: str) -> Rollout:
    """Put the first bundle in service, as champion and anchor.

    Raises SidstreamError when another champion is there: that takes a trial, or `sidstream promote`.
    """
    champion = registry.alias(CHAMPION)
    if champion not in (None, version):
        raise SidstreamError(
            f"version {champion} is champion already; put {version} on trial, "
            f"or use `sidstream promote {version}`"
        )
    arm = _arm(registry, CHAMPION, version, 1.0)
    if registry.alias(ANCHOR) is None:
        registry.set_alias(ANCHOR, version)
    registry.set_alias(CHAMPION, version)
    # The same id for the same start: a repetition after a crash is a repetition, not a second start.
    return _publish(registry, client, "start", _derived("start", registry.name, version), [arm], None)


def start_trial(
    registry: Registry, client: Publisher, sft_version: str, dpo_version: str | None, rollout: RolloutSettings
) -> Rollout:
    """Give the challengers their share of users, under a new salt.

    Raises SidstreamError without a champion, or where a version would be held against itself.
    """
    champion = registry.alias(CHAMPION)
    if champion is None:
        raise SidstreamError(
            "nothing is in service to hold a trial against: register and start a champion first"
        )
    wanted = [(CHAMPION, champion, rollout.champion), (SFT, sft_version, rollout.sft)]
    if dpo_version is not None:
        wanted.append((DPO, dpo_version, rollout.dpo))
    versions = [version for _, version, _ in wanted]
    if len(set(versions)) < len(versions):
        raise SidstreamError(f"a trial of versions {', '.join(versions)} compares a version with itself")
    total = sum(weight for _, _, weight in wanted)
    arms = [_arm(registry, name, version, weight / total) for name, version, weight in wanted]
    registry.set_alias(SFT, sft_version)
    if dpo_version is None:
        registry.drop_alias(DPO)
    else:
        registry.set_alias(DPO, dpo_version)
    return _publish(registry, client, "trial", uuid.uuid4().hex[:16], arms, None)


def conclude(registry: Registry, client: Publisher, decision: Mapping[str, Any]) -> Rollout:
    """End a trial as its decision record says: the winner, or the champion, serves everybody.

    Idempotent by the decision's id. Raises SidstreamError when the record does not follow from its own sums,
    when the winner's digests do not hold, or when champion or challengers have changed since the trial began.
    """
    record = dict(decision)
    verdict, winner = recompute(record)
    if (verdict, winner) != (record["verdict"], record["winner"]):
        raise SidstreamError(
            f"decision {record['decision']} says {record['verdict']}, winner {record['winner']}; "
            f"its sums say {verdict}, winner {winner}; run `sidstream gate` again"
        )
    versions = {name: arm["version"] for name, arm in record["arms"].items()}
    before, after = versions[CHAMPION], versions[winner]
    champion, challenger = registry.alias(CHAMPION), registry.alias(SFT)
    if champion not in (before, after) or challenger not in (None, versions[SFT]):
        raise SidstreamError(
            f"decision {record['decision']} is about version {versions[SFT]} against {before}; by now "
            f"{champion} is champion and {challenger or 'nothing'} on trial, so it is out of date"
        )
    arm = _arm(registry, CHAMPION, after, 1.0)
    # The trial is not about the anchor: it keeps the record by which it came.
    for name in sorted(record["inputs"].keys() - {ANCHOR}):
        registry.record(versions[name], record)
    _crown(registry, before, after)
    salt = _derived("conclude", record["decision"])
    return _publish(registry, client, verdict, salt, [arm], record)


def promote(registry: Registry, client: Publisher, version: str) -> Rollout:
    """Put a version in service by hand, without a trial; running trials end.

    Raises SidstreamError when its digests do not hold.
    """
    before = registry.alias(CHAMPION)
    arm = _arm(registry, CHAMPION, version, 1.0)
    # A repetition after a crash finds the version crowned already, and only publishes.
    record = _by_hand("promote", before, version)
    registry.record(version, record)
    if before is None and registry.alias(ANCHOR) is None:
        registry.set_alias(ANCHOR, version)
    _crown(registry, before or version, version)
    return _publish(registry, client, "promote", record["decision"], [arm], record)


def rollback(registry: Registry, client: Publisher) -> Rollout:
    """Put the champion's predecessor back in service; running trials end.

    Raises SidstreamError where there is no predecessor. A rollback that a crash cut short is finished, not
    followed by another.
    """
    noted = registry.noted(_ROLLBACK)
    if noted:
        record = json.loads(noted)
    else:
        champion = registry.alias(CHAMPION)
        if champion is None:
            raise SidstreamError("nothing is in service, so there is nothing to roll back")
        previous = registry.tags(champion).get(PREVIOUS)
        if not previous:
            raise SidstreamError(f"version {champion} is the first champion: there is none before it")
        record = _by_hand("rollback", champion, previous)
    arm = _arm(registry, CHAMPION, record["to"], 1.0)
    registry.note(_ROLLBACK, json.dumps(record))
    registry.record(record["from"], record)
    registry.set_alias(CHAMPION, record["to"])
    _end_trial(registry)
    made = _publish(registry, client, "rollback", record["decision"], [arm], record)
    registry.note(_ROLLBACK, None)
    return made


def _crown(registry: Registry, before: str, after: str) -> None:
    if after != before:
        registry.tag(after, PREVIOUS, before)
        registry.set_alias(CHAMPION, after)
    _end_trial(registry)


def _end_trial(registry: Registry) -> None:
    registry.drop_alias(SFT)
    registry.drop_alias(DPO)


def _arm(registry: Registry, name: str, version: str, weight: float) -> Arm:
    # Fetching verifies every digest: a damaged bundle is found before users are sent to it.
    return Arm(name=name, bundle=registry.fetch(version).id, weight=weight, version=version)  # type: ignore[arg-type]


def _by_hand(action: str, before: str | None, after: str) -> dict[str, Any]:
    ts = time.time_ns() // 1_000_000
    return {
        "decision": uuid.uuid4().hex[:16],
        "mode": "manual",
        "from": before,
        "to": after,
        "verdict": action,
        "sentence": f"{action} by hand, version {before or 'none'} to {after}",
        "ts": ts,
    }


def _publish(
    registry: Registry,
    client: Publisher,
    action: str,
    trial: str,
    arms: list[Arm],
    decision: dict[str, Any] | None,
) -> Rollout:
    event = Rollout.new(
        event_id=f"rollout-{action}-{trial}",
        name=registry.name,
        action=action,
        trial=trial,
        arms=arms,
        decision=decision,
    )
    client.publish(event)
    return event


def _derived(*parts: str) -> str:
    """A salt that a repetition of the same step gives again, and no other step."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
