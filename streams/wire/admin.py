"""Topics on the broker: create, check, delete, their offsets, and the incarnation of each."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from uuid import UUID

from kafka import KafkaAdminClient, OffsetAndMetadata, TopicPartition
from kafka.admin import OffsetSpec
from kafka.errors import (
    BrokerResponseError,
    CoordinatorLoadInProgressError,
    CoordinatorNotAvailableError,
    InvalidTopicError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    NotCoordinatorError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
)

from streams.errors import SidstreamError
from streams.settings import KafkaSettings
from streams.wire.connect import bootstrap_servers, client_options
from streams.wire.topics import all_topics

# The broker's metadata follows a creation or deletion with a delay: how long to wait, how often to ask.
_WAIT_S = 30.0
_POLL_S = 0.05
# A broker on this machine answers in milliseconds; one far away within a second or two.
_BOOTSTRAP_MS = 10_000


def unreachable_error(kafka: KafkaSettings, error: Exception) -> SidstreamError:
    """The error to raise where no broker answers."""
    return SidstreamError(
        f"Kafka at {','.join(bootstrap_servers(kafka))} does not answer ({type(error).__name__}): "
        "start the local stack with `sidstream up`, or correct SIDSTREAM_KAFKA__BOOTSTRAP"
    )


def missing_topic_error(topic: str) -> SidstreamError:
    """The error to raise where a topic does not exist."""
    return SidstreamError(f"topic {topic} does not exist: create the topics with `sidstream topics create`")


@contextmanager
def admin_client(kafka: KafkaSettings) -> Iterator[KafkaAdminClient]:
    """A connected admin client, closed at the end. Raises SidstreamError when no broker answers."""
    try:
        client = KafkaAdminClient(**client_options(kafka), bootstrap_timeout_ms=_BOOTSTRAP_MS)
    except KafkaError as error:
        raise unreachable_error(kafka, error) from error
    try:
        yield client
    except (KafkaConnectionError, KafkaTimeoutError) as error:
        raise unreachable_error(kafka, error) from error
    except KafkaError as error:
        raise SidstreamError(
            f"Kafka refused ({type(error).__name__}: {error}): check the user's rights and the broker's log"
        ) from error
    finally:
        client.close()


def create_topics(kafka: KafkaSettings) -> list[str]:
    """Create the topics that are missing; return their names. Calling it again changes nothing.

    Returns when every topic has a leader for each partition. Raises SidstreamError when a topic exists with
    another number of partitions (a user's events would change partition), or the broker refuses one.
    """
    specs = {topic.name: topic for topic in all_topics(kafka)}
    with admin_client(kafka) as client:
        existing = _describe_topics(client)
        for name in sorted(set(specs) & set(existing)):
            actual, expected = len(existing[name]["partitions"]), specs[name].partitions
            if actual != expected:
                raise SidstreamError(
                    f"topic {name} has {actual} partitions, the settings want {expected}: set "
                    f"SIDSTREAM_KAFKA__PARTITIONS to the number that stands, or delete the topics "
                    "(`sidstream topics delete`) and replay"
                )
        missing_names = [name for name in specs if name not in existing]
        for name in missing_names:
            topic = specs[name]
            spec = {
                "num_partitions": topic.partitions,
                "replication_factor": kafka.replication,
                "configs": topic.configs,
            }
            try:
                client.create_topics({name: spec})
            except TopicAlreadyExistsError:
                continue  # another process was faster; the check below looks at its topic
            except BrokerResponseError as error:
                raise SidstreamError(
                    f"Kafka refused to create topic {name} ({type(error).__name__}) with {topic.partitions} "
                    f"partitions and {kafka.replication} replicas: check SIDSTREAM_KAFKA__REPLICATION "
                    "against the number of brokers, and the rights of the user"
                ) from error
        _wait_until_empty(lambda: _topics_without_leader(client, kafka), "topics have no leader yet")
    return missing_names


def delete_topics(kafka: KafkaSettings) -> list[str]:
    """Delete the product's topics with all their events; return the names of those that existed.

    Returns when the broker no longer shows them.
    """
    own_names = {topic.name for topic in all_topics(kafka)}
    with admin_client(kafka) as client:
        existing = sorted(own_names & set(_describe_topics(client)))
        for name in existing:
            try:
                client.delete_topics([name])
            except UnknownTopicOrPartitionError:
                continue  # another process deleted it in between
        _wait_until_empty(lambda: sorted(own_names & set(_describe_topics(client))), "topics are still shown")
    return existing


def topic_names(kafka: KafkaSettings) -> set[str]:
    """Every topic on the broker, the product's and others."""
    with admin_client(kafka) as client:
        return set(_describe_topics(client))


def incarnations(kafka: KafkaSettings) -> dict[str, int]:
    """For every topic of the product that exists, a u32 that changes when it is created again.

    CRC-32 of the topic's UUID (KIP-516) and its number of partitions: with more partitions a key's records
    continue in another one, so that is a new incarnation too. Offsets of two incarnations do not compare.
    """
    own_names = {topic.name for topic in all_topics(kafka)}
    with admin_client(kafka) as client:
        return {
            name: zlib.crc32(
                UUID(str(described["topic_id"])).bytes + len(described["partitions"]).to_bytes(4, "big")
            )
            for name, described in _describe_topics(client).items()
            if name in own_names
        }


class OffsetSpan(NamedTuple):
    """The offsets of one partition's records: from `begin` up to, not including, `end`."""

    begin: int
    end: int


def offset_spans(
    kafka: KafkaSettings, topics: Collection[str] | None = None
) -> dict[str, dict[int, OffsetSpan]]:
    """For each of the topics that exists: partition -> its span; by default for the product's topics."""
    names = {topic.name for topic in all_topics(kafka)} if topics is None else set(topics)
    with admin_client(kafka) as client:
        partitions = [
            TopicPartition(name, partition["partition_index"])
            for name, described in _describe_topics(client).items()
            if name in names
            for partition in described["partitions"]
        ]
        spans = _offset_spans(client, partitions)
    result: dict[str, dict[int, OffsetSpan]] = {}
    for at, span in sorted(spans.items()):
        result.setdefault(at.topic, {})[at.partition] = span
    return result


def end_offsets(kafka: KafkaSettings, topic: str) -> dict[int, int]:
    """Partition -> offset of the next record of one topic. Raises SidstreamError when it does not exist."""
    with admin_client(kafka) as client:
        described = _describe_topics(client).get(topic)
        if described is None:
            raise missing_topic_error(topic)
        partitions = [
            TopicPartition(topic, partition["partition_index"]) for partition in described["partitions"]
        ]
        return {at.partition: span.end for at, span in sorted(_offset_spans(client, partitions).items())}


def consumer_group_lag(kafka: KafkaSettings, group: str) -> int:
    """The number of records that a consumer group has not committed, over the partitions that it reads.

    It reads the partitions assigned to its members and those that it has committed; a partition
    without a commit counts from its begin. Raises SidstreamError when the group reads nothing.
    """
    with admin_client(kafka) as client:
        committed, members = _describe_group(client, group)
        read = {at for at, position in committed.items() if position.offset >= 0}
        for member in members:
            assigned = member["member_assignment"]
            for part in assigned["assigned_partitions"] if isinstance(assigned, dict) else ():
                read |= {TopicPartition(part["topic"], number) for number in part["partitions"]}
        if not read:
            raise SidstreamError(f"consumer group {group} reads no topic: start it, or correct its name")
        spans = _offset_spans(client, sorted(read))
    return sum(
        max(0, span.end - max(span.begin, committed[at].offset if at in committed else 0))
        for at, span in spans.items()
    )


def _describe_group(
    client: KafkaAdminClient, group: str
) -> tuple[dict[TopicPartition, OffsetAndMetadata], list[dict[str, Any]]]:
    """The group's committed offsets and its members; retried while the broker's coordinator starts."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            committed = client.list_group_offsets({group: None}).get(group, {})
            return committed, client.describe_groups([group])[group]["members"]
        except (CoordinatorNotAvailableError, CoordinatorLoadInProgressError, NotCoordinatorError) as error:
            if time.monotonic() > deadline:
                raise SidstreamError(
                    f"Kafka has no coordinator for group {group} after {_WAIT_S:.0f} s: look at its log"
                ) from error
            time.sleep(_POLL_S)


def _offset_spans(
    client: KafkaAdminClient, partitions: Sequence[TopicPartition]
) -> dict[TopicPartition, OffsetSpan]:
    if not partitions:
        return {}
    begin = client.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.EARLIEST))
    end = client.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.LATEST))
    return {at: OffsetSpan(begin[at].offset, end[at].offset) for at in partitions}


def _describe_topics(client: KafkaAdminClient) -> dict[str, dict[str, Any]]:
    """Topic -> its description by the broker, without topics that are being deleted."""
    return {
        topic["name"]: topic
        for topic in client.describe_topics()
        if topic["name"]
        and topic["error_code"] not in (UnknownTopicOrPartitionError.errno, InvalidTopicError.errno)
    }


def _topics_without_leader(client: KafkaAdminClient, kafka: KafkaSettings) -> list[str]:
    """Topics without a leader, or with fewer partitions in the broker's metadata than in the settings."""
    existing = _describe_topics(client)
    return [
        topic.name
        for topic in all_topics(kafka)
        if topic.name not in existing
        or len(existing[topic.name]["partitions"]) != topic.partitions
        or any(part["error_code"] or part["leader_id"] < 0 for part in existing[topic.name]["partitions"])
    ]


def _wait_until_empty(pending: Callable[[], list[str]], complaint: str) -> None:
    """Poll until `pending` is empty; SidstreamError after the deadline."""
    deadline = time.monotonic() + _WAIT_S
    while names := pending():
        if time.monotonic() > deadline:
            raise SidstreamError(
                f"{complaint} after {_WAIT_S:.0f} s ({', '.join(names)}): look at the broker's log"
            )
        time.sleep(_POLL_S)
