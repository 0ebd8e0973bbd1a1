"""Writing a log to Kafka: what stands first, then the events in event time, as fast as told, confirmed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from streams.errors import SidstreamError
from streams.events import Event
from streams.replay.source import EventSource
from streams.settings import KafkaSettings
from streams.wire.bulk_writer import BulkWriter
from streams.wire.records import KafkaRecord, kafka_record, require_size_within_limit

# A shorter wait costs more in flushing than it gives in evenness.
_SHORTEST_WAIT_S = 0.01


@dataclass
class ReplaySummary:
    """What was written: confirmed records by topic, first and last `ts` of events, seconds it took."""

    topics: dict[str, int] = field(default_factory=dict)
    first_ts: int | None = None
    last_ts: int | None = None
    seconds: float = 0.0

    @property
    def sent(self) -> int:
        """Records of all topics."""
        return sum(self.topics.values())


def parse_time(text: str) -> int:
    """Milliseconds since 1970 UTC from such a number, or from an ISO date or date-time (UTC unless it says).

    Raises SidstreamError for anything else.
    """
    if text.isdigit() and len(text) >= 11:
        return int(text)
    try:
        when = datetime.fromisoformat(text)
    except ValueError as error:
        raise SidstreamError(
            f"time {text!r} is neither an ISO date (2011-12-01, 2011-12-01T08:30) nor milliseconds since 1970"
        ) from error
    return round((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1000)


def parse_speed(text: str) -> float | None:
    """How many times faster than it happened; None for `max`. Raises SidstreamError for anything else."""
    if text == "max":
        return None
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0 < speed < float("inf"):
        raise SidstreamError(f"speed {text!r} is neither `max` nor a number above 0, such as 1 or 3600")
    return speed


def replay(
    kafka: KafkaSettings,
    source: EventSource,
    start: int | None = None,
    end: int | None = None,
    speed: float | None = None,
    catalog: bool = True,
    events: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> ReplaySummary:
    """Write `source` to Kafka: its catalogue and profiles, then its events of start <= ts < end (ms).

    `speed`: times faster than it happened; None: as fast as it goes. Returns when everything is confirmed.
    Order holds within a partition, so a user's events keep theirs. Raises SidstreamError.
    """

    async def run(done: ReplaySummary) -> None:
        async with BulkWriter(kafka, on_progress) as writer:
            if catalog:
                for event in chain(source.catalogue(), source.profiles()):
                    await _add_record(writer, kafka_record(event, kafka.max_event_bytes), done)
                # Whoever reads an event should be able to have read its item and its user before.
                await writer.flush()
            pace = _Pacer(speed)
            for event in source.events(start, end) if events else ():
                await pace.wait(event, writer)
                await _add_record(writer, kafka_record(event, kafka.max_event_bytes), done)
                done.first_ts = event.ts if done.first_ts is None else done.first_ts
                done.last_ts = event.ts

    return _run_timed(run)


def replay_raw(
    kafka: KafkaSettings, records: Iterator[KafkaRecord], on_progress: Callable[[int], None] | None = None
) -> ReplaySummary:
    """Write records as they are, unchecked but for their size. Returns when everything is confirmed."""

    async def run(done: ReplaySummary) -> None:
        async with BulkWriter(kafka, on_progress) as writer:
            for item in records:
                require_size_within_limit(
                    f"A line for {item.topic}", item.key, item.value, kafka.max_event_bytes
                )
                await _add_record(writer, item, done)

    return _run_timed(run)


class _Pacer:
    """Lets an event go when its time has come on a clock that runs `speed` times faster."""

    def __init__(self, speed: float | None) -> None:
        self._speed = speed
        self._origin: tuple[float, int] | None = None

    async def wait(self, event: Event, writer: BulkWriter) -> None:
        if self._speed is None:
            return
        now = time.monotonic()
        if self._origin is None:
            self._origin = now, event.ts
        begun, first = self._origin
        ahead = begun + (event.ts - first) / 1000 / self._speed - now
        if ahead > _SHORTEST_WAIT_S:
            await writer.flush()
            await asyncio.sleep(ahead)


async def _add_record(writer: BulkWriter, item: KafkaRecord, done: ReplaySummary) -> None:
    done.topics[item.topic] = done.topics.get(item.topic, 0) + 1
    if writer.add(item):
        await writer.send()


def _run_timed(run: Callable[[ReplaySummary], Coroutine[Any, Any, None]]) -> ReplaySummary:
    done = ReplaySummary()
    begun = time.monotonic()
    asyncio.run(run(done))
    done.seconds = time.monotonic() - begun
    return done
