"""Impressions, clicks and purchases joined to the answer that led to them, summed by trial, user and cohort.

Only items of the recommendation count: an impression is a recommended item that was shown, a click a distinct
recommended item that was clicked, an order one that was bought; each at most once a request, clicks and
orders within the attribution window from the first impression (from the answer, where no impression came). An
answer without a trial (no model in service, or a fallback outside the rollout) is nobody's evidence and is
not kept.

The window's first moment also says which cohort a request belongs to, with all that followed from it: a
purchase counts for the hour of its impression, not for its own. Cohorts of one age can be compared.

What a request counts is a function of what is known of it; the sums move by the difference to what it counted
before, in the same script as the state: where an earlier impression comes late, all of the request's numbers
move to the earlier cohort. So order does not matter, and an event seen again changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import redis.asyncio

from agents.attribution.event_time import PartitionClock
from agents.attribution.window_stage import Fences, StateChange, WindowRules, WindowStage, unapplied_events
from agents.attribution.window_states import SumChange, WindowStates
from streams.errors import SidstreamError
from streams.events import Click, Event, Impression, Purchase, Recommendation
from streams.state import keys
from streams.wire.batch_loop import EVENT_COUNT, ReceivedEvent

log = logging.getLogger(__name__)

VERSION: Final = 2
# Answers that nobody ever looked at have no event time to be forgotten by: a user keeps so many requests.
MAX_REQUESTS: Final = 256


@dataclass(frozen=True, slots=True)
class OutcomeRules(WindowRules):
    """The windows, and the length (ms) of a cohort."""

    cohort_ms: int


class RequestOutcome(msgspec.Struct, array_like=True):
    """One request. `trial` None: its answer has not come. clicks, bought: item -> first ts.

    `counted`: the last result of `counts` that the sums hold.
    """

    answered: int | None = None
    trial: str | None = None
    arm: str = ""
    bundle: str = ""
    items: list[str] = []
    shown_at: int | None = None
    shown: list[str] = []
    clicks: dict[str, int] = {}
    bought: dict[str, int] = {}
    counted: tuple[int, int, int, int] = (0, 0, 0, 0)
    last: int = 0

    def newest(self) -> int:
        """Time (ms) of its newest event: seen again before that is forgotten, it must find the request."""
        return self.last or self.answered or 0

    def anchor(self) -> int:
        """The time (ms) from which the window is counted, and whose cohort this request belongs to."""
        if self.shown_at is not None:
            return self.shown_at
        if self.answered is not None:
            return self.answered
        return min((*self.clicks.values(), *self.bought.values()), default=0)

    def counts(self, rules: OutcomeRules) -> tuple[int, int, int, int]:
        """(cohort, impressions, clicks, orders) of what is known; all 0 while the answer has not come."""
        if self.trial is None:
            return 0, 0, 0, 0
        first = self.anchor()
        last = first + rules.window_ms
        items = set(self.items)
        return (
            first // rules.cohort_ms,
            len(items.intersection(self.shown)),
            sum(item in items and ts <= last for item, ts in self.clicks.items()),
            sum(item in items and ts <= last for item, ts in self.bought.items()),
        )


class OpenOutcomes(msgspec.Struct, array_like=True):
    """One user's requests whose window is open."""

    version: int = VERSION
    requests: dict[str, RequestOutcome] = {}
    fences: Fences = {}
    last_ts: int = 0


def add(state: OpenOutcomes, event: Event, rules: WindowRules, matured: int | None) -> bool:
    """Put one event into the state. False: it came too late to change anything."""
    if matured is not None and rules.forgets(event.ts) <= matured:
        return False
    if isinstance(event, Recommendation):
        request = _request(state, event.request_id)
        if request.trial is None:
            request.answered = event.ts
            request.trial = event.trial
            request.arm, request.bundle = event.arm or "", event.bundle or ""
            request.items = [item.item_id for item in event.items]
        return True
    assert isinstance(event, Impression | Click | Purchase)
    assert event.request_id is not None
    state.last_ts = max(state.last_ts, event.ts)
    request = _request(state, event.request_id)
    request.last = max(request.last, event.ts)
    if isinstance(event, Impression):
        request.shown_at = event.ts if request.shown_at is None else min(request.shown_at, event.ts)
        request.shown = sorted({*request.shown, *event.item_ids})
    else:
        times = request.clicks if isinstance(event, Click) else request.bought
        times[event.item_id] = min(event.ts, times.get(event.item_id, event.ts))
    return True


def sum_changes(state: OpenOutcomes, rules: OutcomeRules) -> list[SumChange]:
    """What the sums must move by since the last call: out of the old cohorts, into the new ones."""
    moved: dict[tuple[str, str, str, int], list[int]] = {}
    for request in state.requests.values():
        counts = request.counts(rules)
        if counts == request.counted or request.trial is None:
            continue
        for sign, (cohort, *numbers) in ((-1, request.counted), (1, counts)):
            total = moved.setdefault((request.trial, request.arm, request.bundle, cohort), [0, 0, 0])
            for place, number in enumerate(numbers):
                total[place] += sign * number
        request.counted = counts
    return [SumChange(*names, *total) for names, total in moved.items() if any(total)]


def close(state: OpenOutcomes, watermark: int, rules: WindowRules) -> int:
    """Forget requests that nothing can change any more; return how many events never found an answer."""
    lost = 0
    for request_id in [r for r, q in state.requests.items() if rules.forgets(q.newest()) <= watermark]:
        request = state.requests.pop(request_id)
        if request.trial is None:
            lost += (request.shown_at is not None) + len(request.clicks) + len(request.bought)
    return lost


def due(state: OpenOutcomes, rules: WindowRules, watermark: int | None = None) -> int | None:
    """When something is forgotten next (ms), after `watermark`; None: nothing is."""
    times = [rules.forgets(request.newest()) for request in state.requests.values()]
    if state.last_ts:
        times.append(rules.forgets(state.last_ts))
    return min((t for t in times if watermark is None or t > watermark), default=None)


def _request(state: OpenOutcomes, request_id: str) -> RequestOutcome:
    request = state.requests.get(request_id)
    if request is None:
        if len(state.requests) >= MAX_REQUESTS:
            unshown = (r for r, q in state.requests.items() if q.shown_at is None)
            state.requests.pop(next(unshown, next(iter(state.requests))))
        request = state.requests[request_id] = RequestOutcome(clicks={}, bought={})
    return request


async def store_rules(store: redis.asyncio.Redis, rules: OutcomeRules, partitions: int) -> None:
    """Write what the sums are made by, for those who read them. Warns where other rules stand."""
    told: dict[Any, Any] = {
        "window_ms": rules.window_ms,
        "lateness_ms": rules.lateness_ms,
        "cohort_ms": rules.cohort_ms,
        "partitions": partitions,
    }
    stored: list[Any] = await store.hmget(keys.outcomes_rules(), list(told))
    changed = [
        f"{name} {int(old)} -> {new}"
        for (name, new), old in zip(told.items(), stored, strict=True)
        if old is not None and int(old) != new
    ]
    if changed:
        log.warning(
            "another worker makes, or made, the outcome sums by other rules (%s): give all workers the same "
            "settings and replay the topics into an empty Redis, or trials mix both",
            ", ".join(changed),
        )
    await store.hset(keys.outcomes_rules(), mapping=told)


class OutcomeStage(WindowStage[OpenOutcomes]):
    """The stage that writes `sums:<trial>:{user}`."""

    name = "outcomes"
    topics = frozenset(kind.topic for kind in (Click, Purchase, Impression, Recommendation))

    def __init__(
        self, store: redis.asyncio.Redis, rules: OutcomeRules, clocks: Mapping[int, PartitionClock],
        incarnations: Mapping[str, int],
    ) -> None:  # fmt: skip
        super().__init__(WindowStates(store, self.name), clocks, incarnations)
        self._rules = rules
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(OpenOutcomes)

    def wants(self, event: Any) -> bool:
        """Answers of a trial, and events that name a request."""
        if isinstance(event, Recommendation):
            return event.trial is not None
        return event.request_id is not None

    def decode(self, body: bytes) -> OpenOutcomes:
        """Read a stored state."""
        state = self._decoder.decode(body)
        if state.version != VERSION:
            raise SidstreamError(
                f"an outcome state has version {state.version}, this sidstream reads {VERSION}: "
                "replay the topics into an empty Redis"
            )
        return state

    def encode(self, state: OpenOutcomes) -> bytes:
        """Bytes of a state."""
        return self._encoder.encode(state)

    def add(
        self, user: str, state: OpenOutcomes | None, events: Sequence[ReceivedEvent], matured: int | None
    ) -> StateChange[OpenOutcomes]:
        """The state with the events, and what the sums move by."""
        opened = state or OpenOutcomes()
        kept = False
        for record, event in unapplied_events(opened.fences, events, self._incarnations):
            if add(opened, event, self._rules, matured):
                kept = True
            else:
                EVENT_COUNT.labels(record.topic, "too_late_for_outcomes").inc()
        if not kept and state is None:
            return StateChange(None, None)
        return StateChange(opened, due(opened, self._rules), sum_changes(opened, self._rules))

    def close(self, user: str, state: OpenOutcomes | None, watermark: int) -> StateChange[OpenOutcomes]:
        """Forget what is over."""
        if state is None:
            return StateChange(None, None)
        lost = close(state, watermark, self._rules)
        if lost:
            EVENT_COUNT.labels("requests", "unattributed").inc(lost)
        if not state.requests and self._rules.forgets(state.last_ts) <= watermark:
            return StateChange(None, None)
        return StateChange(state, due(state, self._rules, watermark))
