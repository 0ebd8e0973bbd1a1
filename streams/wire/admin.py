"""Topics on the broker: create, check, delete, and tell one life of a topic from the next."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
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

# Metadata shows a topic created or deleted only later than the answer: how long to wait, how often to look.
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
    """The error to raise where a topic is not there."""
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

    Returns when every topic has a leader for each partition. Raises SidstreamError when a topic stands with
    other partitions than wanted (a user's events would change partition), or the broker refuses one.
    """
    wanted = {topic.name: topic for topic in all_topics(kafka)}
    with admin_client(kafka) as client:
        standing = _describe_topics(client)
        for name in sorted(set(wanted) & set(standing)):
            have, want = len(standing[name]["partitions"]), wanted[name].partitions
            if have != want:
                raise SidstreamError(
                    f"topic {name} has {have} partitions, the settings want {want}: set "
                    f"SIDSTREAM_KAFKA__PARTITIONS to the number that stands, or delete the topics "
                    "(`sidstream topics delete`) and replay"
                )
        missing_names = [name for name in wanted if name not in standing]
        for name in missing_names:
            topic = wanted[name]
            spec = {
                "num_partitions": topic.partitions,
                "replication_factor": kafka.replication,
                "configs": topic.configs,
            }
            try:
                client.create_topics({name: spec})
            except TopicAlreadyExistsError:
                continue  # somebody else was faster: the check below sees what they made
            except BrokerResponseError as error:
                raise SidstreamError(
                    f"Kafka refused to create topic {name} ({type(error).__name__}) with {topic.partitions} "
                    f"partitions and {kafka.replication} replicas: check SIDSTREAM_KAFKA__REPLICATION "
                    "against the number of brokers, and the rights of the user"
                ) from error
        _wait_until_empty(lambda: _topics_without_leader(client, kafka), "topics have no leader yet")
    return missing_names


def delete_topics(kafka: KafkaSettings) -> list[str]:
    """Delete the product's topics with all their events; return the names of those that stood.

    Returns when the broker no longer shows them.
    """
    ours = {topic.name for topic in all_topics(kafka)}
    with admin_client(kafka) as client:
        standing = sorted(ours & set(_describe_topics(client)))
        for name in standing:
            try:
                client.delete_topics([name])
            except UnknownTopicOrPartitionError:
                continue  # deleted by somebody else in between
        _wait_until_empty(lambda: sorted(ours & set(_describe_topics(client))), "topics are still shown")
    return standing


def topic_names(kafka: KafkaSettings) -> set[str]:
    """Every topic on the broker, the product's and others."""
    with admin_client(kafka) as client:
        return set(_describe_topics(client))


def incarnations(kafka: KafkaSettings) -> dict[str, int]:
    """For every topic of the product that stands, a u32 that changes when it is made again or cut anew.

    CRC-32 of the topic's UUID (KIP-516) and its number of partitions: with another number a key's records
    continue in another partition. Offsets of two incarnations do not compare.
    """
    ours = {topic.name for topic in all_topics(kafka)}
    with admin_client(kafka) as client:
        return {
            name: zlib.crc32(
                UUID(str(described["topic_id"])).bytes + len(described["partitions"]).to_bytes(4, "big")
            )
            for name, described in _describe_topics(client).items()
            if name in ours
        }


class OffsetSpan(NamedTuple):
    """What one partition holds: records at offsets from `begin` up to, not including, `end`."""

    begin: int
    end: int


def offset_spans(kafka: KafkaSettings) -> dict[str, dict[int, OffsetSpan]]:
    """For every topic of the product that stands: partition -> its span."""
    ours = {topic.name for topic in all_topics(kafka)}
    with admin_client(kafka) as client:
        asked = [
            TopicPartition(name, partition["partition_index"])
            for name, described in _describe_topics(client).items()
            if name in ours
            for partition in described["partitions"]
        ]
        found = _offset_spans(client, asked)
    result: dict[str, dict[int, OffsetSpan]] = {}
    for at, span in sorted(found.items()):
        result.setdefault(at.topic, {})[at.partition] = span
    return result


def end_offsets(kafka: KafkaSettings, topic: str) -> dict[int, int]:
    """Partition -> offset of the next record of one topic. Raises SidstreamError when it does not exist."""
    with admin_client(kafka) as client:
        described = _describe_topics(client).get(topic)
        if described is None:
            raise missing_topic_error(topic)
        asked = [TopicPartition(topic, partition["partition_index"]) for partition in described["partitions"]]
        return {at.partition: span.end for at, span in sorted(_offset_spans(client, asked).items())}


def consumer_group_lag(kafka: KafkaSettings, group: str) -> int:
    """How many records a consumer group has not committed, over the partitions that it reads.

    Those are the partitions assigned to its members and the ones that it committed before; a partition
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
        found = _offset_spans(client, sorted(read))
    return sum(
        max(0, span.end - max(span.begin, committed[at].offset if at in committed else 0))
        for at, span in found.items()
    )


def _describe_group(
    client: KafkaAdminClient, group: str
) -> tuple[dict[TopicPartition, OffsetAndMetadata], list[dict[str, Any]]]:
    """What the group committed, and its members; retried while the broker sets groups up at first use."""
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
    """What the broker shows, without topics that are on their way out."""
    return {
        topic["name"]: topic
        for topic in client.describe_topics()
        if topic["name"]
        and topic["error_code"] not in (UnknownTopicOrPartitionError.errno, InvalidTopicError.errno)
    }


def _topics_without_leader(client: KafkaAdminClient, kafka: KafkaSettings) -> list[str]:
    """Topics that lack a leader, or whose partitions are not all shown."""
    shown = _describe_topics(client)
    return [
        topic.name
        for topic in all_topics(kafka)
        if topic.name not in shown
        or len(shown[topic.name]["partitions"]) != topic.partitions
        or any(part["error_code"] or part["leader_id"] < 0 for part in shown[topic.name]["partitions"])
    ]


def _wait_until_empty(pending: Callable[[], list[str]], complaint: str) -> None:
    """Poll until `pending` is empty; SidstreamError after the deadline."""
    deadline = time.monotonic() + _WAIT_S
    while left := pending():
        if time.monotonic() > deadline:
            raise SidstreamError(
                f"{complaint} after {_WAIT_S:.0f} s ({', '.join(left)}): look at the broker's log"
            )
        time.sleep(_POLL_S)
