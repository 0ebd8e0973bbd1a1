"""Topics on a real broker: created once, checked afterwards; a topic created again is a new one."""

from __future__ import annotations

import pytest
from kafka import KafkaConsumer
from kafka.admin import NewPartitions

from harness.servers import wait_until
from streams.errors import SidstreamError
from streams.events import BY_TOPIC, Click
from streams.settings import KafkaSettings
from streams.wire.admin import (
    admin_client,
    consumer_group_lag,
    create_topics,
    delete_topics,
    end_offsets,
    incarnations,
    offset_spans,
    topic_names,
)
from streams.wire.connect import client_options
from streams.wire.topics import all_topics
from tests.conftest import FreshStack

pytestmark = pytest.mark.integration


def test_creating_makes_what_is_missing_with_its_partitions_and_policy(kafka: KafkaSettings) -> None:
    delete_topics(kafka)
    assert not set(BY_TOPIC) & topic_names(kafka)
    assert set(create_topics(kafka)) == set(BY_TOPIC)
    assert create_topics(kafka) == []
    assert {name: len(partitions) for name, partitions in offset_spans(kafka).items()} == {
        t.name: t.partitions for t in all_topics(kafka)
    }

    from kafka.admin import ConfigResource, ConfigResourceType

    from streams.wire.admin import admin_client

    with admin_client(kafka) as client:
        topic_configs = client.describe_configs(
            [ConfigResource(ConfigResourceType.TOPIC, t.name) for t in all_topics(kafka)]
        )
    described = str(topic_configs)
    assert "compact" in described
    assert str(kafka.max_event_bytes) in described


def test_topics_with_other_partitions_than_wanted_are_named_with_the_remedy(kafka: KafkaSettings) -> None:
    create_topics(kafka)
    with pytest.raises(SidstreamError) as refused:
        create_topics(kafka.model_copy(update={"partitions": kafka.partitions + 4}))
    text = str(refused.value)
    assert "catalog has 4 partitions, the settings want 8" in text
    assert "SIDSTREAM_KAFKA__PARTITIONS" in text


def test_more_replicas_than_brokers_are_refused_with_the_remedy(kafka: KafkaSettings) -> None:
    delete_topics(kafka)
    with pytest.raises(SidstreamError, match="SIDSTREAM_KAFKA__REPLICATION"):
        create_topics(kafka.model_copy(update={"replication": 3}))
    create_topics(kafka)


def test_a_topic_that_is_made_again_has_another_incarnation(kafka: KafkaSettings) -> None:
    create_topics(kafka)
    first = incarnations(kafka)
    assert set(first) == set(BY_TOPIC)
    assert all(0 <= value < 2**32 for value in first.values())
    assert incarnations(kafka) == first
    delete_topics(kafka)
    create_topics(kafka)
    assert all(after != first[name] for name, after in incarnations(kafka).items())


def test_a_topic_that_is_given_more_partitions_has_another_incarnation(fresh_stack: FreshStack) -> None:
    kafka, _ = fresh_stack()
    first = incarnations(kafka)
    with admin_client(kafka) as client:
        client.create_partitions({"clicks": NewPartitions(2 * kafka.partitions)})
    wait_until(lambda: incarnations(kafka)["clicks"] != first["clicks"], 20, "another incarnation")
    after = incarnations(kafka)
    assert {name for name in first if first[name] != after[name]} == {"clicks"}
    delete_topics(kafka)


def test_lag_counts_what_a_group_has_not_committed(fresh_stack: FreshStack) -> None:
    from streams.wire.client import Client

    kafka, _ = fresh_stack()
    with pytest.raises(SidstreamError, match="group nobody reads no topic"):
        consumer_group_lag(kafka, "nobody")
    with Client(kafka) as client:
        client.publish_all(Click.new(user_id=f"u{n}", item_id="i") for n in range(20))
        assert sum(end_offsets(kafka, "clicks").values()) == 20
        options = {"group_id": "readers", "auto_offset_reset": "earliest", "enable_auto_commit": False}
        with KafkaConsumer("clicks", **client_options(kafka), **options) as consumer:
            read = 0
            while read < 20:
                read += sum(map(len, consumer.poll(timeout_ms=500).values()))
            assert consumer_group_lag(kafka, "readers") == 20
            consumer.commit()
        assert consumer_group_lag(kafka, "readers") == 0
        client.publish_all(Click.new(user_id=f"u{n}", item_id="i") for n in range(7))
    assert consumer_group_lag(kafka, "readers") == 7


def test_a_broker_that_is_not_there_is_named() -> None:
    with pytest.raises(SidstreamError, match=r"Kafka at 127\.0\.0\.1:9 does not answer.*sidstream up"):
        topic_names(KafkaSettings(bootstrap="127.0.0.1:9"))


def test_a_missing_address_says_how_to_give_one() -> None:
    with pytest.raises(SidstreamError, match="SIDSTREAM_KAFKA__BOOTSTRAP"):
        topic_names(KafkaSettings())
