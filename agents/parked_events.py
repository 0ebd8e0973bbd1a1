"""Events whose item has no SID yet: kept in Redis with their bytes until the SID comes or the time is up."""

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
from streams.wire.batch_loop import EVENT_COUNT, ReceivedEvent
from streams.wire.dead_letters import RefusedRecord

# How often the parked items are looked at while no new SID came.
_SWEEP_EVERY_S: Final = 1.0
# Items in one go, so that a sweep of many does not keep the batches waiting for long.
_ITEMS_PER_SWEEP: Final = 200


class ParkedRecord(NamedTuple):
    """A record that waits; looks like a consumer's record."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes
    parked_ms: int


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ParkedRecord)


class ParkedEvents:
    """Parks records by item; sweeps those of this worker's partitions."""

    def __init__(self, store: redis.asyncio.Redis, sids: AssignedSids, park_seconds: int) -> None:
        self._store = store
        self._sids = sids
        self._park_ms = park_seconds * 1000
        self._partitions: frozenset[int] = frozenset()
        self._swept_at = 0.0
        self._change_count_seen = -1
        self._has_more = False

    def take_partitions(self, partitions: Iterable[int]) -> None:
        """The partitions whose parked records this worker looks after."""
        self._partitions = frozenset(partitions)
        self._swept_at, self._has_more = 0.0, True

    async def park(self, waiting: Sequence[ReceivedEvent]) -> None:
        """Keep these records; keeping one twice is keeping it once."""
        now = time.time_ns() // 1_000_000
        commands: list[tuple[Any, ...]] = []
        for record, event in waiting:
            place = f"{record.topic}:{record.partition}:{record.offset}"
            parked = ParkedRecord(
                record.topic, record.partition, record.offset, record.key, record.value, now
            )
            # HSETNX: a record that is seen again must not wait longer for that.
            commands.append(("HSETNX", keys.parked(event.item_id), place, _encoder.encode(parked)))
            commands.append(("ZADD", keys.parked_items(record.partition), "NX", now, event.item_id))
        results = await run_pipeline(self._store, commands)
        for (record, _), new in zip(waiting, results[::2], strict=True):
            EVENT_COUNT.labels(record.topic, "parked").inc(new)
        self._has_more = True

    async def sweep(self, apply: Callable[[list[Any]], Awaitable[None]]) -> list[RefusedRecord]:
        """Give events whose SID came to `apply`; return those whose time is up, to be dead-lettered.

        A returned record stays parked until `forget`.
        """
        now = time.monotonic()
        if (
            not self._has_more
            and self._change_count_seen == self._sids.change_count
            and now - self._swept_at < _SWEEP_EVERY_S
        ):
            return []
        self._swept_at, self._change_count_seen, self._has_more = now, self._sids.change_count, False
        since = self._sids.complete_since_ms()
        refused: list[RefusedRecord] = []
        for partition in sorted(self._partitions):
            index = keys.parked_items(partition)
            found: list[Any] = await self._store.zrange(index, 0, -1)
            items = [item.decode() for item in found]
            PARKED.labels(partition).set(len(items))
            ready = [item for item in items if self._sids.get(item) is not None]
            self._has_more = self._has_more or len(ready) > _ITEMS_PER_SWEEP
            for item in ready[:_ITEMS_PER_SWEEP]:
                records = await self._records(item, partition)
                await apply([decode(BY_TOPIC[r.topic], r.value) for r in records])
                await self._remove(item, records)
                await self._store.zrem(index, item)
            if since is not None:
                refused += await self._expired(partition, since)
        return refused

    async def remove_dead_lettered(self, refused: Iterable[RefusedRecord]) -> None:
        """Remove records that now stand in dead letters."""
        for refusal in refused:
            record = refusal.record
            item = decode(BY_TOPIC[record.topic], record.value).item_id  # type: ignore[attr-defined]
            await self._remove(item, [record])

    async def _expired(self, partition: int, since_ms: int) -> list[RefusedRecord]:
        wall = time.time_ns() // 1_000_000
        # Without a codebook an event waits as long as it takes: the time counts from when there is one.
        if since_ms + self._park_ms > wall:
            return []
        index = keys.parked_items(partition)
        refused = []
        late: list[Any] = await self._store.zrangebyscore(
            index, "-inf", wall - self._park_ms, start=0, num=_ITEMS_PER_SWEEP
        )
        for raw in late:
            item = raw.decode()
            if self._sids.get(item) is not None:
                continue
            records = await self._records(item, partition)
            overdue = [r for r in records if r.parked_ms + self._park_ms <= wall]
            detail = (
                f"item_id is {item!r}, which had no SID for {self._park_ms / 1000:g} s: publish it on catalog"
            )
            refused += [RefusedRecord(record, "histories", "unknown_item", detail) for record in overdue]
            left = [r.parked_ms for r in records if r not in overdue]
            if left:
                await self._store.zadd(index, {item: min(left)})
            elif not overdue:
                await self._store.zrem(index, item)
        return refused

    async def _records(self, item: str, partition: int) -> list[ParkedRecord]:
        found: dict[Any, Any] = await self._store.hgetall(keys.parked(item))
        records = [_decoder.decode(value) for value in found.values()]
        return sorted(r for r in records if r.partition == partition)

    async def _remove(self, item: str, records: Sequence[Any]) -> None:
        if records:
            places = [f"{r.topic}:{r.partition}:{r.offset}" for r in records]
            await self._store.hdel(keys.parked(item), *places)
