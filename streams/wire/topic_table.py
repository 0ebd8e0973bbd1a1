"""A compacted topic as a table in memory: the newest record of each key, followed as records arrive."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, ValuesView
from typing import Any, Generic, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError

from streams.errors import SidstreamError
from streams.events import Event, EventError, decode
from streams.settings import KafkaSettings
from streams.wire.admin import missing_topic_error, unreachable_error
from streams.wire.connect import client_options

log = logging.getLogger(__name__)

E = TypeVar("E", bound=Event)

# How long the metadata of a topic that was just created may take.
_START_S = 15.0
# An empty fetch returns after this; it bounds the delay of a stop.
_POLL_MS = 200
# Wait after a broker error before the next fetch; aiokafka reconnects by itself meanwhile.
_RETRY_S = 1.0


class TopicTable(Generic[E]):
    """`get` and `values` of a topic, read from its beginning without a consumer group, then followed.

    `on_change(key, event)` is called for each record in the order of its partition; event None: deleted.
    Records that break the contract are logged and skipped: the topic's own consumer dead-letters them.
    """

    def __init__(
        self, kafka: KafkaSettings, kind: type[E], on_change: Callable[[str, E | None], None] | None = None
    ) -> None:
        self._kafka = kafka
        self._kind = kind
        self._on_change = on_change
        self._rows: dict[str, E] = {}
        self._position: dict[int, int] = {}
        self._catch_up_to: dict[TopicPartition, int] = {}
        self._caught_up: asyncio.Future[None] | None = None
        self._consumer: AIOKafkaConsumer | None = None
        self._task: asyncio.Task[None] | None = None

    def get(self, key: str) -> E | None:
        """The newest event of this key."""
        return self._rows.get(key)

    def values(self) -> ValuesView[E]:
        """The newest event of every key."""
        return self._rows.values()

    def __len__(self) -> int:
        return len(self._rows)

    def next_offsets(self) -> dict[int, int]:
        """For each partition the offset of the next record to read: all before it is in the table."""
        return dict(self._position)

    async def start(self) -> None:
        """Begin to read. Raises SidstreamError when the topic does not exist or Kafka does not answer."""
        topic = self._kind.topic
        consumer = AIOKafkaConsumer(
            topic,  # without a group: every partition is this consumer's
            **client_options(self._kafka),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=max(1_048_576, 2 * self._kafka.max_event_bytes),
        )
        try:
            async with asyncio.timeout(_START_S):
                await consumer.start()
                partitions = list(consumer.assignment())
                self._catch_up_to = await consumer.end_offsets(partitions)
                begin = await consumer.beginning_offsets(partitions)
        except (UnknownTopicOrPartitionError, TimeoutError) as error:
            await consumer.stop()
            raise missing_topic_error(topic) from error
        except KafkaError as error:
            await consumer.stop()
            raise unreachable_error(self._kafka, error) from error
        self._position = {partition.partition: offset for partition, offset in begin.items()}
        self._consumer = consumer
        self._caught_up = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._follow(consumer), name=f"table {topic}")

    async def wait_caught_up(self) -> None:
        """Return once all records that were in the topic at `start` are in the table."""
        if self._caught_up is None or self._task is None:
            raise SidstreamError(f"the table of {self._kind.topic} was not started: call start() first")
        await asyncio.wait({self._caught_up, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not self._caught_up.done():
            await self._task  # raises the error that ended it
            raise SidstreamError(f"the table of {self._kind.topic} was stopped before it was read")

    async def refresh(self) -> None:
        """Return once all records that are in the topic now are in the table."""
        await self.wait_caught_up()
        assert self._consumer is not None
        self._catch_up_to = await self._consumer.end_offsets(list(self._catch_up_to))
        self._caught_up = asyncio.get_running_loop().create_future()
        await self.wait_caught_up()

    async def stop(self) -> None:
        """End reading; the rows stay."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._consumer is not None:
            await self._consumer.stop()
            self._consumer = None

    async def _follow(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            try:
                fetched = await consumer.getmany(timeout_ms=_POLL_MS)
                for partition, records in fetched.items():
                    for record in records:
                        self._apply_record(record)
                    # Without a group no partition can be revoked meanwhile, so this position is current.
                    self._position[partition.partition] = records[-1].offset + 1
                await self._mark_caught_up(consumer)
            except KafkaError as error:
                log.warning("reading %s: %s; trying again", self._kind.topic, error)
                await asyncio.sleep(_RETRY_S)

    async def _mark_caught_up(self, consumer: AIOKafkaConsumer) -> None:
        assert self._caught_up is not None
        if self._caught_up.done():
            return
        for partition, end in self._catch_up_to.items():
            if self._position[partition.partition] < end:
                # Offsets without a record below the end (compaction, transactions): only the consumer's
                # position shows that the end is reached.
                self._position[partition.partition] = await consumer.position(partition)
        if all(self._position[p.partition] >= end for p, end in self._catch_up_to.items()):
            self._caught_up.set_result(None)

    def _apply_record(self, record: Any) -> None:
        try:
            if record.value is None:
                key = record.key.decode()
                self._rows.pop(key, None)
                event = None
            else:
                event = decode(self._kind, record.value)
                key = event.key.decode()
                self._rows[key] = event
        except (EventError, UnicodeDecodeError, AttributeError) as error:
            log.warning("%s %d:%d skipped: %s", record.topic, record.partition, record.offset, error)
            return
        if self._on_change is not None:
            self._on_change(key, event)
