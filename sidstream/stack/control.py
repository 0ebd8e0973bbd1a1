"""Start, find, stop and remove a local stack, from another process than its supervisor."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidstream.stack.children import end_session, process_identity
from sidstream.stack.settings import StackSettings
from sidstream.stack.state import (
    LOCK_FILE,
    STATE_FILE,
    StackState,
    is_running,
    read_state,
    stack_lock,
    write_state,
)
from streams.errors import SidstreamError

if TYPE_CHECKING:
    from sidstream.settings import Settings

_POLL_S = 0.1
# From the start of the supervisor to its first stack.json; a busy machine imports slowly.
_FIRST_STATE_S = 60.0
# What may lie in a folder that is to become a stack's: logs of a demo that starts it, and the locks.
_HARMLESS = frozenset({"logs", LOCK_FILE, "made-by-demo"})

OnChange = Callable[[StackState], None]


def up(
    settings: Settings, infra: bool = False, trainer: bool = False, on_change: OnChange | None = None
) -> tuple[StackState, bool]:
    """Start the stack, or find the one that runs; return its state and whether it was found.

    Returns when everything answers. Raises SidstreamError when the start fails (then nothing is left to run),
    or when the stack that runs is not the one that was asked for.
    """
    stack = settings.stack
    home = stack.home.resolve()
    _refuse_foreign(home)
    with stack_lock(home):
        state = read_state(home)
        was_running = is_running(state)
        if not was_running:
            state = _start_supervisor(stack, home, infra, trainer, state)
    assert state is not None
    if was_running:
        _refuse_other(state, stack, infra, trainer, home)
    try:
        return _follow(home, state, on_change), was_running
    except KeyboardInterrupt:
        if not was_running:
            down(stack)
        raise


def down(stack: StackSettings, purge: bool = False) -> bool:
    """Stop the stack; return whether one ran. `purge`: remove its folder with all data.

    SIGTERM to the supervisor, which stops the rest in order; SIGKILL after twice the time it allows them.
    """
    home = stack.home.resolve()
    if not home.exists():
        return False
    if purge:
        _refuse_purge(home)
    with stack_lock(home):
        try:
            state = read_state(home)
        except SidstreamError:
            if not purge:
                raise
            state = None  # unreadable: the folder can only be removed
        ran = is_running(state)
        if state is not None and ran:
            _end_supervisor(state, stack)
        if state is not None:
            # What a killed supervisor left; its parent watches end them in a moment, too.
            for service in state.services:
                if service.pid and service.born:
                    end_session(service.pid, service.born, stack.stop_timeout_s)
        if purge:
            shutil.rmtree(home)
        elif state is not None:
            _mark_down(home)
        elif not any(entry.name != LOCK_FILE for entry in home.iterdir()):
            shutil.rmtree(home)  # only our lock made the folder
    return ran


def report(state: StackState | None, home: Path) -> dict[str, Any]:
    """What `--json` prints of a stack: its phase, addresses and services."""
    alive = is_running(state)
    if state is None:
        state = StackState(phase="down")
    external = {service.name: service.address for service in state.services if service.state == "given"}
    phase = state.phase if alive or state.phase in ("down", "failed") else "down"
    return {
        "phase": phase,
        "home": str(home.resolve()),
        "pid": state.pid if alive else None,
        "brokers": state.brokers,
        "kafka": (state.kafka or external.get("kafka")) if alive else None,
        "redis": state.redis if alive else None,
        "mlflow": (state.mlflow or external.get("mlflow")) if alive else None,
        "gateway": state.gateway if alive else None,
        "error": state.error,
        "services": [
            service.model_dump(exclude={"born"})
            | ({} if alive or service.state == "given" else {"state": "stopped", "pid": None})
            for service in state.services
        ],
    }


def _start_supervisor(
    stack: StackSettings, home: Path, infra: bool, trainer: bool, previous: StackState | None
) -> StackState:
    """Start it detached; return when it has written stack.json for the first time."""
    # It reads the settings itself, as this process did; what an argument changed goes by the environment.
    env = dict(os.environ)
    for name, value in stack.model_copy(update={"home": home}).model_dump(exclude_none=True).items():
        env[f"SIDSTREAM_STACK__{name.upper()}"] = str(value)
    logs = home / "logs"
    logs.mkdir(exist_ok=True)
    options = [*(["--infra"] if infra else []), *(["--trainer"] if trainer else [])]
    with (logs / "supervisor.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sidstream.stack.supervisor", *options],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + _FIRST_STATE_S
    while True:
        state = read_state(home)
        if state is not None and state != previous:
            return state
        if process.poll() is not None:
            raise SidstreamError(
                f"the stack's supervisor ended with exit code {process.returncode}: see {logs}/supervisor.log"
            )
        if time.monotonic() > deadline:
            process.kill()
            raise SidstreamError(
                f"the stack's supervisor says nothing after {_FIRST_STATE_S:.0f} s: see {logs}/supervisor.log"
            )
        time.sleep(_POLL_S)


def _follow(home: Path, state: StackState, on_change: OnChange | None) -> StackState:
    """Until the stack is up. Raises the error that the start ended with."""
    reported: StackState | None = None
    while True:
        if on_change and state != reported:
            on_change(state)
            reported = state
        if state.phase == "up":
            return state
        if state.phase == "failed":
            raise SidstreamError(state.error or f"the stack failed to start: see {home}/logs/supervisor.log")
        if not is_running(state):
            current = read_state(home)
            if current is None or current == state or current.phase != "failed":
                raise SidstreamError(
                    f"the stack was stopped while it started: see {home}/logs/supervisor.log"
                )
        time.sleep(_POLL_S)
        state = read_state(home) or state


def _end_supervisor(state: StackState, stack: StackSettings) -> None:
    assert state.pid is not None
    assert state.born is not None
    os.kill(state.pid, signal.SIGTERM)
    deadline = time.monotonic() + 2 * stack.stop_timeout_s
    while process_identity(state.pid) == state.born:
        if time.monotonic() > deadline:
            end_session(state.pid, state.born, stack.stop_timeout_s)
            return
        time.sleep(_POLL_S)


def _mark_down(home: Path) -> None:
    """After the end of a supervisor that could not say so itself."""
    state = read_state(home)
    if state is not None and state.pid is not None:
        for service in state.services:
            service.pid = service.born = None
        write_state(home, state.model_copy(update={"phase": "down", "pid": None, "born": None}))


def _refuse_foreign(home: Path) -> None:
    """A stack's folder is removed as a whole one day: it must be the stack's alone."""
    if home.exists() and not home.is_dir():
        raise SidstreamError(f"{home} is not a folder: choose another with SIDSTREAM_STACK__HOME")
    if home.is_dir() and not (home / STATE_FILE).exists():
        foreign = sorted(entry.name for entry in home.iterdir() if entry.name not in _HARMLESS)
        if foreign:
            raise SidstreamError(
                f"{home} holds {foreign[0]!r} and is no stack's folder: choose an empty one with "
                "SIDSTREAM_STACK__HOME"
            )


def _refuse_purge(home: Path) -> None:
    _refuse_foreign(home)
    if Path.cwd().is_relative_to(home) or Path.home().is_relative_to(home):
        raise SidstreamError(
            f"{home} is the current or the home folder, or holds it: remove the stack by hand"
        )


def _refuse_other(state: StackState, stack: StackSettings, infra: bool, trainer: bool, home: Path) -> None:
    """Raise SidstreamError where the running stack lacks what the command asks for."""
    lacks = None
    if state.brokers != stack.brokers:
        lacks = f"{state.brokers} broker(s), not {stack.brokers}"
    elif state.infra and not infra:
        lacks = "no services (it was started with --infra)"
    elif trainer and not state.trainer:
        lacks = "no trainer"
    if lacks:
        raise SidstreamError(
            f"the stack that runs in {home} has {lacks}: stop it with `sidstream down` first"
        )
