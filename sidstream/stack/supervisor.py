"""The one process of a local stack: it starts the others, keeps them up and takes them with it at its end.

`sidstream up` runs it as `python -m sidstream.stack.supervisor [--infra] [--trainer]`, in its own session.
It writes what it does to `stack.json` and in `logs/supervisor.log`, and ends on SIGTERM.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from sidstream.stack import kafka_jars, servers
from sidstream.stack.broker import HOST, LocalKafka, Node, free_ports, listening
from sidstream.stack.children import end_session, process_identity, spawn
from sidstream.stack.state import ServiceState, StackState, read_state, write_state
from sidstream.stack.supervised_process import SupervisedProcess
from streams.errors import SidstreamError
from streams.settings import KafkaSettings

if TYPE_CHECKING:
    from sidstream.settings import Settings

log = logging.getLogger("sidstream.stack")

# While starting, a late look costs a person's time; later only a restart's.
_POLL_STARTING_S = 0.1
_POLL_UP_S = 0.25
# Progress of a download: more often than a person reads it is waste.
_NOTE_S = 0.5


class StopSignal(BaseException):
    """SIGTERM or SIGINT: end the stack."""


class Supervisor:
    """Runs one stack until SIGTERM or SIGINT."""

    def __init__(self, settings: Settings, infra: bool = False, trainer: bool = False) -> None:
        self.settings = settings
        self.stack = settings.stack
        self.home = settings.stack.home.resolve()
        self.logs = self.home / "logs"
        self.kafka: KafkaSettings = settings.kafka
        self.cluster: LocalKafka | None = None
        self.processes: list[SupervisedProcess] = []
        self.state = StackState(
            pid=os.getpid(), born=process_identity(os.getpid()), started=time.time(),
            brokers=self.stack.brokers, infra=infra, trainer=trainer,
        )  # fmt: skip

    def run(self) -> int:
        """Start everything, watch it until a signal comes, stop everything. The exit code."""
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGINT, _stop)
        self.home.mkdir(parents=True, exist_ok=True)
        try:
            self._take_over_from(read_state(self.home))
            self._save()
            self._start_infrastructure()
            if not self.state.infra:
                self._start_services()
            self._wait()
            self.state.phase = "up"
            self._save()
            log.info("the stack is up")
            while True:
                self._check_all(first=False)
                time.sleep(_POLL_UP_S)
        except StopSignal:
            self._stop_all("down")
            return 0
        except SidstreamError as error:
            log.error("%s", error)
            self.state.error = str(error)
            self._stop_all("failed")
            return 1

    def _take_over_from(self, previous: StackState | None) -> None:
        """Take over the ports of the last stack here, and end what a killed one may have left."""
        if previous is None:
            return
        self.state.ports = previous.ports
        for service in previous.services:
            if service.pid and service.born and process_identity(service.pid) == service.born:
                log.warning("ending %s (pid %d), left by a stack that was killed", service.name, service.pid)
                end_session(service.pid, service.born, self.stack.stop_timeout_s)

    def _start_infrastructure(self) -> None:
        # The slowest first: MLflow takes seconds to import itself, Kafka's jars may have to be fetched.
        if self.settings.registry.tracking_uri:
            self._add_external("mlflow", self.settings.registry.tracking_uri)
        else:
            self._start_mlflow()
        if self.settings.redis.url:
            self._add_external("redis", "as the settings say")
        else:
            self._start_redis()
        if self.kafka.bootstrap:
            self._add_external("kafka", self.kafka.bootstrap)
        else:
            self._start_kafka()
        # MLflow may go on starting: topics need Kafka, and the services wait for a model anyway.
        self._wait(but="mlflow")
        if self.state.kafka:
            update: dict[str, object] = {"bootstrap": self.state.kafka}
            if self.stack.brokers == 3 and "replication" not in self.kafka.model_fields_set:
                update["replication"] = 3
            self.kafka = self.kafka.model_copy(update=update)
        from streams.wire.admin import create_topics

        created = create_topics(self.kafka)
        log.info("created %d topics", len(created))

    def _start_kafka(self) -> None:
        names = (
            ["kafka"] if self.stack.brokers == 1 else [f"kafka-{i + 1}" for i in range(self.stack.brokers)]
        )
        services = [ServiceState(name=name, state="starting") for name in names]
        self.state.services += services
        saved_at = 0.0

        def note(done: int, total: int) -> None:
            nonlocal saved_at
            services[0].note = f"fetching Apache Kafka: {done} of {total} jars"
            if time.monotonic() - saved_at > _NOTE_S:
                saved_at = time.monotonic()
                self._save()

        begun = time.monotonic()
        jars = kafka_jars.fetch(self.stack.jars, self.stack.maven_repository, on_progress=note)
        cluster = LocalKafka.plan(
            self.home / "kafka", jars, self.stack.brokers,
            self.state.ports.get("kafka", ()), self.stack.heap_mb, self.logs,
        )  # fmt: skip
        services[0].note = "preparing its storage"
        self._save()
        cluster.prepare()
        self.cluster = cluster
        self.state.ports["kafka"] = cluster.ports
        self.state.kafka = cluster.bootstrap
        for node, service in zip(cluster.nodes, services, strict=True):
            service.address = f"{HOST}:{node.port}"
            start, ready = partial(cluster.start, node), partial(self._kafka_ready, cluster, node)
            self._launch(
                SupervisedProcess(service.name, start, ready, service, preparation_s=time.monotonic() - begun)
            )

    def _kafka_ready(self, cluster: LocalKafka, node: Node) -> bool:
        """At first the whole cluster must answer; a node that was started again must only listen."""
        return cluster.answers() if self.state.phase == "starting" else listening(node.port)

    def _start_redis(self) -> None:
        port = self._port("redis")
        self.state.redis = f"redis://{HOST}:{port}/0"
        command = servers.redis_command(self.home / "redis", port)
        self._add("redis", command, partial(servers.redis_answers, port), self.state.redis)

    def _start_mlflow(self) -> None:
        port = self._port("mlflow")
        self.state.mlflow = f"http://{HOST}:{port}"
        command = servers.mlflow_command(self.home / "mlflow", port)
        ready = partial(servers.http_answers, port, "/health")
        self._add("mlflow", command, ready, self.state.mlflow, servers.MLFLOW_ENVIRONMENT)

    def _start_services(self) -> None:
        """Start the product's own processes with the addresses of the servers in their environment."""
        gateway = self.settings.gateway
        is_fixed = "port" in gateway.model_fields_set and gateway.port
        port = gateway.port if is_fixed else self._port("gateway", gateway.port)
        self.state.gateway_host, self.state.gateway_port = gateway.host, port
        agents, serving = self._port("agents"), self._port("serving")
        self._add_service("agents", HOST, agents, "/metrics")
        self._add_service("serving", HOST, serving, "/health/live")
        self._add_service("gateway", gateway.host, port, "/health/live")
        if self.state.trainer:
            self._add_service("trainer", None, None, "")

    def _environment(self) -> dict[str, str]:
        """The environment of a service, besides the settings that it reads itself."""
        variables = {
            "SIDSTREAM_STACK__HOME": str(self.home),
            "SIDSTREAM_KAFKA__REPLICATION": str(self.kafka.replication),
            "SIDSTREAM_KAFKA__BOOTSTRAP": self.state.kafka,
            "SIDSTREAM_REDIS__URL": self.state.redis,
            "SIDSTREAM_REGISTRY__TRACKING_URI": self.state.mlflow,
            "SIDSTREAM_GATEWAY__HOST": self.state.gateway_host,
            "SIDSTREAM_GATEWAY__PORT": str(self.state.gateway_port),
            "SIDSTREAM_AGENTS__METRICS_PORT": str(self.state.ports["agents"][0]),
            "SIDSTREAM_SERVING__METRICS_PORT": str(self.state.ports["serving"][0]),
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        return {key: value for key, value in variables.items() if value is not None}

    def _add_service(self, name: str, host: str | None, port: int | None, path: str) -> None:
        """A command of this product; one with a port is up when `path` answers there."""

        def ready() -> bool:
            return port is None or servers.http_answers(port, path, host or HOST)

        address = f"http://{host}:{port}" if port else None
        self._add(name, [sys.executable, "-m", "sidstream", name], ready, address, self._environment())

    def _add(
        self, name: str, command: list[str], ready: Callable[[], bool], address: str | None,
        environment: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        service = ServiceState(name=name, address=address)
        self.state.services.append(service)
        path = self.logs / f"{name}.log"
        env = {**os.environ, **(environment or {})}
        self._launch(SupervisedProcess(name, partial(spawn, name, command, path, env), ready, service))

    def _launch(self, process: SupervisedProcess) -> SupervisedProcess:
        self.processes.append(process)
        process.launch()
        self._save()
        return process

    def _add_external(self, name: str, address: str) -> None:
        self.state.services.append(ServiceState(name=name, state="given", address=address))

    def _port(self, name: str, preferred: int = 0) -> int:
        """A free port: the one of the last start, else the preferred one, else any."""
        port = free_ports(1, self.state.ports.get(name) or ([preferred] if preferred else []))[0]
        self.state.ports[name] = [port]
        return port

    def _wait(self, but: str | None = None) -> None:
        """Until every process started so far answers, `but` one. SidstreamError: one died or is too slow."""
        while not all(process.service.state == "up" for process in self.processes if process.name != but):
            self._check_all(first=True)
            time.sleep(_POLL_STARTING_S)

    def _check_all(self, first: bool) -> None:
        changed = [process.check(self.stack, first) for process in self.processes]
        if any(changed):
            self._save()

    def _stop_all(self, phase: str) -> None:
        """End the services, then the servers they use; a second signal does not hurry this."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        log.info("stopping")
        if phase == "down":
            self.state.phase = "stopping"
            self._save()
        own = {"mlflow", "redis", *(f"kafka-{i}" for i in (1, 2, 3)), "kafka"}
        for group in (
            [process for process in self.processes if process.name not in own],
            [process for process in self.processes if process.name in own],
        ):
            running = [process.child for process in group if process.child is not None]
            for child in running:
                child.terminate()
            deadline = time.monotonic() + self.stack.stop_timeout_s
            for child in running:
                if child.wait(max(0.0, deadline - time.monotonic())) is None:
                    log.warning(
                        "%s did not end within %.0f s: killed (log: %s)",
                        child.name, self.stack.stop_timeout_s, child.log,
                    )  # fmt: skip
                    child.kill()
            for process in group:
                if process.service.state != "failed":
                    process.service.state = "stopped"
                process.service.pid = process.service.born = None
        self.state.phase = "failed" if phase == "failed" else "down"
        self.state.pid = self.state.born = None
        self._save()
        log.info("stopped")

    def _save(self) -> None:
        write_state(self.home, self.state)


def _stop(_signal: int, _frame: object) -> None:
    raise StopSignal


def main() -> None:
    """Entry point of the supervisor's process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--infra", action="store_true")
    parser.add_argument("--trainer", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("sidstream").setLevel(logging.INFO)
    from sidstream.settings import read

    sys.exit(Supervisor(read(), options.infra, options.trainer).run())


if __name__ == "__main__":
    main()
