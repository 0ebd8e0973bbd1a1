"""The tests' own stack: topics come back empty, Redis too."""

from __future__ import annotations

import pytest
import redis
from kafka import KafkaProducer

from streams.wire.admin import end_offsets, incarnations
from streams.wire.connect import client_options
from tests.conftest import FreshStack

pytestmark = pytest.mark.integration


def test_a_fresh_stack_has_all_topics_and_none_of_the_data_before(fresh_stack: FreshStack) -> None:
    kafka, url = fresh_stack()
    before = incarnations(kafka)
    with KafkaProducer(**client_options(kafka)) as producer:
        producer.send("clicks", b"{}", key=b"u").get(timeout=30)
    with redis.Redis.from_url(url) as connection:
        connection.set("h:{u}", b"1")
    assert sum(end_offsets(kafka, "clicks").values()) == 1

    kafka, url = fresh_stack()

    assert set(end_offsets(kafka, "clicks").values()) == {0}
    after = incarnations(kafka)
    assert set(after) == set(before)
    assert after["clicks"] != before["clicks"]
    with redis.Redis.from_url(url) as connection:
        assert connection.dbsize() == 0
