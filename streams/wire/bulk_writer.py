"""Many events at once, in batches per partition; each batch is confirmed, and a partition keeps its order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from streams.errors import SidstreamError
from streams.events import Event
from streams.settings import KafkaSettings
from streams.wire.admin import missing_topic_error, unreachable_error
from streams.wire.connect import client_options
from streams.wire.records import KafkaRecord, kafka_record, partition_of

# About 500 events a batch: enough that the cost of a request vanishes, small enough for smooth progress.
_BATCH_BYTES = 131_072
# Batches in flight before the next one waits for the oldest: 4 MB of memory at most.
_MAX_IN_FLIGHT = 32


class BulkWriter:
    """Sends records in batches that it fills itself: no future, no lock and no callback for each record.

    `add` never waits; where it returns True, await `send`. Leaving the context sends and confirms the rest.
    The producer is idempotent and every replica acknowledges. For one task at a time.
    """

    _producer: Any  # created in __aenter__: it needs the running loop

    def __init__(self, kafka: KafkaSettings, on_progress: Callable[[int], None] | None = None) -> None:
        self._kafka = kafka
        self._on_progress = on_progress
        self._partitions: dict[str, int] = {}
        self._open_batches: dict[tuple[str, int], Any] = {}
        self._full_batches: deque[tuple[tuple[str, int], Any]] = deque()
        self._in_flight: deque[tuple[int, asyncio.Future[Any]]] = deque()
        self.confirmed = 0

    async def __aenter__(self) -> Self:
        """Connect and read the topics' partitions. Raises SidstreamError when no broker answers."""
        self._producer = AIOKafkaProducer(
            **client_options(self._kafka),
            enable_idempotence=True,
            max_batch_size=min(_BATCH_BYTES, self._kafka.max_event_bytes),
        )
        try:
            await self._producer.start()
            cluster = await self._producer.client.fetch_all_metadata()
        except KafkaError as error:
            await self._producer.stop()
            raise unreachable_error(self._kafka, error) from error
        self._partitions = {topic: len(cluster.partitions_for_topic(topic)) for topic in cluster.topics()}
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self.flush()
        finally:
            await self._producer.stop()
            # After a failure the results of the other batches do not matter, but asyncio wants them awaited.
            await asyncio.gather(*(future for _, future in self._in_flight), return_exceptions=True)

    def add(self, item: KafkaRecord) -> bool:
        """Put one record into its partition's batch; True when a batch is full and `send` is due.

        Raises SidstreamError when the topic does not exist.
        """
        partitions = self._partitions.get(item.topic)
        if partitions is None:
            raise missing_topic_error(item.topic)
        place = (item.topic, partition_of(item.key, partitions))
        batch = self._open_batches.get(place)
        if batch is None:
            batch = self._open_batches[place] = self._producer.create_batch()
        if batch.append(timestamp=None, key=item.key, value=item.value) is None:
            self._full_batches.append((place, batch))
            batch = self._open_batches[place] = self._producer.create_batch()
            batch.append(timestamp=None, key=item.key, value=item.value)
        return bool(self._full_batches)

    async def send(self) -> None:
        """Hand full batches to the broker. Waits only where too many are in flight."""
        while self._full_batches:
            (topic, partition), batch = self._full_batches.popleft()
            batch.close()
            try:
                future = await self._producer.send_batch(batch, topic, partition=partition)
            except KafkaError as error:
                raise self._unconfirmed_error(error) from error
            self._in_flight.append((batch.record_count(), future))
            # The connection's tasks run only when this one yields.
            await asyncio.sleep(0)
        while self._in_flight and (len(self._in_flight) > _MAX_IN_FLIGHT or self._in_flight[0][1].done()):
            await self._confirm()

    async def flush(self) -> None:
        """Send all records that were added, and return when the broker has confirmed them."""
        self._full_batches.extend(self._open_batches.items())
        self._open_batches.clear()
        await self.send()
        while self._in_flight:
            await self._confirm()

    async def _confirm(self) -> None:
        count, future = self._in_flight.popleft()
        try:
            await future
        except KafkaError as error:
            raise self._unconfirmed_error(error) from error
        self.confirmed += count
        if self._on_progress:
            self._on_progress(count)

    def _unconfirmed_error(self, error: KafkaError) -> SidstreamError:
        return SidstreamError(
            f"Kafka did not confirm a batch ({type(error).__name__}: {error}), {self.confirmed:,} events "
            "before it are confirmed: check the broker (`sidstream status`), then send again"
        )


def publish_all(
    kafka: KafkaSettings, events: Iterable[Event], on_progress: Callable[[int], None] | None = None
) -> int:
    """Publish events in the order given and return how many, all confirmed.

    `on_progress(n)` is called each time that n more were confirmed. Raises SidstreamError when an event
    breaks the contract or is too large (what came before it may have been sent), or when the broker fails.
    """

    async def run() -> int:
        async with BulkWriter(kafka, on_progress) as writer:
            for event in events:
                if writer.add(kafka_record(event, kafka.max_event_bytes)):
                    await writer.send()
        return writer.confirmed

    return asyncio.run(run())
