"""Events whose item has no SID yet: their bytes wait in Redis until the SID comes or their time is up."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import redis.asyncio

from agents.assigned_sids import AssignedSids
from agents.metrics import PARKED
from streams.events import BY_TOPIC, decode
from streams.state import keys
from streams.state.redisdb import run_pipeline
from streams.wire.batch_stage import EVENT_COUNT, ReceivedEvent
from streams.wire.dead_letters import RefusedRecord

# How often the parked items are swept while no new SID comes.
_SWEEP_EVERY_S: Final = 1.0
# Items of one sweep, so that a sweep of many does not delay the batches for long.
_ITEMS_PER_SWEEP: Final = 200


class ParkedRecord(NamedTuple):
    """A record that waits. It has the fields of a consumer's record, so it can be dead-lettered like one."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes
    parked_ms: int


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ParkedRecord)


class ParkedEvents:
    """Parks records by item, and sweeps those of this worker's partitions."""

    def __init__(self, store: redis.asyncio.Redis, sids: AssignedSids, park_seconds: int) -> None:
        self._store = store
        self._sids = sids
        self._park_ms = park_seconds * 1000
        self._partitions: frozenset[int] = frozenset()
        self._swept_at = 0.0
        self._change_count_seen = -1
        self._has_more = False

    def take_partitions(self, partitions: Iterable[int]) -> None:
        """The partitions whose parked records this worker sweeps from now on."""
        self._partitions = frozenset(partitions)
        self._swept_at, self._has_more = 0.0, True

    async def park(self, without_sid: Sequence[ReceivedEvent]) -> None:
        """Store these records; a record that is parked twice is stored once."""
        now = time.time_ns() // 1_000_000
        commands: list[tuple[Any, ...]] = []
        for record, event in without_sid:
            position = f"{record.topic}:{record.partition}:{record.offset}"
            parked = ParkedRecord(
                record.topic, record.partition, record.offset, record.key, record.value, now
            )
            # HSETNX: a record that is read again keeps the time at which it was first parked.
            commands.append(("HSETNX", keys.parked(event.item_id), position, _encoder.encode(parked)))
            commands.append(("ZADD", keys.parked_items(record.partition), "NX", now, event.item_id))
        results = await run_pipeline(self._store, commands)
        for (record, _), new in zip(without_sid, results[::2], strict=True):
            EVENT_COUNT.labels(record.topic, "parked").inc(new)
        self._has_more = True

    async def sweep(self, apply: Callable[[list[Any]], Awaitable[None]]) -> list[RefusedRecord]:
        """Give events whose item has a SID now to `apply`; return those whose time is up, for dead letters.

        A returned record stays parked until `remove_dead_lettered`.
        """
        now = time.monotonic()
        if (
            not self._has_more
            and self._change_count_seen == self._sids.change_count
            and now - self._swept_at < _SWEEP_EVERY_S
        ):
            return []
        self._swept_at, self._change_count_seen, self._has_more = now, self._sids.change_count, False
        complete_since_ms = self._sids.complete_since_ms()
        refused: list[RefusedRecord] = []
        for partition in sorted(self._partitions):
            index = keys.parked_items(partition)
            members: list[Any] = await self._store.zrange(index, 0, -1)
            items = [item.decode() for item in members]
            PARKED.labels(partition).set(len(items))
            ready = [item for item in items if self._sids.get(item) is not None]
            self._has_more = self._has_more or len(ready) > _ITEMS_PER_SWEEP
            for item in ready[:_ITEMS_PER_SWEEP]:
                records = await self._records(item, partition)
                await apply([decode(BY_TOPIC[r.topic], r.value) for r in records])
                await self._remove(item, records)
                await self._store.zrem(index, item)
            if complete_since_ms is not None:
                refused += await self._expired(partition, complete_since_ms)
        return refused

    async def remove_dead_lettered(self, refused: Iterable[RefusedRecord]) -> None:
        """Remove records that are in dead letters now."""
        for refusal in refused:
            record = refusal.record
            item = decode(BY_TOPIC[record.topic], record.value).item_id  # type: ignore[attr-defined]
            await self._remove(item, [record])

    async def _expired(self, partition: int, complete_since_ms: int) -> list[RefusedRecord]:
        wall = time.time_ns() // 1_000_000
        # Without a codebook no event expires: its time counts from when the SIDs are complete.
        if complete_since_ms + self._park_ms > wall:
            return []
        index = keys.parked_items(partition)
        refused = []
        expired_items: list[Any] = await self._store.zrangebyscore(
            index, "-inf", wall - self._park_ms, start=0, num=_ITEMS_PER_SWEEP
        )
        for raw in expired_items:
            item = raw.decode()
            if self._sids.get(item) is not None:
                continue
            records = await self._records(item, partition)
            overdue = [r for r in records if r.parked_ms + self._park_ms <= wall]
            detail = (
                f"item_id is {item!r}, which had no SID for {self._park_ms / 1000:g} s: publish it on catalog"
            )
            refused += [RefusedRecord(record, "histories", "unknown_item", detail) for record in overdue]
            remaining = [r.parked_ms for r in records if r not in overdue]
            if remaining:
                await self._store.zadd(index, {item: min(remaining)})
            elif not overdue:
                await self._store.zrem(index, item)
        return refused

    async def _records(self, item: str, partition: int) -> list[ParkedRecord]:
        stored: dict[Any, Any] = await self._store.hgetall(keys.parked(item))
        records = [_decoder.decode(value) for value in stored.values()]
        return sorted(r for r in records if r.partition == partition)

    async def _remove(self, item: str, records: Sequence[Any]) -> None:
        if records:
            positions = [f"{r.topic}:{r.partition}:{r.offset}" for r in records]
            await self._store.hdel(keys.parked(item), *positions)
