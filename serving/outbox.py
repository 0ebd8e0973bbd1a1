"""Where answers and dead letters leave from: an idempotent producer that is tried until the broker
confirms."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

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
# How long a topic that only one requester reads may hold up the others of its batch.
_OFFER_S = 5.0


class Outbox:
    """Sends records and returns when all of them are confirmed."""

    def __init__(self, kafka: KafkaSettings, retry_max_s: float) -> None:
        self._kafka = kafka
        self._retry_max_s = retry_max_s
        self._producer: AIOKafkaProducer | None = None
        self._topics: set[str] = set()
        self._own = {topic.name for topic in all_topics(kafka)}

    async def start(self) -> None:
        """Connect. Raises SidstreamError when no broker answers."""
        try:
            self._producer = await self._connected()
        except KafkaError as error:
            raise SidstreamError(
                f"Kafka at {self._kafka.bootstrap} does not answer ({type(error).__name__}): "
                "start it, or correct SIDSTREAM_KAFKA__BOOTSTRAP"
            ) from error

    async def require(self, topic: str) -> None:
        """Raise SidstreamError when a topic does not exist: what is sent there would be tried for ever."""
        if await self._missing({topic}):
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
        left, refused = list(records), list(refusals)
        pause = _FIRST_RETRY_S
        while left or refused:
            try:
                if self._producer is None:
                    self._producer = await self._connected()
                left = await _unconfirmed(self._producer, left)
                await dead_letters.write_dead_letters(self._producer, refused)
                refused = []
            except KafkaError as error:
                log.warning("answers are not confirmed (%r); trying again in %.1f s", error, pause)
            if left or refused:
                await asyncio.sleep(pause)
                pause = min(2 * pause, self._retry_max_s)
                # An idempotent producer that failed may refuse every later record: take a new one.
                await self.stop()

    async def offer(self, records: Sequence[KafkaRecord]) -> list[str | None]:
        """Send each once, waiting a few seconds; why each was not confirmed, None where it was."""
        if not records or self._producer is None:
            return ["Kafka does not answer"] * len(records)
        tries = [asyncio.ensure_future(_confirmed(self._producer, one)) for one in records]
        await asyncio.wait(tries, timeout=_OFFER_S)
        found: list[str | None] = []
        for one, tried in zip(records, tries, strict=True):
            error = tried.exception() if tried.done() else TimeoutError(f"not confirmed in {_OFFER_S:g} s")
            if error is not None:
                tried.cancel()
                self._topics.discard(one.topic)
            found.append(None if error is None else f"reply_to {one.topic!r}: {error!r}")
        return found

    async def refusals(self, wanted: Collection[str]) -> dict[str, str]:
        """The topics of `wanted` that no answer may go to, and why. Asks the broker once at most."""
        found = {
            topic: f"reply_to is {topic!r}, a topic with another purpose; name one of your own"
            for topic in wanted
            if topic in self._own or topic.startswith("__")
        }
        for topic in await self._missing(set(wanted) - set(found)):
            found[topic] = f"reply_to is {topic!r}, a topic that does not exist; create it, then ask again"
        return found

    async def _missing(self, wanted: set[str]) -> set[str]:
        """Those that do not exist."""
        if wanted - self._topics and self._producer is not None:
            try:
                cluster = await self._producer.client.fetch_all_metadata()
                self._topics = set(cluster.topics())
            except KafkaError as error:
                log.warning("topics cannot be listed: %r", error)
        return wanted - self._topics

    async def _connected(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(**client_options(self._kafka), enable_idempotence=True, linger_ms=0)
        try:
            await producer.start()
        except BaseException:
            await producer.stop()
            raise
        return producer


async def _unconfirmed(producer: AIOKafkaProducer, records: list[KafkaRecord]) -> list[KafkaRecord]:
    """Send all at once; those that the broker did not confirm."""
    ends = await asyncio.gather(*(_confirmed(producer, one) for one in records), return_exceptions=True)
    left = []
    for one, end in zip(records, ends, strict=True):
        if isinstance(end, MessageSizeTooLargeError):
            raise SidstreamError(f"an answer of {len(one.value)} bytes is more than topic {one.topic} takes")
        if isinstance(end, KafkaError):
            log.warning("an answer to topic %s is not confirmed: %r", one.topic, end)
            left.append(one)
        elif end is not None:
            raise end
    return left


async def _confirmed(producer: AIOKafkaProducer, one: KafkaRecord) -> None:
    await producer.send_and_wait(one.topic, one.value, key=one.key)
