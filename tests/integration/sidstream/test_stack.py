"""The local stack as a person meets it: `sidstream up` and `down` on a machine that has nothing installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from harness.servers import free_port, kafka_settings, local_kafka, wait_until
from sidstream.stack.children import process_identity
from streams.settings import KafkaSettings
from streams.wire.admin import admin_client

# A start takes seconds on an idle machine; a busy one may need minutes for the three servers.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

# All that is on PATH: no Java, Maven, Docker, Redis or Node.
_BASICS = ("sh", "env", "ls", "cat", "ps")
_START_S = 240


class Stack:
    """One stack in a folder of its own, driven by its command line."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.home = folder / "home"
        tools = folder / "bin"
        tools.mkdir()
        for name in _BASICS:
            tool_path = shutil.which(name)
            assert tool_path, f"{name} is missing"
            (tools / name).symlink_to(tool_path)
        own = {key: value for key, value in os.environ.items() if not key.startswith(("SIDSTREAM_", "JAVA"))}
        self.folder = folder
        self.environment = {
            **own,
            "PATH": str(tools),
            "SIDSTREAM_STACK__HOME": str(self.home),
            "SIDSTREAM_STACK__START_TIMEOUT_S": str(_START_S),
            **environment,
        }

    def start(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `sidstream ARGUMENTS --json`."""
        command = [sys.executable, "-m", "sidstream", *arguments, "--json"]
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=_START_S + 60,
        )

    def run(self, *arguments: str) -> dict[str, Any]:
        """The same; it must end well."""
        done = self.start(*arguments)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def up(self, *arguments: str) -> dict[str, Any]:
        return self.run("up", "--infra", *arguments)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack without MLflow's server, which takes longest to start."""
    stack = Stack(tmp_path, SIDSTREAM_REGISTRY__TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    yield stack
    stack.run("down")


@pytest.fixture
def whole_stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack with all three servers."""
    stack = Stack(tmp_path)
    yield stack
    stack.run("down")


def _processes(status: dict[str, Any]) -> list[int]:
    return [service["pid"] for service in status["services"] if service["pid"]]


def _redis(status: dict[str, Any]) -> redis.Redis:
    return redis.Redis.from_url(status["redis"], decode_responses=True)


def _publish(kafka: KafkaSettings, value: bytes) -> None:
    with KafkaProducer(bootstrap_servers=kafka.bootstrap) as producer:
        producer.send("clicks", value, partition=0).get(timeout=30)


def _first(kafka: KafkaSettings) -> bytes:
    with KafkaConsumer(bootstrap_servers=kafka.bootstrap, auto_offset_reset="earliest") as consumer:
        consumer.assign([TopicPartition("clicks", 0)])
        values: list[bytes] = []

        def read() -> bool:
            for records in consumer.poll(timeout_ms=200).values():
                values.extend(record.value for record in records)
            return bool(values)

        wait_until(read, 30, "the record")
        return values[0]


def test_a_bare_machine_gets_a_stack_that_a_second_up_finds_and_a_kill_ends(whole_stack: Stack) -> None:
    status = whole_stack.up()
    assert status["phase"] == "up"
    assert status["found"] is False
    assert {service["name"]: service["state"] for service in status["services"]} == dict.fromkeys(
        ("mlflow", "redis", "kafka"), "up"
    )
    with admin_client(kafka_settings(status["kafka"])) as client:
        assert {"clicks", "dead-letters"} <= {topic["name"] for topic in client.describe_topics()}
    with _redis(status) as connection:
        assert connection.config_get("appendonly") == {"appendonly": "yes"}
        assert connection.config_get("bind") == {"bind": "127.0.0.1"}
    with urllib.request.urlopen(f"{status['mlflow']}/version", timeout=10) as answer:
        assert answer.status == 200

    second_start = whole_stack.up()
    assert second_start["found"] is True
    assert second_start | {"found": False} == status

    pids = _processes(status)
    assert len(pids) == 3
    everything = [status["pid"], *pids, *_below(pids)]
    os.kill(status["pid"], 9)
    wait_until(
        lambda: all(process_identity(pid) is None for pid in everything), 30, "the end of every process"
    )
    status_run = whole_stack.start("status")
    assert status_run.returncode == 1
    assert json.loads(status_run.stdout)["phase"] == "down"


def _below(pids: list[int]) -> list[int]:
    """Processes of the sessions that these lead."""
    ps_output = subprocess.run(["ps", "-eo", "pid=,sess="], capture_output=True, text=True, check=True)
    pairs = [line.split() for line in ps_output.stdout.splitlines()]
    return [int(pid) for pid, session in pairs if int(session) in pids]


def test_data_and_ports_survive_a_kill_and_a_down_and_purge_removes_all(stack: Stack) -> None:
    status = stack.up()
    kafka = kafka_settings(status["kafka"])
    _publish(kafka, b"kept")
    with _redis(status) as connection:
        connection.set("h:{u}", "kept")
        # everysec: what is a second old is on disk, whatever happens next
        wait_until(lambda: connection.info("persistence")["aof_pending_bio_fsync"] == 0, 30, "the sync")

    os.kill(status["pid"], 9)
    second_start = stack.up()
    assert second_start["found"] is False
    assert second_start["pid"] != status["pid"]
    with _redis(second_start) as connection:
        assert connection.get("h:{u}") == "kept"
    assert _first(kafka_settings(second_start["kafka"])) == b"kept"

    assert stack.run("down")["stopped"] is True
    assert all(process_identity(pid) is None for pid in [second_start["pid"], *_processes(second_start)])
    third = stack.up()
    assert (third["kafka"], third["redis"]) == (second_start["kafka"], second_start["redis"])
    with _redis(third) as connection:
        assert connection.get("h:{u}") == "kept"
    assert _first(kafka_settings(third["kafka"])) == b"kept"

    stack.run("down", "--purge")
    assert not stack.home.exists()


def test_two_ups_at_once_make_one_stack_and_a_dead_server_is_started_again(stack: Stack) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, other = pool.map(lambda _: stack.up(), range(2))
    assert first["pid"] == other["pid"]
    assert sorted([first["found"], other["found"]]) == [False, True]
    with _redis(first) as connection:
        connection.set("h:{u}", "kept")

    def server() -> dict[str, Any]:
        status = json.loads(stack.start("status").stdout)
        return next(service for service in status["services"] if service["name"] == "redis")

    before = server()
    os.kill(before["pid"], 9)
    wait_until(lambda: server()["state"] == "up" and server()["restarts"] == 1, 60, "the restart")

    assert server()["pid"] != before["pid"]
    with _redis(first) as connection:
        assert connection.get("h:{u}") == "kept"
    assert "redis ended with exit code 137" in (stack.home / "logs" / "supervisor.log").read_text()


def test_a_start_that_fails_says_why_in_one_line_and_leaves_nothing_running(tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    stack = Stack(
        tmp_path,
        SIDSTREAM_REGISTRY__TRACKING_URI="sqlite:///unused.db",
        SIDSTREAM_STACK__JARS=str(tmp_path / "jars"),
        SIDSTREAM_STACK__MAVEN_REPOSITORY=nobody,
    )
    done = stack.start("up", "--infra")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: cannot fetch ")
    assert "SIDSTREAM_STACK__MAVEN_REPOSITORY" in last
    state = json.loads((stack.home / "stack.json").read_text())
    assert state["phase"] == "failed"
    assert [service["pid"] for service in state["services"]] == [None] * len(state["services"])


def test_three_brokers_form_a_cluster_that_survives_the_loss_of_one(tmp_path: Path) -> None:
    with local_kafka(tmp_path, brokers=3) as cluster:
        kafka = kafka_settings(cluster.bootstrap)
        with admin_client(kafka) as client:
            described = client.describe_cluster()
            assert sorted(broker["broker_id"] for broker in described["brokers"]) == [1, 2, 3]
            client.create_topics({"clicks": {"num_partitions": 1, "replication_factor": 3}})
        _publish(kafka, b"before")
        cluster.children[1].kill()
        _publish(kafka, b"after")
        assert _first(kafka) == b"before"
