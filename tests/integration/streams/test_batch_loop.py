"""The batch loop on real Kafka: a failing record stands alone, an outage is waited out, none is skipped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence

import pytest
import redis
from kafka import KafkaProducer

from streams.errors import SidstreamError
from streams.events import CatalogItem, Click
from streams.settings import KafkaSettings
from streams.wire.admin import consumer_group_lag
from streams.wire.batch_loop import BatchLoop, BatchOptions
from streams.wire.batch_stage import ReceivedEvent
from streams.wire.bulk_writer import publish_all
from streams.wire.connect import client_options
from streams.wire.dead_letters import RefusedRecord
from streams.wire.topic_table import TopicTable
from tests.conftest import FreshStack
from tests.integration.agents.test_agents import read

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]

WAIT_S = 90.0


class Recorder:
    """A stage that records the events it applied, and raises what `trouble(event)` returns."""

    name = "recorder"

    def __init__(self, trouble: Callable[[Click], Exception | None] = lambda event: None) -> None:
        self.trouble = trouble
        self.applied: list[str] = []
        self.calls = 0

    async def apply(self, batch: Sequence[ReceivedEvent]) -> Sequence[RefusedRecord]:
        self.calls += 1
        for _, event in batch:
            failure = self.trouble(event)
            if failure is not None:
                raise failure
        self.applied += [event.event_id for _, event in batch]
        return ()


def options(group: str, **changed: float) -> BatchOptions:
    fields = {"batch_size": 50, "deadline_s": 30.0, "attempts": 2, "session_timeout_s": 6.0, **changed}
    return BatchOptions(group=group, **fields)  # type: ignore[arg-type]


def clicks(count: int, first: int = 0) -> list[Click]:
    began = 1_700_000_000_000
    return [
        Click.new(event_id=f"e{n}", user_id=f"u{n % 17}", item_id="i", ts=began + n)
        for n in range(first, first + count)
    ]


async def until(condition: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.05)


async def committed(kafka: KafkaSettings, group: str) -> int:
    """Records that the group has not committed; -1: it has not begun."""
    try:
        return await asyncio.to_thread(consumer_group_lag, kafka, group)
    except SidstreamError:
        return -1


async def until_committed(kafka: KafkaSettings, group: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while await committed(kafka, group) != 0:
            await asyncio.sleep(0.2)


def test_a_poison_record_is_dead_lettered_alone_after_its_attempts(fresh_stack: FreshStack) -> None:
    kafka, _ = fresh_stack()
    publish_all(kafka, clicks(40))
    stage = Recorder(lambda event: ValueError("cannot be") if event.event_id in ("e7", "e30") else None)

    async def run() -> None:
        async with BatchLoop(kafka, (Click,), (stage,), options("poison")):
            await until_committed(kafka, "poison")

    asyncio.run(run())
    assert set(stage.applied) == {f"e{n}" for n in range(40)} - {"e7", "e30"}
    letters = read(kafka, "dead-letters")
    refused = {(letter["stage"], letter["reason"], letter["attempt"]) for letter in letters}
    assert refused == {("recorder", "failed", 2)}
    assert len(letters) == 2
    assert all("cannot be" in letter["detail"] for letter in letters)


def test_a_record_that_hangs_is_dead_lettered_at_its_deadline(fresh_stack: FreshStack) -> None:
    kafka, _ = fresh_stack()
    publish_all(kafka, clicks(3))

    class Hanging(Recorder):
        async def apply(self, batch: Sequence[ReceivedEvent]) -> Sequence[RefusedRecord]:
            if any(event.event_id == "e1" for _, event in batch):
                await asyncio.Event().wait()
            return await super().apply(batch)

    stage = Hanging()

    async def run() -> None:
        async with BatchLoop(kafka, (Click,), (stage,), options("hang", deadline_s=0.3, attempts=1)):
            await until_committed(kafka, "hang")

    asyncio.run(run())
    assert set(stage.applied) == {"e0", "e2"}
    assert [letter["reason"] for letter in read(kafka, "dead-letters")] == ["timeout"]


def test_an_outage_is_waited_for_and_nothing_is_committed_or_refused_meanwhile(
    fresh_stack: FreshStack,
) -> None:
    kafka, _ = fresh_stack()
    publish_all(kafka, clicks(30))
    away = True
    stage = Recorder(lambda event: redis.ConnectionError("gone") if away else None)

    async def run() -> None:
        nonlocal away
        async with BatchLoop(kafka, (Click,), (stage,), options("outage", attempts=1)):
            await until(lambda: stage.calls >= 5, "tries during the outage")
            assert await committed(kafka, "outage") in (-1, 30)
            away = False
            await until_committed(kafka, "outage")

    asyncio.run(run())
    assert sorted(stage.applied) == sorted(f"e{n}" for n in range(30))
    assert not read(kafka, "dead-letters")


def test_a_loop_that_stops_in_an_outage_leaves_its_records_to_the_next_one(fresh_stack: FreshStack) -> None:
    kafka, _ = fresh_stack()
    publish_all(kafka, clicks(30))
    first = Recorder(lambda event: redis.ConnectionError("gone"))
    second = Recorder()

    async def run() -> None:
        async with BatchLoop(kafka, (Click,), (first,), options("handover")):
            await until(lambda: first.calls >= 2, "tries during the outage")
        async with BatchLoop(kafka, (Click,), (second,), options("handover")):
            await until_committed(kafka, "handover")

    asyncio.run(run())
    assert not first.applied
    assert sorted(second.applied) == sorted(f"e{n}" for n in range(30))


def test_loops_that_come_and_go_while_records_flow_apply_every_record(fresh_stack: FreshStack) -> None:
    kafka, _ = fresh_stack()
    log: list[Click] = []
    stages = [Recorder() for _ in range(3)]

    async def send() -> None:
        # Records flow until every loop has had its share: each rebalance happens in mid-flow.
        while not all(stage.applied for stage in stages):
            more = clicks(100, first=len(log))
            log.extend(more)
            await asyncio.to_thread(publish_all, kafka, more)

    async def run() -> None:
        sending = asyncio.create_task(send())
        async with BatchLoop(kafka, (Click,), (stages[0],), options("storm")):
            await until(lambda: bool(stages[0].applied), "the first loop")
            async with BatchLoop(kafka, (Click,), (stages[1],), options("storm")):
                await until(lambda: bool(stages[1].applied), "the second loop")
            async with BatchLoop(kafka, (Click,), (stages[2],), options("storm")):
                await until(lambda: bool(stages[2].applied), "the third loop")
                await sending
                await until_committed(kafka, "storm")

    asyncio.run(run())
    assert {event for stage in stages for event in stage.applied} == {event.event_id for event in log}


def test_a_value_near_the_size_limit_keeps_its_bytes_in_dead_letters(fresh_stack: FreshStack) -> None:
    kafka, _ = fresh_stack()
    value = json.dumps({"schema_version": 9, "filler": "x" * (kafka.max_event_bytes - 2000)}).encode()
    producer = KafkaProducer(**client_options(kafka))
    producer.send("clicks", key=b"u", value=value).get(10)
    producer.close()

    async def run() -> None:
        async with BatchLoop(kafka, (Click,), (Recorder(),), options("large")):
            await until_committed(kafka, "large")

    asyncio.run(run())
    (letter,) = read(kafka, "dead-letters")
    assert letter["reason"] == "unknown_schema_version"
    assert len(letter["value_base64"]) > len(value)


def test_a_table_follows_its_topic_and_forgets_deleted_keys(fresh_stack: FreshStack) -> None:
    kafka, _ = fresh_stack()
    publish_all(kafka, [CatalogItem.new(item_id=f"i{n % 5}", title=f"title {n}") for n in range(20)])

    async def run() -> None:
        changes: list[tuple[str, CatalogItem | None]] = []
        table = TopicTable(kafka, CatalogItem, lambda key, event: changes.append((key, event)))
        await table.start()
        try:
            await table.wait_caught_up()
            titles = {row.item_id: row.title for row in table.values()}
            assert titles == {f"i{n}": f"title {15 + n}" for n in range(5)}
            assert len(changes) == 20
            assert sum(table.next_offsets().values()) == 20
            await asyncio.to_thread(_delete, kafka, b"i3")
            await asyncio.to_thread(publish_all, kafka, [CatalogItem.new(item_id="i9", title="new")])
            await table.refresh()
            assert table.get("i3") is None
            assert table.get("i9") is not None
            assert ("i3", None) in changes
            assert len(table) == 5
        finally:
            await table.stop()

    asyncio.run(run())


def _delete(kafka: KafkaSettings, key: bytes) -> None:
    producer = KafkaProducer(**client_options(kafka))
    producer.send("catalog", key=key, value=b"{not json").get(10)
    producer.send("catalog", key=key, value=None).get(10)
    producer.close()
