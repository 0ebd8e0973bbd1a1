"""Attribution windows: what preferences and outcomes share. Events open them, event time closes them.

`apply` only adds events to users' states, with the offsets they came from. `mature` closes what event time
has passed, after the batch is committed. Both are idempotent, so a crash between any two steps repeats work
and loses none.
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
from streams.wire.batch_loop import ReceivedEvent
from streams.wire.dead_letters import RefusedRecord

S = TypeVar("S")
Fences = dict[str, tuple[int, int]]

# Event time that may pass before the watermark is stored anew while nothing matures.
_STORE_EVERY_MS: Final = 1000


@dataclass(frozen=True, slots=True)
class WindowRules:
    """Times in milliseconds of event time."""

    window_ms: int
    lateness_ms: int

    def closes(self, ts: int) -> int:
        """When a window opened at `ts` is closed: every event in reach has arrived."""
        return ts + self.window_ms + self.lateness_ms

    def forgets(self, ts: int) -> int:
        """When nothing asks for an event of `ts` any more: another one, a window away, may have needed it."""
        return ts + 2 * self.window_ms + self.lateness_ms


@dataclass(frozen=True, slots=True)
class StateChange(Generic[S]):
    """A user's state after some work; None: nothing is open. `due`: when to look again (ms)."""

    state: S | None
    due: int | None
    sums: Sequence[SumChange] = ()


def unapplied_events(
    fences: Fences, events: Iterable[ReceivedEvent], incarnations: Mapping[str, int]
) -> list[ReceivedEvent]:
    """The events that the fences have not seen; the fences move past them."""
    fresh = []
    seen = dict(fences)
    for incoming in events:
        record = incoming.record
        incarnation = incarnations[record.topic]
        old = seen.get(record.topic)
        if old is not None and old[0] == incarnation and record.offset < old[1]:
            continue
        now = fences.get(record.topic)
        reached = max(record.offset + 1, now[1] if now is not None and now[0] == incarnation else 0)
        fences[record.topic] = (incarnation, reached)
        fresh.append(incoming)
    return fresh


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
        self._matured: dict[int, int] = {}
        self._stored: dict[int, int] = {}

    async def load(self, partitions: Iterable[int]) -> None:
        """Take over partitions: resume event time where it was left."""
        self._matured = {}
        for partition in partitions:
            watermark = await self._states.watermark(partition)
            if watermark is not None:
                self._matured[partition] = watermark
        self._stored = dict(self._matured)

    def reached(self, partition: int) -> int | None:
        """Up to which event time (ms) the partition is matured."""
        return self._matured.get(partition)

    async def apply(self, batch: Sequence[ReceivedEvent]) -> Sequence[RefusedRecord]:
        """Add the batch to the users' states."""
        by_user: dict[str, tuple[int, list[ReceivedEvent]]] = {}
        for incoming in batch:
            record, event = incoming
            if record.topic in self.topics and self.wants(event):
                known = by_user.get(event.user_id)
                if known is None:
                    known = by_user[event.user_id] = (record.partition, [])
                known[1].append(incoming)
        await self._work(by_user, None)
        return ()

    async def mature(self) -> None:
        """Close every window of this worker's partitions that event time has passed."""
        if not self.ready():
            return
        for partition, clock in self._clocks.items():
            watermark = clock.watermark(self.now())
            if watermark is None or watermark <= self._matured.get(partition, -1):
                continue
            while users := await self._states.due(partition, watermark):
                await self._work({user: (partition, []) for user in users}, watermark)
                if len(users) < DUE_USERS_PER_READ:
                    break
            self._matured[partition] = watermark
            if watermark - self._stored.get(partition, 0) >= _STORE_EVERY_MS:
                await self._states.set_watermark(partition, watermark)
                self._stored[partition] = watermark
            WATERMARK.labels(self.name, partition).set(watermark / 1000)

    async def _work(self, work: dict[str, tuple[int, list[ReceivedEvent]]], watermark: int | None) -> None:
        while work:
            stored = await self._states.read(list(work))
            writes = []
            for user, (partition, events) in work.items():
                token, body = stored.get(user, (b"", None))
                state = None if body is None else self.decode(body)
                if watermark is None:
                    step = self.add(user, state, events, self._matured.get(partition))
                    if step.state is None:
                        continue  # every event was too late to matter
                else:
                    step = self.close(user, state, watermark)
                packed = None if step.state is None else self.encode(step.state)
                writes.append(StateWrite(user, partition, token, packed, step.due, step.sums))
            await self.emit()
            overtaken = await self._states.write(writes)
            work = {user: work[user] for user in overtaken}

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def ready(self) -> bool:
        """False: nothing may be closed yet."""
        return True

    async def emit(self) -> None:
        """Write what `close` produced, before the states that no longer hold it."""

    @abstractmethod
    def wants(self, event: Any) -> bool:
        """True where the event can open or fill a window."""

    @abstractmethod
    def decode(self, body: bytes) -> S:
        """Read a stored state."""

    @abstractmethod
    def encode(self, state: S) -> bytes:
        """Bytes of a state."""

    @abstractmethod
    def add(
        self, user: str, state: S | None, events: Sequence[ReceivedEvent], matured: int | None
    ) -> StateChange[S]:
        """The state with the events; those that could only matter before `matured` (ms) are left out."""

    @abstractmethod
    def close(self, user: str, state: S | None, watermark: int) -> StateChange[S]:
        """The state after everything due at `watermark` (ms) is closed."""
