"""Writing a log to Kafka: catalogue and profiles, then events in event time at the given speed, confirmed."""

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
    """The result of a replay: confirmed records by topic, first and last `ts` of events, and its seconds."""

    topics: dict[str, int] = field(default_factory=dict)
    first_ts: int | None = None
    last_ts: int | None = None
    seconds: float = 0.0

    @property
    def record_count(self) -> int:
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
    """A speed as a multiple of real time; None for `max`. Raises SidstreamError for anything else."""
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

    `speed`: a multiple of real time; None: as fast as possible. Returns when everything is confirmed.
    Order holds within a partition, so a user's events keep theirs. Raises SidstreamError.
    """

    async def run(summary: ReplaySummary) -> None:
        async with BulkWriter(kafka, on_progress) as writer:
            if catalog:
                for event in chain(source.catalogue(), source.profiles()):
                    await _add_record(writer, kafka_record(event, kafka.max_event_bytes), summary)
                # A reader of an event can then have read its item and its user before.
                await writer.flush()
            pace = _Pacer(speed)
            for event in source.events(start, end) if events else ():
                await pace.wait(event, writer)
                await _add_record(writer, kafka_record(event, kafka.max_event_bytes), summary)
                summary.first_ts = event.ts if summary.first_ts is None else summary.first_ts
                summary.last_ts = event.ts

    return _run_timed(run)


def replay_raw(
    kafka: KafkaSettings, records: Iterator[KafkaRecord], on_progress: Callable[[int], None] | None = None
) -> ReplaySummary:
    """Write records with no check but of their size. Returns when everything is confirmed."""

    async def run(summary: ReplaySummary) -> None:
        async with BulkWriter(kafka, on_progress) as writer:
            for record in records:
                require_size_within_limit(
                    f"A line for {record.topic}", record.key, record.value, kafka.max_event_bytes
                )
                await _add_record(writer, record, summary)

    return _run_timed(run)


class _Pacer:
    """Delays each event to its time on a clock that runs `speed` times faster than real time."""

    def __init__(self, speed: float | None) -> None:
        self._speed = speed
        self._origin: tuple[float, int] | None = None

    async def wait(self, event: Event, writer: BulkWriter) -> None:
        if self._speed is None:
            return
        now = time.monotonic()
        if self._origin is None:
            self._origin = now, event.ts
        started_at, first_ts = self._origin
        ahead = started_at + (event.ts - first_ts) / 1000 / self._speed - now
        if ahead > _SHORTEST_WAIT_S:
            await writer.flush()
            await asyncio.sleep(ahead)


async def _add_record(writer: BulkWriter, record: KafkaRecord, summary: ReplaySummary) -> None:
    summary.topics[record.topic] = summary.topics.get(record.topic, 0) + 1
    if writer.add(record):
        await writer.send()


def _run_timed(run: Callable[[ReplaySummary], Coroutine[Any, Any, None]]) -> ReplaySummary:
    summary = ReplaySummary()
    started_at = time.monotonic()
    asyncio.run(run(summary))
    summary.seconds = time.monotonic() - started_at
    return summary
