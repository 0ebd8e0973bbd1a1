"""What a topic holds now, read to its end without a group: every record, or the newest of each key."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TypeVar

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from streams.errors import SidstreamError
from streams.events import Event, EventError, Rollout, decode
from streams.settings import KafkaSettings
from streams.wire.admin import missing_topic_error, unreachable_error
from streams.wire.connect import client_options

E = TypeVar("E", bound=Event)
_LOG = logging.getLogger(__name__)
_POLL_MS = 500
# Polls in a row without a record before the broker counts as gone.
_EMPTY_POLLS = 60


def read_newest(kafka: KafkaSettings, kind: type[E]) -> dict[str, E]:
    """The newest event of each key on the topic of `kind`, up to the end offsets seen at the start.

    Records that cannot be read are logged and skipped; a record without a value removes its key. Raises
    SidstreamError when the broker does not answer.
    """
    newest: dict[str, E] = {}
    for key, event in read_all(kafka, kind):
        if event is None:
            newest.pop(key, None)
        else:
            newest[key] = event
    return newest


def read_all(kafka: KafkaSettings, kind: type[E]) -> Iterator[tuple[str, E | None]]:
    """Key and event of each record that the topic of `kind` holds, up to the end offsets seen at the start.

    In order within a partition; None: a record without a value. Those that cannot be read are logged and
    skipped. Raises SidstreamError when the broker does not answer.
    """
    try:
        consumer = KafkaConsumer(
            **client_options(kafka), enable_auto_commit=False, group_id=None, allow_auto_create_topics=False
        )
    except KafkaError as error:
        raise unreachable_error(kafka, error) from error
    try:
        numbers = consumer.partitions_for_topic(kind.topic)
        if not numbers:
            raise missing_topic_error(kind.topic)
        partitions = [TopicPartition(kind.topic, number) for number in sorted(numbers)]
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        ends = consumer.end_offsets(partitions)
        empty = 0
        while any(consumer.position(partition) < ends[partition] for partition in partitions):
            polled = consumer.poll(timeout_ms=_POLL_MS)
            empty = 0 if polled else empty + 1
            if empty == _EMPTY_POLLS:
                raise SidstreamError(
                    f"topic {kind.topic} could not be read to its end: no record for "
                    f"{_EMPTY_POLLS * _POLL_MS // 1000} seconds; see `sidstream doctor`"
                )
            for records in polled.values():
                for record in records:
                    key = (record.key or b"").decode(errors="replace")
                    try:
                        yield key, None if record.value is None else decode(kind, record.value)
                    except EventError as error:
                        _LOG.warning("%s[%d]@%d: %s", record.topic, record.partition, record.offset, error)
    except KafkaError as error:
        raise unreachable_error(kafka, error) from error
    finally:
        consumer.close()


def current_rollout(kafka: KafkaSettings, name: str) -> Rollout | None:
    """The rollout that recommender `name` is in, or None before its first."""
    return read_newest(kafka, Rollout).get(name)
