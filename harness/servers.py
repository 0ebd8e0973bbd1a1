"""Real servers of one machine for tests and benchmarks: Apache Kafka, Redis, MLflow; and waiting for them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sidstream.stack import kafka_jars
from sidstream.stack.broker import LocalKafka, free_ports
from sidstream.stack.children import spawn
from sidstream.stack.servers import (
    MLFLOW_ENVIRONMENT,
    http_answers,
    mlflow_command,
    redis_answers,
    redis_command,
)
from streams.settings import KafkaSettings

# Partitions of topics: more than one, so that order over partitions is never relied on.
PARTITIONS = 4
START_S = 90.0


def free_port() -> int:
    """A free TCP port on loopback."""
    return free_ports(1)[0]


def wait_until(condition: Callable[[], object], timeout: float, what: str, pause: float = 0.05) -> None:
    """Poll until `condition()` is true; AssertionError that names `what` after `timeout` seconds.

    `pause`: seconds between two polls; 0 to see a condition that holds only for a moment.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout:.0f} s"
        time.sleep(pause)


def kafka_settings(bootstrap: str) -> KafkaSettings:
    """Settings for a broker of the tests."""
    return KafkaSettings.model_validate({"bootstrap": bootstrap, "partitions": PARTITIONS})


@contextmanager
def local_kafka(folder: Path, brokers: int = 1) -> Iterator[LocalKafka]:
    """Apache Kafka in `folder`, running; it ends with the block, or with this process."""
    cluster = LocalKafka.plan(folder, kafka_jars.fetch(), brokers, heap_mb=512 if brokers == 1 else 384)
    cluster.start_all(START_S)
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
        wait_until(lambda: redis_answers(port) or not child.alive, START_S, "Redis")
        assert child.alive, f"Redis ended with exit code {child.exit_code}: see {child.log}"
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        child.stop(grace=10)


@contextmanager
def local_mlflow(folder: Path) -> Iterator[str]:
    """An MLflow server in `folder`, running; its address. Its artifacts are in folder / "artifacts"."""
    port = free_port()
    child = spawn("mlflow", mlflow_command(folder, port), folder / "log", env=os.environ | MLFLOW_ENVIRONMENT)
    try:
        wait_until(lambda: http_answers(port, "/health") or not child.alive, 120, "MLflow")
        assert child.alive, (folder / "log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        child.stop(grace=10)
