"""An at-least-once loop over batches: read, apply, write dead letters, commit, in this order.

A record is committed only when every stage has applied it or its bytes are in dead letters. A stage must
therefore be idempotent: after a crash, a rebalance or a failed commit it gets records again.

Failures, and what the loop does:
- a record breaks the contract: it is dead-lettered, and the others of its batch go on.
- a record is in a partition that its key does not belong to (a producer without murmur2): it is sent again
  with the right key, since all events of a user must meet in one worker.
- a stage fails: the batch is tried `attempts` times, then halved until the failing record stands alone and is
  dead-lettered.
- Redis or Kafka is away: the loop tries again for ever; it refuses and commits nothing meanwhile.
- partitions are revoked: the batch in work is finished and committed first; where that cannot be, because
  Redis or Kafka is away, the batch is abandoned, and the next owner reads it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    KafkaError,
    MessageSizeTooLargeError,
    RebalanceInProgressError,
)
from mode import Service
from prometheus_client import Counter, Gauge, Histogram

from streams.backoff import Backoff
from streams.events import Event, EventError, decode
from streams.settings import KafkaSettings
from streams.state import redisdb
from streams.wire.batch_stage import EVENT_COUNT, BatchHooks, BatchStage, ReceivedEvent
from streams.wire.connect import client_options
from streams.wire.dead_letters import RefusedRecord, write_dead_letters
from streams.wire.records import partition_of

log = logging.getLogger(__name__)

CONSUMER_LAG: Final = Gauge(
    "sidstream_consumer_lag_records", "Records not yet applied", ["topic", "partition"]
)
# A batch takes from some milliseconds (a few events) to seconds (a full one on a busy machine).
BATCH_SECONDS: Final = Histogram(
    "sidstream_batch_seconds", "Time to apply one batch", ["stage"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)  # fmt: skip
FAILURES: Final = Counter(
    "sidstream_batch_failures_total",
    "Tries that failed: outage (retried for ever) or error",
    ["stage", "kind"],
)

# An empty fetch returns after this; it bounds the delay of ticks and of a stop.
_POLL_MS: Final = 200
_LAG_EVERY_S: Final = 1.0
# First wait after a failure and the longest one: an outage of minutes is noticed within seconds of its end.
_FIRST_WAIT_S: Final = 0.1
_LONGEST_WAIT_S: Final = 5.0
# Kafka's errors whose cause is the record or this program, not a broker that is away.
_NOT_OUTAGES: Final = (MessageSizeTooLargeError, IllegalStateError)


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How a loop reads; agents.settings.AgentsSettings describes the fields."""

    group: str
    batch_size: int
    deadline_s: float
    attempts: int
    session_timeout_s: float


class BatchAbandoned(Exception):
    """The batch is given up without a commit: its partitions are revoked, or the worker stops."""


class BatchLoop(Service):
    """Reads `kinds` in one consumer group, with equal partitions of all topics at one worker."""

    def __init__(
        self,
        kafka: KafkaSettings,
        kinds: Sequence[type[Event]],
        stages: Sequence[BatchStage],
        options: BatchOptions,
        hooks: BatchHooks | None = None,
        *,
        tombstones: bool = False,
        **service: Any,
    ) -> None:
        super().__init__(**service)
        self._kafka = kafka
        self._kinds = {kind.topic: kind for kind in kinds}
        self._stages = stages
        self._options = options
        self._hooks = hooks or BatchHooks()
        self._tombstones = tombstones
        self._work_lock = asyncio.Lock()
        self._must_release = asyncio.Event()
        self._next_offsets: dict[TopicPartition, int] = {}
        self._lag_measured_at = 0.0
        self._rebalance_count = 0
        self._assigned: frozenset[TopicPartition] | None = None
        self._consumer: Any = None
        self._producer: Any = None

    async def on_start(self) -> None:
        """Connect and join the group."""
        # Few records leave here (dead letters, ones in the wrong partition): size matters more than time.
        self._producer = AIOKafkaProducer(
            **client_options(self._kafka),
            enable_idempotence=True,
            compression_type="gzip",
            max_request_size=2 * self._kafka.max_event_bytes + 65_536,
        )
        self._consumer = AIOKafkaConsumer(
            **client_options(self._kafka),
            group_id=self._options.group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            # Equal partitions of all topics at one worker: all events of a user meet there.
            partition_assignment_strategy=(RangePartitionAssignor,),
            session_timeout_ms=int(self._options.session_timeout_s * 1000),
            heartbeat_interval_ms=int(self._options.session_timeout_s * 1000 / 4),
            max_partition_fetch_bytes=max(1_048_576, 2 * self._kafka.max_event_bytes),
            isolation_level="read_committed",
        )
        await self._producer.start()
        await self._hooks.on_start()
        await self._consumer.start()
        self._consumer.subscribe(topics=sorted(self._kinds), listener=_RebalanceListener(self))

    async def on_stop(self) -> None:
        """Finish the batch in work, commit it and leave the group."""
        self._must_release.set()
        async with self._work_lock:
            pass
        await self._consumer.stop()
        await self._producer.stop()

    @Service.task
    async def _run(self) -> None:
        while not self.should_stop:
            try:
                # Not under the lock: in a rebalance the fetch waits until `release_partitions` had the lock.
                fetched = await self._consumer.getmany(
                    timeout_ms=_POLL_MS, max_records=self._options.batch_size
                )
                epoch = self._rebalance_count
                async with self._work_lock:
                    # Partitions revoked during the wait for the lock: the next owner reads the records.
                    if epoch == self._rebalance_count and not self.should_stop:
                        await self._process_fetch(fetched)
            except BatchAbandoned:
                log.warning("a batch was abandoned; its records are read again")
            except KafkaError as error:
                log.warning("reading failed, trying again: %s", error)
                await asyncio.sleep(_FIRST_WAIT_S)

    async def _process_fetch(self, fetched: dict[TopicPartition, list[Any]]) -> None:
        assigned = frozenset(self._consumer.assignment())
        if assigned != self._assigned:
            await self._retry_outages("assignment", lambda: self._hooks.on_assigned(assigned))
            self._assigned = assigned
        await self._notice_rewound_offsets(fetched)
        if fetched:
            await self._apply(fetched)
        await self._measure_lag()
        refused = await self._retry_outages("tick", self._hooks.on_tick)
        if refused:
            await self._retry_outages("dead letters", lambda: write_dead_letters(self._producer, refused))
            await self._retry_outages("tick", lambda: self._hooks.on_dead_lettered(refused))

    async def _notice_rewound_offsets(self, fetched: dict[TopicPartition, list[Any]]) -> None:
        for partition, records in fetched.items():
            if records[0].offset < self._next_offsets.get(partition, 0):
                await self._retry_outages("rewound", self._hooks.on_rewound)
            self._next_offsets[partition] = records[-1].offset + 1

    async def _apply(self, fetched: dict[TopicPartition, list[Any]]) -> None:
        batch, refused, misplaced = self._decode_records(fetched)
        for stage in self._stages:
            if batch:
                began = time.perf_counter()
                refused += await self._apply_isolating_failures(stage, batch, self._options.attempts)
                BATCH_SECONDS.labels(stage.name).observe(time.perf_counter() - began)
        if misplaced:
            await self._retry_outages("reroute", lambda: self._reroute(misplaced))
        if refused:
            await self._retry_outages("dead letters", lambda: write_dead_letters(self._producer, refused))
        offsets = {partition: records[-1].offset + 1 for partition, records in fetched.items()}
        await self._retry_outages("commit", lambda: self._commit(offsets))
        self._count_outcomes(fetched, refused, misplaced)

    def _decode_records(
        self, fetched: dict[TopicPartition, list[Any]]
    ) -> tuple[list[ReceivedEvent], list[RefusedRecord], list[ReceivedEvent]]:
        """Events to apply, records that break the contract, and events in a partition that is not theirs."""
        now = time.time_ns() // 1_000_000
        batch: list[ReceivedEvent] = []
        refused: list[RefusedRecord] = []
        misplaced: list[ReceivedEvent] = []
        for partition, records in fetched.items():
            kind = self._kinds[partition.topic]
            partitions = self._consumer.partitions_for_topic(partition.topic)
            count = len(partitions) if partitions else self._kafka.partitions
            for record in records:
                if record.value is None and self._tombstones:
                    batch.append(ReceivedEvent(record, None))
                    continue
                try:
                    event = decode(kind, record.value, now)
                except EventError as error:
                    refused.append(RefusedRecord(record, "decode", error.reason, error.detail))
                    continue
                is_own = partition_of(event.key, count) == partition.partition
                (batch if is_own else misplaced).append(ReceivedEvent(record, event))
        return batch, refused, misplaced

    async def _reroute(self, misplaced: Sequence[ReceivedEvent]) -> None:
        await asyncio.gather(
            *[
                self._producer.send_and_wait(record.topic, record.value, key=event.key)
                for record, event in misplaced
            ]
        )

    async def _commit(self, offsets: dict[TopicPartition, int]) -> None:
        try:
            await self._consumer.commit(offsets)
        except (CommitFailedError, IllegalStateError, RebalanceInProgressError) as error:
            # The partitions have a new owner, which reads these records again; its stages are idempotent.
            log.warning("a commit came too late, records will be read twice: %s", error)
            raise BatchAbandoned from error

    async def _apply_isolating_failures(
        self, stage: BatchStage, batch: Sequence[ReceivedEvent], attempts: int
    ) -> list[RefusedRecord]:
        """Apply the batch; halve it where it fails until the failing record stands alone."""
        failure = None
        backoff = Backoff(_FIRST_WAIT_S, _LONGEST_WAIT_S)
        for attempt in range(1, attempts + 1):
            try:
                return list(
                    await self._retry_outages(
                        stage.name, lambda: stage.apply(batch), self._options.deadline_s
                    )
                )
            except BatchAbandoned:
                raise
            except Exception as error:
                failure = error
                FAILURES.labels(stage.name, "error").inc()
                log.warning(
                    "%s failed on %d records (try %d of %d)", stage.name, len(batch), attempt, attempts,
                    exc_info=error,
                )  # fmt: skip
            if attempt < attempts:
                await self._back_off(backoff)
        if len(batch) == 1:
            reason = "timeout" if isinstance(failure, TimeoutError) else "failed"
            detail = f"{type(failure).__name__}: {failure}"
            return [RefusedRecord(batch[0].record, stage.name, reason, detail, attempts)]
        middle = len(batch) // 2
        refused = []
        for half in (batch[:middle], batch[middle:]):
            # Only a record that stands alone is tried `attempts` times.
            refused += await self._apply_isolating_failures(
                stage, half, self._options.attempts if len(half) == 1 else 1
            )
        return refused

    async def _retry_outages(
        self, label: str, action: Callable[[], Awaitable[Any]], deadline_s: float | None = None
    ) -> Any:
        """Run `action`, again while Redis or Kafka is away. Raises its other errors, and TimeoutError."""
        attempt = 0
        backoff = Backoff(_FIRST_WAIT_S, _LONGEST_WAIT_S)
        while True:
            try:
                async with asyncio.timeout(deadline_s) as limit:
                    return await action()
            except _NOT_OUTAGES:
                raise
            except (KafkaError, OSError, TimeoutError, *redisdb.OUTAGES) as error:
                if limit.expired():
                    raise
                attempt += 1
                FAILURES.labels(label, "outage").inc()
                log.warning("%s waits (try %d): %s: %s", label, attempt, type(error).__name__, error)
            await self._back_off(backoff)

    async def _back_off(self, backoff: Backoff) -> None:
        """Wait before the next try. Raises BatchAbandoned when the partitions must be released."""
        try:
            await asyncio.wait_for(self._must_release.wait(), backoff.next_wait())
        except TimeoutError:
            return
        raise BatchAbandoned

    async def _measure_lag(self) -> None:
        now = time.monotonic()
        if now - self._lag_measured_at < _LAG_EVERY_S:
            return
        self._lag_measured_at = now
        for partition in self._consumer.assignment():
            end = self._consumer.highwater(partition)
            if end is None:  # nothing was fetched yet
                continue
            position = await self._consumer.position(partition)
            CONSUMER_LAG.labels(partition.topic, partition.partition).set(max(0, end - position))
            await self._hooks.on_lag(partition, max(0, end - position))

    def _count_outcomes(
        self, fetched: dict[TopicPartition, list[Any]], refused: Sequence[RefusedRecord],
        misplaced: Sequence[ReceivedEvent],
    ) -> None:  # fmt: skip
        for partition, records in fetched.items():
            EVENT_COUNT.labels(partition.topic, "read").inc(len(records))
        for refusal in refused:
            EVENT_COUNT.labels(refusal.record.topic, "dead_letter").inc()
        for record, _ in misplaced:
            EVENT_COUNT.labels(record.topic, "rerouted").inc()

    async def release_partitions(self) -> None:
        """Called before partitions are revoked; returns when no record of them is in work."""
        self._must_release.set()
        async with self._work_lock:
            self._rebalance_count += 1
            self._assigned = None
            self._next_offsets.clear()
            CONSUMER_LAG.clear()

    def accept_partitions(self) -> None:
        """Called after an assignment: batches may be worked on again."""
        if not self.should_stop:
            self._must_release.clear()


class _RebalanceListener(ConsumerRebalanceListener):
    def __init__(self, loop: BatchLoop) -> None:
        self._loop = loop

    async def on_partitions_revoked(self, revoked: Any) -> None:
        await self._loop.release_partitions()

    async def on_partitions_assigned(self, assigned: Any) -> None:
        self._loop.accept_partitions()
