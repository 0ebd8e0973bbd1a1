"""The state of a stack, `stack.json` in its folder, and whether the process that wrote it still runs."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from sidstream.stack.children import process_identity
from sidstream.stack.settings import StackSettings
from streams.errors import SidstreamError

STATE_FILE = "stack.json"
LOCK_FILE = "up.lock"

Phase = Literal["starting", "up", "stopping", "failed", "down"]
Condition = Literal["waiting", "starting", "up", "restarting", "stopped", "failed", "given"]


class ServiceState(BaseModel):
    """One process of the stack, or a server that the settings give."""

    name: str
    state: Condition = "waiting"
    address: str | None = None
    pid: int | None = None
    born: str | None = Field(default=None, description="tells the process from a later one with its pid")
    seconds: float | None = Field(default=None, description="from its start until it answered")
    restarts: int = 0
    log: str | None = None
    note: str | None = None


class StackState(BaseModel):
    """The whole stack."""

    format: Literal[1] = 1
    phase: Phase = "starting"
    pid: int | None = None
    born: str | None = None
    started: float | None = Field(default=None, description="seconds since 1970")
    brokers: int = 1
    infra: bool = Field(default=False, description="without the product's services")
    trainer: bool = False
    error: str | None = None
    kafka: str | None = None
    redis: str | None = None
    mlflow: str | None = None
    gateway_host: str | None = None
    gateway_port: int | None = None
    ports: dict[str, list[int]] = Field(default_factory=dict, description="taken again at the next start")
    services: list[ServiceState] = Field(default_factory=list)

    @property
    def gateway(self) -> str | None:
        """The gateway's address."""
        return f"http://{self.gateway_host}:{self.gateway_port}" if self.gateway_port else None


@dataclass(frozen=True)
class Addresses:
    """The addresses of the servers that a running stack started; None for those that the settings give."""

    kafka: str | None
    redis: str | None
    mlflow: str | None
    gateway_host: str | None
    gateway_port: int | None


def read_state(home: Path) -> StackState | None:
    """The state in `stack.json`; None where there is no such file. SidstreamError when it is of no stack."""
    path = home / STATE_FILE
    try:
        return StackState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, NotADirectoryError) as error:
        raise SidstreamError(
            f"{path} is not the state of a stack of this version: remove it with `sidstream down --purge`, "
            "or choose another folder with SIDSTREAM_STACK__HOME"
        ) from error


def write_state(home: Path, state: StackState) -> None:
    """Replace `stack.json` in one step: a reader sees the old or the new one, whole."""
    path = home / STATE_FILE
    new = path.with_name(f"{STATE_FILE}.{os.getpid()}.new")
    new.write_text(state.model_dump_json(indent=1) + "\n")
    os.replace(new, path)


def is_running(state: StackState | None) -> bool:
    """True when the supervisor that wrote the state still runs (and is not another process with its pid)."""
    if state is None or state.pid is None or state.born is None:
        return False
    return process_identity(state.pid) == state.born


def addresses(stack: StackSettings) -> Addresses | None:
    """The addresses of the stack in `stack.home`; None when none runs there."""
    state = read_state(stack.home)
    if state is None or not is_running(state) or state.phase not in ("starting", "up"):
        return None
    return Addresses(state.kafka, state.redis, state.mlflow, state.gateway_host, state.gateway_port)


@contextmanager
def stack_lock(home: Path) -> Iterator[None]:
    """Wait for the lock under which one process at a time starts, stops or removes the stack in `home`."""
    path = home / LOCK_FILE
    while True:
        home.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held the lock may have removed the folder: then this is a lock on nothing.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return
