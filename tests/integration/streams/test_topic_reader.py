"""Reading a topic to a known end: every record of the range once, deletions and bad records told apart."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka import TopicPartition
from kafka import KafkaProducer

from streams.errors import SidstreamError
from streams.events import CatalogItem, Click
from streams.wire.admin import create_topics, delete_topics, offset_spans
from streams.wire.bulk_writer import publish_all
from streams.wire.connect import client_options
from streams.wire.topic_reader import read_events, read_newest_events, read_ranges, read_records
from tests.conftest import FreshStack

pytestmark = pytest.mark.integration


def test_a_range_gives_its_begin_and_not_its_end_and_what_comes_later_is_left_out(
    fresh_stack: FreshStack,
) -> None:
    kafka, _ = fresh_stack()
    publish_all(kafka, [Click.new(user_id=f"u{n}", item_id="i") for n in range(200)])
    spans = offset_spans(kafka)["clicks"]
    assert all(span.end > 10 for span in spans.values())
    ranges = {TopicPartition("clicks", number): (3, span.end - 2) for number, span in spans.items()}
    ranges[TopicPartition("clicks", 0)] = (5, 5)
    publish_all(kafka, [Click.new(user_id=f"u{n}", item_id="late") for n in range(200)])

    async def read() -> list[tuple[int, int]]:
        batches = [records async for _, records in read_ranges(kafka, ranges)]
        return [(record.partition, record.offset) for records in batches for record in records]

    expected = [(n, offset) for n, span in spans.items() if n for offset in range(3, span.end - 2)]
    offsets = asyncio.run(read())
    assert sorted(offsets) == expected
    for number in spans:
        of_partition = [offset for partition, offset in offsets if partition == number]
        assert of_partition == sorted(of_partition)


def test_the_newest_event_of_each_key_counts_and_a_deleted_key_is_gone(fresh_stack: FreshStack) -> None:
    kafka, _ = fresh_stack()
    publish_all(kafka, [CatalogItem.new(item_id=f"i{n % 3}", title=f"title {n}") for n in range(6)])
    producer = KafkaProducer(**client_options(kafka))
    producer.send("catalog", key=b"i1", value=b"{not json").get(10)
    producer.send("catalog", key=b"i2", value=None).get(10)
    producer.close()
    newest = read_newest_events(kafka, CatalogItem)
    assert {key: item.title for key, item in newest.items()} == {"i0": "title 3", "i1": "title 4"}
    assert len(read_records(kafka, "catalog")) == 8
    events = read_events(kafka, CatalogItem, ["i2"])
    assert [(key, event and event.title) for key, event in events] == [
        ("i2", "title 2"), ("i2", "title 5"), ("i2", None),
    ]  # fmt: skip


def test_a_topic_that_does_not_exist_is_named(fresh_stack: FreshStack) -> None:
    kafka, _ = fresh_stack()
    delete_topics(kafka)
    try:
        with pytest.raises(SidstreamError, match="topic catalog does not exist"):
            read_newest_events(kafka, CatalogItem)
    finally:
        create_topics(kafka)
