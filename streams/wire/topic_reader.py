"""Topics read by offsets up to a known end, without a consumer group.

`topic_table` follows a topic instead, and `batch_loop` reads in a consumer group.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Any, Final, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from streams.errors import SidstreamError
from streams.events import Event, EventError, decode
from streams.settings import KafkaSettings
from streams.wire.admin import missing_topic_error, offset_spans, unreachable_error
from streams.wire.connect import client_options

log = logging.getLogger(__name__)

E = TypeVar("E", bound=Event)

_POLL_MS: Final = 500
_FETCH_BYTES: Final = 8 * 1024 * 1024
# Without a record for so long the broker counts as away.
_SILENCE_S: Final = 30.0


async def read_ranges(
    kafka: KafkaSettings, ranges: Mapping[TopicPartition, tuple[int, int]]
) -> AsyncIterator[tuple[TopicPartition, list[Any]]]:
    """Batches of the records at offsets begin <= offset < end of each partition; in order within a partition.

    Ends when every partition is read to its end. Raises SidstreamError when the broker does not answer, or
    sends nothing for 30 seconds.
    """
    remaining = {at: end for at, (begin, end) in ranges.items() if begin < end}
    if not remaining:
        return
    consumer = AIOKafkaConsumer(
        **client_options(kafka), group_id=None, enable_auto_commit=False, auto_offset_reset="earliest",
        max_partition_fetch_bytes=_FETCH_BYTES,
    )  # fmt: skip
    try:
        await consumer.start()
        consumer.assign(list(remaining))
        for at in remaining:
            consumer.seek(at, ranges[at][0])
        last_record_at = time.monotonic()
        while remaining:
            fetched = await consumer.getmany(*remaining, timeout_ms=_POLL_MS)
            for at, records in fetched.items():
                yield at, [record for record in records if record.offset < remaining[at]]
            for at in list(remaining):
                # Offsets may have no record (compaction): only the position shows that the end is reached.
                if await consumer.position(at) >= remaining[at]:
                    del remaining[at]
            if fetched:
                last_record_at = time.monotonic()
            elif time.monotonic() - last_record_at > _SILENCE_S:
                topics = ", ".join(sorted({at.topic for at in remaining}))
                raise SidstreamError(
                    f"Kafka sent no record of {topics} for {_SILENCE_S:.0f} seconds; see `sidstream doctor`"
                )
    except KafkaError as error:
        raise unreachable_error(kafka, error) from error
    finally:
        await consumer.stop()


def read_records(kafka: KafkaSettings, *topics: str) -> list[Any]:
    """Every record that the topics hold at the start of the call; in order within a partition.

    Raises SidstreamError when a topic does not exist or the broker does not answer.
    """
    records: list[Any] = []
    _for_each_record(kafka, topics, records.append)
    return records


def read_events(
    kafka: KafkaSettings, kind: type[E], keys: Collection[str] | None = None
) -> list[tuple[str, E | None]]:
    """Key and event of each record of `kind`'s topic at the start of the call; in order within a partition.

    Event None: the record deletes its key. `keys`: only records of these keys are decoded and returned.
    Records that break the contract are logged and skipped. Raises SidstreamError as `read_records`.
    """
    events: list[tuple[str, E | None]] = []
    _for_each_event(kafka, kind, keys, lambda key, event: events.append((key, event)))
    return events


def read_newest_events(kafka: KafkaSettings, kind: type[E]) -> dict[str, E]:
    """The newest event (by offset) of each key on `kind`'s topic, without deleted keys.

    Records that break the contract are logged and skipped. Raises SidstreamError as `read_records`.
    """
    newest: dict[str, E] = {}

    def keep(key: str, event: E | None) -> None:
        if event is None:
            newest.pop(key, None)
        else:
            newest[key] = event

    _for_each_event(kafka, kind, None, keep)
    return newest


def _for_each_event(
    kafka: KafkaSettings, kind: type[E], keys: Collection[str] | None,
    handle: Callable[[str, E | None], None],
) -> None:  # fmt: skip
    def handle_record(record: Any) -> None:
        key = (record.key or b"").decode(errors="replace")
        if keys is not None and key not in keys:
            return
        try:
            event = None if record.value is None else decode(kind, record.value)
        except EventError as error:
            log.warning("%s[%d]@%d: %s", record.topic, record.partition, record.offset, error)
            return
        handle(key, event)

    _for_each_record(kafka, (kind.topic,), handle_record)


def _for_each_record(kafka: KafkaSettings, topics: Collection[str], handle: Callable[[Any], None]) -> None:
    spans = offset_spans(kafka, topics)
    for topic in topics:
        if topic not in spans:
            raise missing_topic_error(topic)
    ranges = {
        TopicPartition(topic, number): (span.begin, span.end)
        for topic in topics
        for number, span in spans[topic].items()
    }

    async def read() -> None:
        async for _, records in read_ranges(kafka, ranges):
            for record in records:
                handle(record)

    asyncio.run(read())
