"""Fixtures of the tests that need Apache Kafka, Redis and MLflow: one server of each for the session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
import redis

from harness import servers
from streams.errors import SidstreamError
from streams.settings import KafkaSettings
from streams.wire.admin import create_topics, delete_topics
from tests import support

T = TypeVar("T")
FreshStack = Callable[[], tuple[KafkaSettings, str]]


@pytest.fixture(scope="session", autouse=True)
def arithmetic() -> Iterator[None]:
    """SIDSTREAM_TRAINER__ARITHMETIC holds for settings that tests build themselves, too."""
    chosen = os.environ.get("SIDSTREAM_TRAINER__ARITHMETIC", "auto")
    with pytest.MonkeyPatch.context() as patch:
        if chosen != "auto":
            patch.setattr("trainer.tuning.devices.fast_bf16", lambda where: chosen == "bfloat16")
        yield


@pytest.fixture(scope="session")
def docker() -> bool:
    """True where a Docker engine answers."""
    return support.docker_answers()


def _started(running: ExitStack, local: AbstractContextManager[T], name: str) -> T:
    """What a local server gives; a skip, or under CI a failure, where it does not start."""
    try:
        return running.enter_context(local)
    except SidstreamError as error:
        support.unavailable(name, error)


@pytest.fixture(scope="session")
def kafka(docker: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaSettings]:
    """A real Apache Kafka 4 for the session; its topics are not created."""
    with ExitStack() as running:
        if docker:
            bootstrap = running.enter_context(support.container_kafka())
        else:
            local = servers.local_kafka(tmp_path_factory.mktemp("kafka"))
            bootstrap = _started(running, local, "Kafka").bootstrap
        yield servers.kafka_settings(bootstrap)


@pytest.fixture(scope="session")
def redis_url(docker: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Redis for the session; its URL."""
    with ExitStack() as running:
        if docker:
            url = running.enter_context(support.container_redis())
        else:
            url = _started(running, servers.local_redis(tmp_path_factory.mktemp("redis")), "Redis")
        yield url


class MlflowServer(NamedTuple):
    """Where the session's MLflow answers, and the folder of its artifacts."""

    address: str
    artifacts: Path


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A real MLflow server for the session; tests keep apart by the name of their recommender."""
    folder = tmp_path_factory.mktemp("mlflow")
    with servers.local_mlflow(folder) as address:
        yield MlflowServer(address, folder / "artifacts")


@pytest.fixture
def fresh_stack(kafka: KafkaSettings, redis_url: str) -> FreshStack:
    """A function that empties the session's stack (new topics, flushed Redis) and returns its addresses."""

    def fresh() -> tuple[KafkaSettings, str]:
        delete_topics(kafka)
        create_topics(kafka)
        with redis.Redis.from_url(redis_url) as connection:
            connection.flushall()
        return kafka, redis_url

    return fresh
