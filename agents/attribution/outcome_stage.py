"""The stage that keeps the sums of outcomes (`sums:<trial>:{user}`), and the rules that they are made by."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import redis.asyncio

from agents.attribution.event_time import PartitionClock
from agents.attribution.outcomes import VERSION, OpenOutcomes, OutcomeRules
from agents.attribution.window_stage import StateChange, WindowStage, unapplied_events
from agents.attribution.window_states import WindowStates
from streams.errors import SidstreamError
from streams.events import Click, Impression, Purchase, Recommendation
from streams.state import keys
from streams.wire.batch_stage import EVENT_COUNT, ReceivedEvent

log = logging.getLogger(__name__)


async def store_rules(store: redis.asyncio.Redis, rules: OutcomeRules, partitions: int) -> None:
    """Write the rules of the sums for those who read the sums. Warns where Redis has other rules."""
    current: dict[Any, Any] = {
        "window_ms": rules.window_ms,
        "lateness_ms": rules.lateness_ms,
        "cohort_ms": rules.cohort_ms,
        "partitions": partitions,
    }
    stored: list[Any] = await store.hmget(keys.outcomes_rules(), list(current))
    changed = [
        f"{name} {int(old)} -> {new}"
        for (name, new), old in zip(current.items(), stored, strict=True)
        if old is not None and int(old) != new
    ]
    if changed:
        log.warning(
            "another worker makes, or made, the outcome sums by other rules (%s): give all workers the same "
            "settings and replay the topics into an empty Redis, or trials mix both",
            ", ".join(changed),
        )
    await store.hset(keys.outcomes_rules(), mapping=current)


class OutcomeStage(WindowStage[OpenOutcomes]):
    """Adds events to users' requests, and changes the sums with them."""

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

    def is_relevant(self, event: Any) -> bool:
        """True for answers of a trial, and for events that name a request."""
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

    def add_events(
        self, state: OpenOutcomes | None, events: Sequence[ReceivedEvent], closed_until: int | None
    ) -> StateChange[OpenOutcomes]:
        """The state with the events, and the changes of the sums."""
        outcomes = state or OpenOutcomes()
        has_new = False
        for record, event in unapplied_events(outcomes.fences, events, self._incarnations):
            if outcomes.add_event(event, self._rules, closed_until):
                has_new = True
            else:
                EVENT_COUNT.labels(record.topic, "too_late_for_outcomes").inc()
        if not has_new and state is None:
            return StateChange(None, None)
        return StateChange(outcomes, outcomes.next_due(self._rules), outcomes.take_sum_changes(self._rules))

    def close_windows(
        self, user: str, state: OpenOutcomes | None, watermark: int
    ) -> StateChange[OpenOutcomes]:
        """Forget requests that are over."""
        if state is None:
            return StateChange(None, None)
        unattributed = state.forget_finished(watermark, self._rules)
        if unattributed:
            EVENT_COUNT.labels("requests", "unattributed").inc(unattributed)
        if state.is_finished(watermark, self._rules):
            return StateChange(None, None)
        return StateChange(state, state.next_due(self._rules, watermark))
