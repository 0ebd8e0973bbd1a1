"""What tests share: Kafka and Redis, from containers where Docker answers, else from the local stack."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import pytest

from harness.servers import START_S, kafka_settings, wait_until
from sidstream.stack.broker import free_ports
from sidstream.stack.servers import redis_answers

KAFKA_IMAGE = "apache/kafka:4.4.0"
REDIS_IMAGE = "redis:7.2-alpine"


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
        wait_until(lambda: kafka_answers(bootstrap), START_S, "Kafka in its container")
        yield bootstrap


def kafka_answers(bootstrap: str) -> bool:
    """True when a broker there tells about its cluster."""
    from kafka.errors import KafkaError

    from sidstream.stack.broker import listening
    from streams.errors import SidstreamError
    from streams.wire.admin import admin_client

    if not listening(int(bootstrap.rpartition(":")[2])):
        return False
    try:
        with admin_client(kafka_settings(bootstrap)) as client:
            return bool(client.describe_cluster()["brokers"])
    except (SidstreamError, KafkaError):
        return False


@contextmanager
def container_redis() -> Iterator[str]:
    """Redis in a container; its URL."""
    from testcontainers.core.container import DockerContainer

    with DockerContainer(REDIS_IMAGE).with_exposed_ports(6379) as container:
        host, port = container.get_container_host_ip(), int(container.get_exposed_port(6379))
        wait_until(lambda: redis_answers(port, host), START_S, "Redis in its container")
        yield f"redis://{host}:{port}/0"


def unavailable(server: str, error: Exception) -> NoReturn:
    """Neither a container nor a local server can be had: a skip on a desk, a failure under CI=true."""
    reason = f"no {server}: no Docker engine answers, and the local one does not start ({error})"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)
