"""Attribution windows, as preference pairs and outcomes share them: events open them, event time closes them.

`apply` only adds events to users' states, with the offsets that they came from. `close_due_windows` closes
what event time has passed, after the batch is committed. Both are idempotent, so a crash between any two
steps repeats work and loses none.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from agents.attribution.event_time import PartitionClock
from agents.attribution.window_states import DUE_USERS_PER_READ, StateWrite, SumChange, WindowStates
from agents.metrics import WATERMARK
from streams.wire.batch_stage import ReceivedEvent
from streams.wire.dead_letters import RefusedRecord

S = TypeVar("S")
# Topic -> (incarnation, next offset): everything below that offset is in the state.
Fences = dict[str, tuple[int, int]]

# Event time that may pass before the watermark is stored anew while nothing is due.
_STORE_WATERMARK_EVERY_MS: Final = 1000


@dataclass(frozen=True, slots=True)
class WindowRules:
    """Times in milliseconds of event time."""

    window_ms: int
    lateness_ms: int

    def closes_at(self, ts: int) -> int:
        """When a window opened at `ts` closes: every event within the window has arrived by then."""
        return ts + self.window_ms + self.lateness_ms

    def forgotten_at(self, ts: int) -> int:
        """When an event of `ts` is dropped: a window that opened up to `window_ms` later needs it so long."""
        return ts + 2 * self.window_ms + self.lateness_ms


@dataclass(frozen=True, slots=True)
class StateChange(Generic[S]):
    """A user's new state; None: nothing is open. `due_ms`: the event time at which to look again."""

    state: S | None
    due_ms: int | None
    sums: Sequence[SumChange] = ()


def unapplied_events(
    fences: Fences, events: Iterable[ReceivedEvent], incarnations: Mapping[str, int]
) -> list[ReceivedEvent]:
    """The events at or above their topic's fence; the fences are moved past them."""
    unapplied = []
    fences_before = dict(fences)
    for received in events:
        record = received.record
        incarnation = incarnations[record.topic]
        before = fences_before.get(record.topic)
        if before is not None and before[0] == incarnation and record.offset < before[1]:
            continue
        fence = fences.get(record.topic)
        next_offset = fence[1] if fence is not None and fence[0] == incarnation else 0
        fences[record.topic] = (incarnation, max(record.offset + 1, next_offset))
        unapplied.append(received)
    return unapplied


class WindowStage(ABC, Generic[S]):
    """A stage of the batch loop whose users' states live in Redis."""

    name: str
    topics: frozenset[str]

    def __init__(
        self, states: WindowStates, clocks: Mapping[int, PartitionClock], incarnations: Mapping[str, int]
    ) -> None:
        self._states = states
        self._clocks = clocks
        self._incarnations = incarnations
        # Both by partition, in ms of event time.
        self._closed_until: dict[int, int] = {}
        self._stored_watermarks: dict[int, int] = {}

    async def take_partitions(self, partitions: Iterable[int]) -> None:
        """Resume event time of these partitions from the watermarks in Redis."""
        self._closed_until = {}
        for partition in partitions:
            watermark = await self._states.watermark(partition)
            if watermark is not None:
                self._closed_until[partition] = watermark
        self._stored_watermarks = dict(self._closed_until)

    def closed_until(self, partition: int) -> int | None:
        """The event time (ms) up to which the partition's windows are closed."""
        return self._closed_until.get(partition)

    async def apply(self, batch: Sequence[ReceivedEvent]) -> Sequence[RefusedRecord]:
        """Add the batch to the users' states."""
        by_user: dict[str, tuple[int, list[ReceivedEvent]]] = {}
        for received in batch:
            record, event = received
            if record.topic in self.topics and self.is_relevant(event):
                _, events = by_user.setdefault(event.user_id, (record.partition, []))
                events.append(received)
        await self._update_states(by_user, None)
        return ()

    async def close_due_windows(self) -> None:
        """Close every window of this worker's partitions that event time has passed."""
        if not self.can_close():
            return
        for partition, clock in self._clocks.items():
            watermark = clock.watermark(time.monotonic())
            if watermark is None or watermark <= self._closed_until.get(partition, -1):
                continue
            while users := await self._states.due_users(partition, watermark):
                await self._update_states({user: (partition, []) for user in users}, watermark)
                if len(users) < DUE_USERS_PER_READ:
                    break
            self._closed_until[partition] = watermark
            if watermark - self._stored_watermarks.get(partition, 0) >= _STORE_WATERMARK_EVERY_MS:
                await self._states.set_watermark(partition, watermark)
                self._stored_watermarks[partition] = watermark
            WATERMARK.labels(self.name, partition).set(watermark / 1000)

    async def _update_states(
        self, updates: dict[str, tuple[int, list[ReceivedEvent]]], watermark: int | None
    ) -> None:
        """Add the events (`watermark` None) or close what is due; again where a state changed meanwhile."""
        while updates:
            stored = await self._states.read(list(updates))
            writes = []
            for user, (partition, events) in updates.items():
                token, body = stored.get(user, (b"", None))
                state = None if body is None else self.decode(body)
                if watermark is None:
                    change = self.add_events(state, events, self._closed_until.get(partition))
                    if change.state is None:
                        continue  # every event was too late to matter
                else:
                    change = self.close_windows(user, state, watermark)
                packed = None if change.state is None else self.encode(change.state)
                writes.append(StateWrite(user, partition, token, packed, change.due_ms, change.sums))
            await self.publish_output()
            overtaken = await self._states.write(writes)
            updates = {user: updates[user] for user in overtaken}

    def can_close(self) -> bool:
        """False: no window may be closed yet."""
        return True

    async def publish_output(self) -> None:
        """Write what `close_windows` produced, before the states that no longer hold it."""

    @abstractmethod
    def is_relevant(self, event: Any) -> bool:
        """True where the event can open or fill a window."""

    @abstractmethod
    def decode(self, body: bytes) -> S:
        """Read a stored state."""

    @abstractmethod
    def encode(self, state: S) -> bytes:
        """Bytes of a state."""

    @abstractmethod
    def add_events(
        self, state: S | None, events: Sequence[ReceivedEvent], closed_until: int | None
    ) -> StateChange[S]:
        """The state with the events, without those that are too late once `closed_until` (ms) is closed."""

    @abstractmethod
    def close_windows(self, user: str, state: S | None, watermark: int) -> StateChange[S]:
        """The state after everything due at `watermark` (ms) is closed."""
