"""A release step: noted in the registry before anything is done, then carried out, then known to be done.

The intent holds the aliases, tags and the rollout that shall stand afterwards. The note is the moment from
which the step holds; whoever comes next, also after a kill -9, first finishes the one that is noted. So there
is always one champion, and once a step is finished the decision record, the aliases and the traffic say the
same.

The caller holds the lease of registry.releases.lease. It is checked before each write that others see, and
after it. MLflow has no compare-and-swap, so a promoter that is stopped between check and write for longer
than the lease, and goes on, makes that one write over the step of another. It learns of it by the second
check, and says so in the registry: the newest step then counts as unfinished, and whoever comes next takes it
again, in whole. A late intent is known by its number, and is not taken. What remains: until somebody comes
next, the late write stands; and a promoter that is also killed between the two checks tells nobody.
`disagreement` shows what it wrote to aliases, tags and traffic, and the next step mends aliases and traffic.
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
_STEP: Final = "release-step"
# The step that was carried out last, and the newest report of a write without the lease.
_DONE: Final = "release-done"
_DISTURBED: Final = "release-disturbed"


class Publisher(Protocol):
    """What a release needs of streams.wire.client.Client."""

    def publish(self, event: Event) -> object:
        """Return when the broker has the event."""
        ...


class ReleaseStep(msgspec.Struct, kw_only=True):
    """One step, as it is noted. `record`: id of the decision record, in the runs of versions `recorded`."""

    action: str
    trial: str
    arms: list[Arm]
    aliases: dict[str, str | None]
    tags: list[tuple[str, str, str]] = []  # version, key, value
    ts: int
    salt: str | None = None
    step: float | None = None
    record: str | None = None
    recorded: list[str] = []
    number: int = 0  # of the steps so far

    @property
    def id(self) -> str:
        """The same step has the same id, also when it is taken again."""
        return f"rollout-{self.action}-{self.trial}"


class _Done(msgspec.Struct):
    """A step that was carried out to its end, and the report of a late write that was known then."""

    step: ReleaseStep
    disturbed: str | None


def take_step(
    registry: Registry, client: Publisher, step: ReleaseStep, record: dict[str, Any] | None = None
) -> Rollout:
    """Note a step and carry it out; one that is the newest already is only carried out again.

    `record` is its decision record, stored with every version of `recorded`.
    """
    last = newest_step(registry)
    if last is not None and last.id == step.id:
        # Taken before: what was said and stored then stands, and is said again. The same decision, made
        # twice, has another time in it.
        step, record = last, None
    else:
        # Inert until a tag names it, so that a record which is named is always there.
        for version in step.recorded:
            assert record is not None
            _write(registry, registry.store_decision, version, record)
        step.number = 1 if last is None else last.number + 1
        _write(registry, registry.set_recommender_tag, _STEP, msgspec.json.encode(step).decode())
    return _carry_out(registry, client, step, record)


def finish_step(registry: Registry, client: Publisher) -> Rollout | None:
    """Finish the step that is noted and not done, as after a crash. None: there is none."""
    step = newest_step(registry)
    if step is None or _done(registry, step):
        return None
    return _carry_out(registry, client, step, None)


def unfinished(registry: Registry) -> str | None:
    """What a crash left half done, in a sentence; None: nothing."""
    step = newest_step(registry)
    if step is None or _done(registry, step):
        return None
    return (
        f"the step {step.action} (trial {step.trial}) was cut short, or written over by a promoter without "
        "the lease; the next release step finishes it"
    )


def disagreement(registry: Registry, rollout: Rollout | None) -> str | None:
    """Where the newest step, its record, aliases, tags and traffic differ, in a sentence; None: nowhere.

    `rollout` is what serves by now (registry.releases.current.current_rollout).
    """
    step = newest_step(registry)
    if step is None:
        named = registry.alias(CHAMPION)
        if rollout is None and named is None:
            return None
        return f"version {named} is champion, but no release step is noted; `sidstream promote` notes one"
    found = unfinished(registry)
    if found is not None:
        return found
    for found in _differences(registry, step, rollout):
        return f"{found}; `sidstream promote {step.aliases[CHAMPION]}` makes them agree"
    return None


def _differences(registry: Registry, step: ReleaseStep, rollout: Rollout | None) -> Iterator[str]:
    noted = f"the newest step is {step.action} (trial {step.trial})"
    if rollout is None:
        yield f"nothing serves, but {noted}"
    elif (rollout.event_id, rollout.arms) != (step.id, step.arms):
        yield f"users are served by {rollout.action} (trial {rollout.trial}), but {noted}"
    for alias, version in step.aliases.items():
        named = registry.alias(alias)
        if named != version:
            yield f"alias {alias} names version {named}, but {noted} and names {version}"
    tags = {version: registry.tags(version) for version in {*step.recorded, *(row[0] for row in step.tags)}}
    wanted = {(version, key): value for version, key, value in step.tags}
    wanted |= {(version, "decision"): step.record or "" for version in step.recorded}
    for (version, key), value in wanted.items():
        if tags[version].get(key) != value:
            yield f"tag {key} of version {version} is {tags[version].get(key)}, but {noted} and says {value}"
    for version in step.recorded:
        try:
            record = registry.decision(version, step.record)
            crowned = _crowned(registry, record)
        except SidstreamError as error:
            yield f"{noted}, but its record does not hold ({error})"
            return
        if rollout is not None and record != rollout.decision:
            yield f"the record {step.record} of version {version} is not the one that was published"
        if crowned != step.aliases[CHAMPION]:
            yield f"the record {step.record} makes version {crowned} champion, but {noted}"


def _crowned(registry: Registry, record: Mapping[str, Any]) -> str | None:
    """The version that a record puts in service. Raises SidstreamError when it does not recompute."""
    if record.get("mode") == "manual":
        return str(record["to"])
    _, winner = recompute(record)
    if winner == "previous":
        return registry.tags(record["arms"][CHAMPION]["version"]).get(PREVIOUS_CHAMPION)
    return str(record["arms"][winner]["version"])


def _carry_out(
    registry: Registry, client: Publisher, step: ReleaseStep, record: dict[str, Any] | None
) -> Rollout:
    # The report is read before the first write: one that comes later leaves the step unfinished.
    done = _Done(step, registry.recommender_tag(_DISTURBED))
    for version in step.recorded:
        assert step.record is not None
        _write(registry, registry.tag, version, "decision", step.record)
    for version, key, value in step.tags:
        _write(registry, registry.tag, version, key, value)
    for alias, named in step.aliases.items():
        if named is None:
            _write(registry, registry.drop_alias, alias)
        else:
            _write(registry, registry.set_alias, alias, named)
    if record is None and step.recorded:
        record = registry.decision(step.recorded[0], step.record)
    event = Rollout.new(
        event_id=step.id, ts=step.ts, name=registry.name, action=step.action, trial=step.trial,
        salt=step.salt, step=step.step, arms=step.arms, decision=record,
    )  # fmt: skip
    _write(registry, client.publish, event)
    # In a place of its own, and whole: a late intent then takes nothing away.
    _write(registry, registry.set_recommender_tag, _DONE, msgspec.json.encode(done).decode())
    return event


def _write(registry: Registry, write: Callable[..., object], *args: Any) -> None:
    """One write that others see, while the lease holds; one that came too late is reported."""
    lease.check_lease()
    write(*args)
    try:
        lease.check_lease()
    except SidstreamError:
        registry.set_recommender_tag(_DISTURBED, uuid.uuid4().hex)
        raise


def _done(registry: Registry, step: ReleaseStep) -> bool:
    done = _read(registry, _DONE, _Done)
    return done is not None and done.step == step and done.disturbed == registry.recommender_tag(_DISTURBED)


def newest_step(registry: Registry) -> ReleaseStep | None:
    """The step that holds, carried out or not; None before the first."""
    noted, done = _read(registry, _STEP, ReleaseStep), _read(registry, _DONE, _Done)
    if noted is None or done is None:
        return noted
    # An intent that is not numbered after what was carried out came late.
    return noted if noted.number > done.step.number else done.step


def _read(registry: Registry, key: str, kind: type[T]) -> T | None:
    value = registry.recommender_tag(key)
    return None if value is None else msgspec.json.decode(value, type=kind)
