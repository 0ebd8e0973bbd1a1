"""Sends answers and dead letters with an idempotent producer, again and again until the broker confirms."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from streams.backoff import Backoff
from streams.errors import SidstreamError
from streams.settings import KafkaSettings
from streams.wire import dead_letters
from streams.wire.admin import missing_topic_error
from streams.wire.connect import client_options
from streams.wire.dead_letters import RefusedRecord
from streams.wire.records import KafkaRecord
from streams.wire.topics import all_topics

log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.2
# How long the write to one requester's reply topic may delay the other answers of its batch.
_OFFER_TIMEOUT_S = 5.0


class AnswerProducer:
    """Sends records and returns when the broker has confirmed all of them."""

    def __init__(self, kafka: KafkaSettings, retry_max_s: float) -> None:
        self._kafka = kafka
        self._retry_max_s = retry_max_s
        self._producer: AIOKafkaProducer | None = None
        self._existing_topics: set[str] = set()
        self._product_topics = {topic.name for topic in all_topics(kafka)}

    async def start(self) -> None:
        """Connect. Raises SidstreamError when no broker answers."""
        try:
            self._producer = await self._connect()
        except KafkaError as error:
            raise SidstreamError(
                f"Kafka at {self._kafka.bootstrap} does not answer ({type(error).__name__}): "
                "start it, or correct SIDSTREAM_KAFKA__BOOTSTRAP"
            ) from error

    async def require(self, topic: str) -> None:
        """Raise SidstreamError when a topic does not exist: records sent there would be retried for ever."""
        if await self._missing_topics({topic}):
            raise missing_topic_error(topic)

    async def stop(self) -> None:
        """Disconnect."""
        if self._producer is not None:
            await self._producer.stop()
            self._producer = None

    async def send(self, records: Sequence[KafkaRecord], refusals: Sequence[RefusedRecord] = ()) -> None:
        """Return when the broker has confirmed all answers and dead letters.

        One may be there twice after an outage: an answer under the same request_id, a dead letter under the
        same event_id.
        """
        unconfirmed_records, unwritten_refusals = list(records), list(refusals)
        backoff = Backoff(_FIRST_RETRY_S, self._retry_max_s)
        while unconfirmed_records or unwritten_refusals:
            wait_s = backoff.next_wait()
            try:
                if self._producer is None:
                    self._producer = await self._connect()
                unconfirmed_records = await _send_all(self._producer, unconfirmed_records)
                await dead_letters.write_dead_letters(self._producer, unwritten_refusals)
                unwritten_refusals = []
            except KafkaError as error:
                log.warning("answers are not confirmed (%r); trying again in %.1f s", error, wait_s)
            if unconfirmed_records or unwritten_refusals:
                await asyncio.sleep(wait_s)
                # An idempotent producer that failed may refuse every later record: take a new one.
                await self.stop()

    async def offer(self, records: Sequence[KafkaRecord]) -> list[str | None]:
        """Send each record once, wait some seconds; for each, why it is not confirmed, None where it is."""
        if not records or self._producer is None:
            return ["Kafka does not answer"] * len(records)
        sends = [asyncio.ensure_future(_send_and_confirm(self._producer, record)) for record in records]
        await asyncio.wait(sends, timeout=_OFFER_TIMEOUT_S)
        failures: list[str | None] = []
        for record, sending in zip(records, sends, strict=True):
            error = (
                sending.exception()
                if sending.done()
                else TimeoutError(f"not confirmed in {_OFFER_TIMEOUT_S:g} s")
            )
            if error is not None:
                sending.cancel()
                self._existing_topics.discard(record.topic)
            failures.append(None if error is None else f"reply_to {record.topic!r}: {error!r}")
        return failures

    async def refused_reply_topics(self, reply_topics: Collection[str]) -> dict[str, str]:
        """The topics of `reply_topics` that no answer may go to, by reason. Asks the broker once at most."""
        refused_topics = {
            topic: f"reply_to is {topic!r}, a topic with another purpose; name one of your own"
            for topic in reply_topics
            if topic in self._product_topics or topic.startswith("__")
        }
        for topic in await self._missing_topics(set(reply_topics) - set(refused_topics)):
            refused_topics[topic] = (
                f"reply_to is {topic!r}, a topic that does not exist; create it, then ask again"
            )
        return refused_topics

    async def _missing_topics(self, topic_names: set[str]) -> set[str]:
        """Those of `topic_names` that do not exist."""
        if topic_names - self._existing_topics and self._producer is not None:
            try:
                cluster = await self._producer.client.fetch_all_metadata()
                self._existing_topics = set(cluster.topics())
            except KafkaError as error:
                log.warning("topics cannot be listed: %r", error)
        return topic_names - self._existing_topics

    async def _connect(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(**client_options(self._kafka), enable_idempotence=True, linger_ms=0)
        try:
            await producer.start()
        except BaseException:
            await producer.stop()
            raise
        return producer


async def _send_all(producer: AIOKafkaProducer, records: list[KafkaRecord]) -> list[KafkaRecord]:
    """Send all at once; return those that the broker did not confirm."""
    outcomes = await asyncio.gather(
        *(_send_and_confirm(producer, record) for record in records), return_exceptions=True
    )
    unconfirmed = []
    for record, outcome in zip(records, outcomes, strict=True):
        if isinstance(outcome, MessageSizeTooLargeError):
            raise SidstreamError(
                f"an answer of {len(record.value)} bytes is more than topic {record.topic} takes"
            )
        if isinstance(outcome, KafkaError):
            log.warning("an answer to topic %s is not confirmed: %r", record.topic, outcome)
            unconfirmed.append(record)
        elif outcome is not None:
            raise outcome
    return unconfirmed


async def _send_and_confirm(producer: AIOKafkaProducer, record: KafkaRecord) -> None:
    await producer.send_and_wait(record.topic, record.value, key=record.key)
