"""Histories are recoded on a real Redis, whoever writes meanwhile and whenever a worker dies."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import redis
import redis.asyncio

from agents.assigned_sids import AssignedSids
from agents.history_recoder import HistoryRecoder, HistoryReplacer, ReplaceHistories
from agents.history_writer import HistoryWriter
from agents.parked_events import ParkedEvents
from harness.servers import PARTITIONS
from streams.events import Click, SidAssignment
from streams.settings import HistorySettings, KafkaSettings
from streams.state import history, keys
from streams.wire.batch_stage import ReceivedEvent
from streams.wire.records import KafkaRecord, partition_of
from tests.clock import Clock

pytestmark = pytest.mark.integration

OLD, NEW = "00000000aaaaaaaa", "11111111bbbbbbbb"
T0 = 1_700_000_000_000
USERS = [f"u{n}" for n in range(60)]
ITEMS = [f"i{n}" for n in range(6)]
SIDS = {
    OLD: {item: (n // 2, n % 2) for n, item in enumerate(ITEMS)},
    NEW: {item: (5 - n, 7, n) for n, item in enumerate(ITEMS)},
}
LIVES = {"clicks": 3, "purchases": 4}


class Killed(Exception):
    """Stands for the end of the process."""


class Place(KafkaRecord):
    """A record with a place on its topic."""

    offset = 0
    partition = 0


def clicks(user: str, items: Sequence[int], since: int = 0) -> list[ReceivedEvent]:
    """One click on each of these items, at offsets and minutes from `since` on."""
    received = []
    for at, item in enumerate(items, since):
        event = Click.new(
            user_id=user, item_id=ITEMS[item], ts=T0 + at * 60_000, event_id=f"{user}-{at}"
        )  # fmt: skip
        record = Place("clicks", event.key, b"")
        record.offset = at
        received.append(ReceivedEvent(record, event))
    return received


def expected_history(batch: Sequence[ReceivedEvent], codebook: str) -> bytes:
    """The history of one user's events by the pure function, under one codebook."""
    changes = [
        history.HistoryChange("clicks", record.offset, history.pack_entry(
            event.ts, history.CLICK, event.event_id, history.pack_sid(SIDS[codebook][event.item_id])))
        for record, event in batch
    ]  # fmt: skip
    value, _, _ = history.apply_changes(
        None, changes, codebook=codebook, levels=len(SIDS[codebook]["i0"]), incarnations=LIVES,
        bounds=HistorySettings(),
    )  # fmt: skip
    assert value is not None
    return value


class Worker:
    """The parts of a worker that write histories: SIDs, the stage of histories, and the recoder."""

    def __init__(
        self, store: redis.asyncio.Redis, partitions: Sequence[int] = range(PARTITIONS),
        replace: ReplaceHistories | None = None,
    ) -> None:  # fmt: skip
        self._clock = Clock()
        self.sids = AssignedSids(KafkaSettings(), store, self._clock)
        self.recoder = HistoryRecoder(store, self.sids, HistorySettings(), replace)
        self.recoder.take_partitions(partitions, PARTITIONS)
        self.history_writer = HistoryWriter(
            store, self.sids, ParkedEvents(store, self.sids, 30), self.recoder, HistorySettings(), LIVES
        )

    def learn_sids(self, codebook: str, items: Sequence[str] = ITEMS) -> None:
        for item in items:
            event = SidAssignment.new(
                item_id=item, sid=list(SIDS[codebook][item]), codebook=codebook,
                ts=T0 + (codebook == NEW),
            )  # fmt: skip
            self.sids.add_record(event.key.decode(), event)
        # Long enough for the codebook to count as whole.
        self._clock.now += 60
        self.sids.switch_to_newest()

    async def scan(self) -> None:
        await self.recoder.run_slice()
        while self.recoder.is_scanning:
            await self.recoder.run_slice()


def stored(store: redis.Redis) -> dict[str, bytes]:
    return {keys.user_of_history(name): store.get(name) for name in store.scan_iter(match="h:*")}


@pytest.fixture
def run(redis_url: str) -> Callable[[Callable[[Any], Awaitable[None]]], dict[str, bytes]]:
    """Empties Redis, runs a coroutine with a client, and returns the histories that it leaves."""

    def go(work: Callable[[Any], Awaitable[None]]) -> dict[str, bytes]:
        async def inside() -> None:
            async with redis.asyncio.Redis.from_url(redis_url) as client:
                await client.flushall()
                await work(client)

        asyncio.run(inside())
        with redis.Redis.from_url(redis_url) as store:
            return stored(store)

    return go


async def worker_with_old_histories(store: redis.asyncio.Redis, **worker: Any) -> Worker:
    """A worker that has written four clicks of each user under the old codebook."""
    worker = Worker(store, **worker)
    worker.learn_sids(OLD)
    for user in USERS:
        await worker.history_writer.apply(clicks(user, [0, 5, 2, 1]))
    return worker


def test_the_scan_brings_over_this_workers_users_and_no_others(run) -> None:
    async def work(store: Any) -> None:
        worker = await worker_with_old_histories(store, partitions=[1, 3])
        worker.learn_sids(NEW)
        await worker.scan()

    for user, value in run(work).items():
        mine = partition_of(user.encode(), PARTITIONS) in (1, 3)
        assert value == expected_history(clicks(user, [0, 5, 2, 1]), NEW if mine else OLD)


def test_an_event_brings_its_history_over_and_a_redelivered_one_changes_nothing(run) -> None:
    async def work(store: Any) -> None:
        worker = await worker_with_old_histories(store)
        worker.learn_sids(NEW)
        # The last two of the old time are seen again, beside a new one.
        redelivered = clicks("u7", [0, 5, 2, 1, 3])[2:]
        await worker.history_writer.apply(redelivered)
        await worker.history_writer.apply(redelivered)

    after = run(work)
    assert after["u7"] == expected_history(clicks("u7", [0, 5, 2, 1, 3]), NEW)
    assert after["u8"] == expected_history(clicks("u8", [0, 5, 2, 1]), OLD)


@pytest.mark.parametrize("restarted", [False, True])
def test_what_waits_takes_its_place_when_its_item_gets_a_sid_also_after_a_restart(run, restarted) -> None:
    async def work(store: Any) -> None:
        worker = await worker_with_old_histories(store)
        worker.learn_sids(NEW, ITEMS[:5])
        await worker.scan()
        for value in [await store.get(keys.history(user)) for user in USERS]:
            decoded = history.decode_history(value)
            assert [e.sid for e in decoded.entries] == [SIDS[NEW][f"i{n}"] for n in (0, 2, 1)]
            assert [(tag, e.sid) for tag, e in decoded.waiting] == [(OLD[:8], SIDS[OLD]["i5"])]
        await worker.history_writer.apply(clicks("u3", [4], since=4))
        if restarted:
            worker = Worker(store)
            worker.learn_sids(OLD)
            worker.learn_sids(NEW, ITEMS[:5])
            await worker.scan()
        worker.learn_sids(NEW, ITEMS[5:])
        await worker.recoder.run_slice()

    for user, value in run(work).items():
        assert value == expected_history(clicks(user, [0, 5, 2, 1, 4] if user == "u3" else [0, 5, 2, 1]), NEW)


def test_a_write_in_between_is_not_lost(run) -> None:
    async def work(store: Any) -> None:
        other, calls = Worker(store), itertools.count()
        other.learn_sids(OLD)

        async def overtaken(values: Any) -> list[int]:
            # A worker that has not heard of the new codebook yet writes after the read.
            if next(calls) == 0:
                await other.history_writer.apply(clicks("u1", [3], since=4))
            return await HistoryReplacer(store).replace(values)

        worker = await worker_with_old_histories(store, replace=overtaken)
        worker.learn_sids(NEW)
        await worker.scan()

    assert run(work)["u1"] == expected_history(clicks("u1", [0, 5, 2, 1, 3]), NEW)


def test_a_worker_that_dies_half_way_is_followed_by_one_that_brings_over_the_rest(run) -> None:
    async def work(store: Any) -> None:
        async def dying(values: Any) -> list[int]:
            await HistoryReplacer(store).replace(values[: len(values) // 2])
            raise Killed

        worker = await worker_with_old_histories(store, replace=dying)
        worker.learn_sids(NEW)
        with pytest.raises(Killed):
            await worker.scan()
        tags = [(await store.get(keys.history(user)))[2:6].hex() for user in USERS]
        assert set(tags) == {OLD[:8], NEW[:8]}
        next_worker = Worker(store)
        next_worker.learn_sids(OLD)
        next_worker.learn_sids(NEW)
        await next_worker.history_writer.apply(clicks("u0", [0, 5, 2, 1])[1:])  # what was not committed
        await next_worker.scan()

    assert run(work) == {user: expected_history(clicks(user, [0, 5, 2, 1]), NEW) for user in USERS}


def test_a_history_that_cannot_be_read_stops_neither_the_scan_nor_the_others(run) -> None:
    async def work(store: Any) -> None:
        worker = await worker_with_old_histories(store)
        await store.set(keys.history("broken"), b"\x02\x02abcd" + bytes(20) + b"\x00\x00\x00\x09x")
        await store.set(keys.history("future"), b"\x09" + bytes(30))
        worker.learn_sids(NEW)
        await worker.scan()

    after = run(work)
    assert after.pop("broken")[:2] == b"\x02\x02"
    assert after.pop("future")[:1] == b"\x09"
    assert after == {user: expected_history(clicks(user, [0, 5, 2, 1]), NEW) for user in USERS}


def test_under_the_only_codebook_that_ever_was_nothing_is_looked_at(run) -> None:
    async def work(store: Any) -> None:
        worker = await worker_with_old_histories(store)
        scan_calls = (await store.info("commandstats")).get("cmdstat_scan", {}).get("calls", 0)
        await worker.recoder.run_slice()
        assert (await store.info("commandstats")).get("cmdstat_scan", {}).get("calls", 0) == scan_calls

    run(work)
