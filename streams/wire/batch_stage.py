"""What a batch loop needs of its user: stages that apply batches, and hooks between the batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

from aiokafka import TopicPartition
from prometheus_client import Counter

from streams.wire.dead_letters import RefusedRecord

# Stages count here too, under outcomes of their own.
EVENT_COUNT: Final = Counter(
    "sidstream_events_total", "Records read, by what became of them", ["topic", "outcome"]
)


class ReceivedEvent(NamedTuple):
    """A Kafka record and its decoded event; event None: the key was deleted (compacted topics only)."""

    record: Any
    event: Any


class BatchStage(Protocol):
    """One idempotent step. It may raise: the loop retries, isolates and dead-letters."""

    @property
    def name(self) -> str:
        """The stage's name in dead letters and metrics."""
        ...

    async def apply(self, batch: Sequence[ReceivedEvent]) -> Sequence[RefusedRecord]:
        """Apply the whole batch; return the records that can never be applied."""
        ...


class BatchHooks:
    """Calls that the loop makes in its own task, between batches. All do nothing by default."""

    async def on_start(self) -> None:
        """Called before the first fetch."""

    async def on_assigned(self, partitions: frozenset[TopicPartition]) -> None:
        """Called with all partitions of this worker after each assignment."""

    async def on_rewound(self) -> None:
        """Called when a partition gives an offset again: the topic may have been deleted and created."""

    async def on_lag(self, partition: TopicPartition, lag: int) -> None:
        """Called about once a second with the number of records of the partition that are not read yet."""

    async def on_tick(self) -> Sequence[RefusedRecord]:
        """Called after each fetch, also an empty one. Returned records are dead-lettered."""
        return ()

    async def on_dead_lettered(self, refused: Sequence[RefusedRecord]) -> None:
        """Called when the records that `on_tick` returned are in dead letters."""
