"""The client: publish events and know that they arrived; ask for recommendations and get the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError

from streams.errors import SidstreamError
from streams.events import Event, Recommendation, Trigger
from streams.settings import KafkaSettings
from streams.wire import bulk_writer
from streams.wire.admin import missing_topic_error, topic_names, unreachable_error
from streams.wire.connect import client_options
from streams.wire.records import kafka_record, require_size_within_limit
from streams.wire.replies import RecommendationReader, Replies, no_answer_error

# A broker that restarts is back within this time; the producer retries until then.
_DELIVERY_S = 30.0
# How long a send waits for the metadata of a topic's partitions.
_METADATA_MS = 10_000


class DeliveredRecord(NamedTuple):
    """The place of a record on the broker."""

    topic: str
    partition: int
    offset: int


class Client:
    """Publishes events and asks for recommendations. Thread-safe; use it as a context manager.

    Events go to the partition that Java's murmur2 of their key gives; the producer is idempotent and every
    replica acknowledges. Raises SidstreamError when no broker answers.
    """

    def __init__(
        self, kafka: KafkaSettings, open_reader: Callable[[], RecommendationReader] | None = None
    ) -> None:
        self._kafka = kafka
        try:
            self._producer = KafkaProducer(
                **client_options(kafka),
                enable_idempotence=True,
                acks="all",
                linger_ms=0,
                delivery_timeout_ms=int(_DELIVERY_S * 1000),
                request_timeout_ms=int(_DELIVERY_S * 1000) // 2,
                max_block_ms=_METADATA_MS,
                bootstrap_timeout_ms=_METADATA_MS,
                max_request_size=max(1_048_576, kafka.max_event_bytes),
                allow_auto_create_topics=False,
                metrics_enabled=False,
            )
        except KafkaError as error:
            raise unreachable_error(kafka, error) from error
        self._replies = Replies(open_reader or partial(_reader_at_end, kafka))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def publish(self, event: Event) -> DeliveredRecord:
        """Send one event and return its place, confirmed by the broker.

        Raises SidstreamError when the event breaks the contract, is too large, or is not confirmed in time.
        """
        record = kafka_record(event, self._kafka.max_event_bytes)
        return self._send(type(event).__name__, record.topic, record.key, record.value)

    def publish_raw(self, topic: str, key: bytes | None, value: bytes) -> DeliveredRecord:
        """Send bytes without a check but of their size, as a faulty producer would."""
        require_size_within_limit("The value", key, value, self._kafka.max_event_bytes)
        return self._send("the value", topic, key, value)

    def publish_all(self, events: Iterable[Event], on_progress: Callable[[int], None] | None = None) -> int:
        """Send many events in the order given, confirmed; return their number."""
        return bulk_writer.publish_all(self._kafka, events, on_progress)

    def submit(self, trigger: Trigger, timeout: float = 30.0) -> Future[Recommendation]:
        """Send a trigger and return a future for its answer, so that many can be in flight.

        The future fails with SidstreamError when no answer came within `timeout` seconds, when the trigger
        was not delivered, or when reading answers ended.
        """
        record = kafka_record(trigger, self._kafka.max_event_bytes)
        self._replies.start()
        future = self._replies.expect(trigger.request_id, timeout)
        try:
            delivery = self._producer.send(record.topic, key=record.key, value=record.value)
        except KafkaError as error:
            self._replies.fail(trigger.request_id, self._undelivered_error("Trigger", record.topic, error))
            return future
        delivery.add_errback(
            lambda error: self._replies.fail(
                trigger.request_id, self._undelivered_error("Trigger", record.topic, error)
            )
        )
        return future

    def ask(self, trigger: Trigger, timeout: float = 5.0) -> Recommendation:
        """Send a trigger and wait for its answer, `timeout` seconds at most. Raises SidstreamError."""
        future = self.submit(trigger, timeout)
        try:
            return future.result(timeout)
        except TimeoutError as error:
            failure = no_answer_error(trigger.request_id, timeout)
            self._replies.fail(trigger.request_id, failure)
            raise failure from error

    def close(self) -> None:
        """Confirm records in flight, fail requests without an answer, and end both threads."""
        self._replies.close()
        self._producer.close(timeout=_DELIVERY_S)

    def _send(self, description: str, topic: str, key: bytes | None, value: bytes) -> DeliveredRecord:
        try:
            metadata = self._producer.send(topic, key=key, value=value).get(timeout=_DELIVERY_S + 5)
        except KafkaError as error:
            raise self._undelivered_error(description, topic, error) from error
        return DeliveredRecord(metadata.topic, metadata.partition, metadata.offset)

    def _undelivered_error(self, description: str, topic: str, error: BaseException) -> SidstreamError:
        # kafka-python raises a time-out for a missing topic, a dead broker and a slow one alike.
        if isinstance(error, KafkaTimeoutError) and topic not in topic_names(self._kafka):
            return missing_topic_error(topic)
        return SidstreamError(
            f"Kafka did not confirm {description} on topic {topic} ({type(error).__name__}: {error}): check "
            "the broker with `sidstream status`, then send it again with the same event_id"
        )


def _reader_at_end(kafka: KafkaSettings) -> RecommendationReader:
    """A consumer without group at the end of every partition of `recommendations`, positions resolved."""
    topic = Recommendation.topic
    try:
        consumer = KafkaConsumer(
            **client_options(kafka),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="latest",
            allow_auto_create_topics=False,
            bootstrap_timeout_ms=_METADATA_MS,
            metrics_enabled=False,
        )
    except KafkaError as error:
        raise unreachable_error(kafka, error) from error
    try:
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
        if not partitions:
            raise missing_topic_error(topic)
        consumer.assign(partitions)
        consumer.seek_to_end(*partitions)
        for partition in partitions:
            # The consumer asks for the end lazily: an answer that came before would be missed.
            if consumer.position(partition, timeout_ms=_METADATA_MS) is None:
                raise SidstreamError(
                    f"the end of {topic} partition {partition.partition} is not known after "
                    f"{_METADATA_MS // 1000} s: check the broker with `sidstream status`"
                )
    except BaseException:
        consumer.close()
        raise
    reader: RecommendationReader = consumer
    return reader
