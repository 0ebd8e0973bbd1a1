"""The release journal: a release step is written down before it is carried out, and marked as done after it.

The noted step names the aliases, the tags and the rollout that stand afterwards. From the moment of the note
the step holds. After a crash, also a kill -9, the next promoter first finishes the noted step. So there is
always one champion, and once a step is finished the decision record, the aliases and the traffic agree.

The caller holds the lease of registry.releases.lease. The lease is checked before each write that others see,
and after it. MLflow has no compare-and-swap: a promoter that is stopped between check and write for longer
than the lease makes that one write over the step of another promoter. The second check tells it so, and it
reports the late write in the registry. The newest step then counts as unfinished, and the next promoter
carries it out again from its first write. A step that was noted late has too low a number, and is ignored.

Two gaps remain. Until the next promoter comes, the late write stands. And a promoter that is also killed
between the two checks reports nothing; `disagreement` shows what it wrote to aliases, tags and traffic, and
the next step mends aliases and traffic.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Protocol, TypeVar

import msgspec

from registry.arms import CHAMPION
from registry.bundles.store import PREVIOUS_CHAMPION, Registry
from registry.experiment.decision import recompute
from registry.releases import lease
from streams.errors import SidstreamError
from streams.events import Arm, Event, Rollout

T = TypeVar("T")
# Tags of the recommender: the newest noted step, the last step that was carried out, and the newest report of
# a write without the lease.
_NOTED_STEP: Final = "release-step"
_DONE_STEP: Final = "release-done"
_LATE_WRITE: Final = "release-disturbed"


class Publisher(Protocol):
    """What a release needs of streams.wire.client.Client."""

    def publish(self, event: Event) -> object:
        """Return when the broker has the event."""
        ...


class ReleaseStep(msgspec.Struct, kw_only=True):
    """A release step, as the journal stores it in JSON.

    `record`: the id of its decision record, which is stored in the runs of the versions `recorded`. `tags`:
    (version, key, value). `number`: counts the steps of the recommender, from 1. `step_id` and `trial_id` are
    the fields `trial` and `salt` of a Rollout: all steps of one trial share a trial id, which decides the
    arms of its users.
    """

    action: str
    step_id: str = msgspec.field(name="trial")
    arms: list[Arm]
    aliases: dict[str, str | None]
    tags: list[tuple[str, str, str]] = []
    ts: int
    trial_id: str | None = msgspec.field(default=None, name="salt")
    step: float | None = None
    record: str | None = None
    recorded: list[str] = []
    number: int = 0

    @property
    def event_id(self) -> str:
        """The id of the step's rollout event. A step that is carried out again has the same id."""
        return f"rollout-{self.action}-{self.step_id}"


class _DoneStep(msgspec.Struct):
    """A step that was carried out, and the newest report of a late write before its first write."""

    step: ReleaseStep
    late_write: str | None = msgspec.field(name="disturbed")


def take_step(
    registry: Registry, client: Publisher, step: ReleaseStep, record: dict[str, Any] | None = None
) -> Rollout:
    """Note a step in the journal and carry it out; the newest step is only carried out again.

    `record` is its decision record, which is stored with every version of `recorded`.
    """
    last = newest_step(registry)
    if last is not None and last.event_id == step.event_id:
        # A repetition publishes the step and the record of the first time: a decision that is made twice
        # differs in its time.
        step, record = last, None
    else:
        # The record is stored before the tag that names it: a named record always exists.
        for version in step.recorded:
            assert record is not None
            _write(registry, registry.store_decision, version, record)
        step.number = 1 if last is None else last.number + 1
        _write(registry, registry.set_recommender_tag, _NOTED_STEP, msgspec.json.encode(step).decode())
    return _carry_out(registry, client, step, record)


def finish_step(registry: Registry, client: Publisher) -> Rollout | None:
    """Finish the noted step where a crash left it unfinished. None: there was nothing to finish."""
    step = newest_step(registry)
    if step is None or _is_done(registry, step):
        return None
    return _carry_out(registry, client, step, None)


def unfinished(registry: Registry) -> str | None:
    """The step that a crash or a late write left unfinished, in a sentence; None: every step is finished."""
    step = newest_step(registry)
    if step is None or _is_done(registry, step):
        return None
    return (
        f"the step {step.action} (trial {step.step_id}) was cut short, or written over by a promoter without "
        "the lease; the next release step finishes it"
    )


def disagreement(registry: Registry, rollout: Rollout | None) -> str | None:
    """Where the newest step, its record, aliases, tags and traffic differ, in a sentence; None: nowhere.

    `rollout` is the one in service (registry.releases.current_rollout.current_rollout).
    """
    step = newest_step(registry)
    if step is None:
        champion = registry.alias(CHAMPION)
        if rollout is None and champion is None:
            return None
        return f"version {champion} is champion, but no release step is noted; `sidstream promote` notes one"
    sentence = unfinished(registry)
    if sentence is not None:
        return sentence
    for difference in _differences(registry, step, rollout):
        return f"{difference}; `sidstream promote {step.aliases[CHAMPION]}` makes them agree"
    return None


def _differences(registry: Registry, step: ReleaseStep, rollout: Rollout | None) -> Iterator[str]:
    newest = f"the newest step is {step.action} (trial {step.step_id})"
    if rollout is None:
        yield f"nothing serves, but {newest}"
    elif (rollout.event_id, rollout.arms) != (step.event_id, step.arms):
        yield f"users are served by {rollout.action} (trial {rollout.trial}), but {newest}"
    for alias, version in step.aliases.items():
        current = registry.alias(alias)
        if current != version:
            yield f"alias {alias} names version {current}, but {newest} and names {version}"
    tags = {version: registry.tags(version) for version in {*step.recorded, *(row[0] for row in step.tags)}}
    expected = {(version, key): value for version, key, value in step.tags}
    expected |= {(version, "decision"): step.record or "" for version in step.recorded}
    for (version, key), value in expected.items():
        if tags[version].get(key) != value:
            yield f"tag {key} of version {version} is {tags[version].get(key)}, but {newest} and says {value}"
    for version in step.recorded:
        try:
            record = registry.decision(version, step.record)
            champion = _champion_of(registry, record)
        except SidstreamError as error:
            yield f"{newest}, but its record does not hold ({error})"
            return
        if rollout is not None and record != rollout.decision:
            yield f"the record {step.record} of version {version} is not the one that was published"
        if champion != step.aliases[CHAMPION]:
            yield f"the record {step.record} makes version {champion} champion, but {newest}"


def _champion_of(registry: Registry, record: Mapping[str, Any]) -> str | None:
    """The version that a record makes champion. Raises SidstreamError when the record does not recompute."""
    if record.get("mode") == "manual":
        return str(record["to"])
    _, winner = recompute(record)
    if winner == "previous":
        return registry.tags(record["arms"][CHAMPION]["version"]).get(PREVIOUS_CHAMPION)
    return str(record["arms"][winner]["version"])


def _carry_out(
    registry: Registry, client: Publisher, step: ReleaseStep, record: dict[str, Any] | None
) -> Rollout:
    # Read before the first write: a report that comes later leaves the step unfinished.
    done = _DoneStep(step, registry.recommender_tag(_LATE_WRITE))
    for version in step.recorded:
        assert step.record is not None
        _write(registry, registry.tag, version, "decision", step.record)
    for version, key, value in step.tags:
        _write(registry, registry.tag, version, key, value)
    for alias, alias_version in step.aliases.items():
        if alias_version is None:
            _write(registry, registry.drop_alias, alias)
        else:
            _write(registry, registry.set_alias, alias, alias_version)
    if record is None and step.recorded:
        record = registry.decision(step.recorded[0], step.record)
    event = Rollout.new(
        event_id=step.event_id, ts=step.ts, name=registry.name, action=step.action, trial=step.step_id,
        salt=step.trial_id, step=step.step, arms=step.arms, decision=record,
    )  # fmt: skip
    _write(registry, client.publish, event)
    # The whole step, under a tag of its own: a step that is noted late then overwrites nothing of it.
    _write(registry, registry.set_recommender_tag, _DONE_STEP, msgspec.json.encode(done).decode())
    return event


def _write(registry: Registry, write: Callable[..., object], *args: Any) -> None:
    """Write while the lease holds. A write after its end is reported in the registry, and raised."""
    lease.check_lease()
    write(*args)
    try:
        lease.check_lease()
    except SidstreamError:
        registry.set_recommender_tag(_LATE_WRITE, uuid.uuid4().hex)
        raise


def _is_done(registry: Registry, step: ReleaseStep) -> bool:
    done = _read(registry, _DONE_STEP, _DoneStep)
    return done is not None and done.step == step and done.late_write == registry.recommender_tag(_LATE_WRITE)


def newest_step(registry: Registry) -> ReleaseStep | None:
    """The step that holds, carried out or not; None before the first step."""
    noted, done = _read(registry, _NOTED_STEP, ReleaseStep), _read(registry, _DONE_STEP, _DoneStep)
    if noted is None or done is None:
        return noted
    # A noted step without a higher number than the last done step was noted late.
    return noted if noted.number > done.step.number else done.step


def _read(registry: Registry, key: str, kind: type[T]) -> T | None:
    value = registry.recommender_tag(key)
    return None if value is None else msgspec.json.decode(value, type=kind)
