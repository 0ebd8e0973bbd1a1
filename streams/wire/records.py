"""An event as a Kafka record: topic, key, value and partition, and whether its size fits the topic."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from kafka.partitioner.default import murmur2

from streams.errors import SidstreamError
from streams.events import Event, EventError, decode, encode

# Bytes that a batch of one record adds to key and value: 61 of header, then at most 32 of attributes and
# variable-length integers (Kafka protocol, record batch format 2). The topic's limit counts the batch.
BATCH_OVERHEAD = 96


class KafkaRecord(NamedTuple):
    """A record before it has a partition and an offset."""

    topic: str
    key: bytes
    value: bytes


# Users and items repeat, and murmur2 in Python costs more than the rest of sending.
@lru_cache(maxsize=1 << 17)
def partition_of(key: bytes, partitions: int) -> int:
    """The partition of a key, as Kafka's Java producer chooses it: positive murmur2 modulo the partitions."""
    return int(murmur2(key) & 0x7FFFFFFF) % partitions


def kafka_record(event: Event, max_event_bytes: int) -> KafkaRecord:
    """The event's record.

    Raises SidstreamError when the event breaks the contract (it would end in dead letters) or weighs more
    than `max_event_bytes`.
    """
    value = encode(event)
    try:
        decode(type(event), value)
    except EventError as error:
        raise SidstreamError(f"{type(event).__name__} {event.event_id} was not sent: {error}") from error
    require_size_within_limit(type(event).__name__, event.key, value, max_event_bytes)
    return KafkaRecord(event.topic, event.key, value)


def require_size_within_limit(name: str, key: bytes | None, value: bytes, max_event_bytes: int) -> None:
    """Raise SidstreamError where a record weighs more than the topics take; the error calls it `name`."""
    size = len(key or b"") + len(value) + BATCH_OVERHEAD
    if size > max_event_bytes:
        raise SidstreamError(
            f"{name} weighs {size:,} bytes on the wire, the topics take {max_event_bytes:,}: "
            "send less in it, or raise SIDSTREAM_KAFKA__MAX_EVENT_BYTES before the topics are made"
        )
