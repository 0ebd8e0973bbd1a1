"""What tests share: Kafka and Redis, from containers where Docker answers, else from the local stack."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from kafka import KafkaConsumer, TopicPartition

from sidstream.stack.servers import redis_answers, redis_command
from streams import kafka_jars
from streams.admin import end_offsets
from streams.broker import LocalKafka, free_ports
from streams.children import spawn
from streams.connect import client_options
from streams.settings import KafkaSettings

KAFKA_IMAGE = "apache/kafka:4.4.0"
REDIS_IMAGE = "redis:7.2-alpine"
# Partitions of the tests' topics: more than one, so that order over partitions is never relied on.
PARTITIONS = 4
_START_S = 90.0


def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    return free_ports(1)[0]


def wait_until(condition: Callable[[], object], timeout: float, what: str, pause: float = 0.05) -> None:
    """Poll until `condition()` is true; AssertionError that names `what` after `timeout` seconds.

    `pause`: seconds between two polls; 0 where what is waited for is over in a moment.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout:.0f} s"
        time.sleep(pause)


def kafka_settings(bootstrap: str) -> KafkaSettings:
    """Settings for a broker of the tests."""
    return KafkaSettings.model_validate({"bootstrap": bootstrap, "partitions": PARTITIONS})


def read_all(kafka: KafkaSettings, *topics: str) -> list[Any]:
    """Every record that the topics hold now, in order within a partition."""
    consumer = KafkaConsumer(**client_options(kafka), enable_auto_commit=False)
    try:
        ends = {
            TopicPartition(topic, part): end
            for topic in topics
            for part, end in end_offsets(kafka, topic).items()
        }
        consumer.assign(list(ends))
        consumer.seek_to_beginning(*ends)
        found: list[Any] = []
        while any(consumer.position(part) < end for part, end in ends.items()):
            for records in consumer.poll(timeout_ms=500).values():
                found += records
        return found
    finally:
        consumer.close()


def docker_answers() -> bool:
    """True when a Docker engine (not only its command) is there."""
    if shutil.which("docker") is None:
        return False
    try:
        asked = subprocess.run(["docker", "info"], capture_output=True, timeout=10)
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0


@contextmanager
def local_kafka(folder: Path, brokers: int = 1) -> Iterator[LocalKafka]:
    """Apache Kafka in `folder`, running; it ends with the block, or with this process."""
    cluster = LocalKafka.plan(folder, kafka_jars.fetch(), brokers, heap_mb=512 if brokers == 1 else 384)
    cluster.start_all(_START_S)
    try:
        yield cluster
    finally:
        cluster.stop()


@contextmanager
def local_redis(folder: Path, port: int | None = None) -> Iterator[str]:
    """A Redis in `folder`, running; its URL. It ends with the block, or with this process."""
    port = port or free_port()
    child = spawn("redis", redis_command(folder, port), folder / "redis.log")
    try:
        wait_until(lambda: redis_answers(port) or not child.alive, _START_S, "Redis")
        assert child.alive, f"Redis ended with exit code {child.exit_code}: see {child.log}"
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        child.stop(grace=10)


@contextmanager
def container_kafka() -> Iterator[str]:
    """Apache Kafka in a container; its bootstrap address."""
    from testcontainers.core.container import DockerContainer

    # The image's own listeners name `localhost:9092`: client and broker must agree on the port outside.
    port, controller = free_ports(2)
    container = (
        DockerContainer(KAFKA_IMAGE)
        .with_bind_ports(port, port)
        .with_env("KAFKA_NODE_ID", "1")
        .with_env("KAFKA_PROCESS_ROLES", "broker,controller")
        .with_env("KAFKA_CONTROLLER_QUORUM_VOTERS", f"1@127.0.0.1:{controller}")
        .with_env("KAFKA_LISTENERS", f"PLAINTEXT://0.0.0.0:{port},CONTROLLER://127.0.0.1:{controller}")
        .with_env("KAFKA_ADVERTISED_LISTENERS", f"PLAINTEXT://127.0.0.1:{port}")
        .with_env("KAFKA_CONTROLLER_LISTENER_NAMES", "CONTROLLER")
        .with_env("KAFKA_LISTENER_SECURITY_PROTOCOL_MAP", "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT")
        .with_env("KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR", "1")
        .with_env("KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR", "1")
        .with_env("KAFKA_TRANSACTION_STATE_LOG_MIN_ISR", "1")
        .with_env("KAFKA_SHARE_COORDINATOR_STATE_TOPIC_REPLICATION_FACTOR", "1")
        .with_env("KAFKA_SHARE_COORDINATOR_STATE_TOPIC_MIN_ISR", "1")
        .with_env("KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS", "0")
        .with_env("KAFKA_AUTO_CREATE_TOPICS_ENABLE", "false")
    )
    with container:
        bootstrap = f"127.0.0.1:{port}"
        wait_until(lambda: kafka_answers(bootstrap), _START_S, "Kafka in its container")
        yield bootstrap


def kafka_answers(bootstrap: str) -> bool:
    """True when a broker there tells about its cluster."""
    from kafka.errors import KafkaError

    from streams.admin import admin
    from streams.broker import listening
    from streams.errors import SidstreamError

    if not listening(int(bootstrap.rpartition(":")[2])):
        return False
    try:
        with admin(kafka_settings(bootstrap)) as client:
            return bool(client.describe_cluster()["brokers"])
    except (SidstreamError, KafkaError):
        return False


@contextmanager
def container_redis() -> Iterator[str]:
    """Redis in a container; its URL."""
    from testcontainers.core.container import DockerContainer

    with DockerContainer(REDIS_IMAGE).with_exposed_ports(6379) as container:
        host, port = container.get_container_host_ip(), int(container.get_exposed_port(6379))
        wait_until(lambda: redis_answers(port, host), _START_S, "Redis in its container")
        yield f"redis://{host}:{port}/0"


def unavailable(server: str, error: Exception) -> NoReturn:
    """Neither a container nor a local server can be had: a skip on a desk, a failure under CI=true."""
    reason = f"no {server}: no Docker engine answers, and the local one does not start ({error})"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)
