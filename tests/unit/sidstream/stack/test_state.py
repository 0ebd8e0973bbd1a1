"""What `stack.json` is believed, and which folders a stack takes or removes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness.servers import wait_until
from sidstream.stack.children import process_identity, spawn
from sidstream.stack.control import down, report, up
from sidstream.stack.settings import StackSettings
from sidstream.stack.state import (
    LOCK_FILE,
    STATE_FILE,
    ServiceState,
    StackState,
    addresses,
    is_running,
    read_state,
    stack_lock,
    write_state,
)
from streams.errors import SidstreamError


def _running(home: Path) -> StackState:
    """The state of a stack whose supervisor is this very process."""
    home.mkdir(parents=True, exist_ok=True)
    state = StackState(
        phase="up", pid=os.getpid(), born=process_identity(os.getpid()), kafka="127.0.0.1:1", redis="redis://127.0.0.1:2/0",
        mlflow="http://127.0.0.1:3", gateway_host="127.0.0.1", gateway_port=4,
    )  # fmt: skip
    write_state(home, state)
    return state


def test_addresses_are_those_of_a_living_stack(tmp_path: Path) -> None:
    stack = StackSettings.model_validate({"home": tmp_path})
    assert addresses(stack) is None
    _running(tmp_path)
    live = addresses(stack)
    assert live is not None
    assert (live.kafka, live.redis, live.mlflow) == (
        "127.0.0.1:1", "redis://127.0.0.1:2/0", "http://127.0.0.1:3",
    )  # fmt: skip
    assert (live.gateway_host, live.gateway_port) == ("127.0.0.1", 4)


def test_the_state_of_a_killed_supervisor_is_stale(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    identity = process_identity(ended.pid)
    ended.wait()
    state = _running(tmp_path).model_copy(update={"pid": ended.pid, "born": identity or "boot:1"})
    write_state(tmp_path, state)
    assert not is_running(read_state(tmp_path))
    assert addresses(StackSettings.model_validate({"home": tmp_path})) is None
    assert report(state, tmp_path)["phase"] == "down"


def test_another_process_with_the_supervisors_pid_is_not_the_supervisor(tmp_path: Path) -> None:
    state = _running(tmp_path).model_copy(update={"born": "another boot:123"})
    write_state(tmp_path, state)
    assert addresses(StackSettings.model_validate({"home": tmp_path})) is None


@pytest.mark.parametrize("phase", ["stopping", "failed", "down"])
def test_a_stack_on_its_way_out_has_no_addresses(tmp_path: Path, phase: str) -> None:
    write_state(tmp_path, _running(tmp_path).model_copy(update={"phase": phase}))
    assert addresses(StackSettings.model_validate({"home": tmp_path})) is None


def test_a_damaged_state_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text('{"phase": "u')
    with pytest.raises(SidstreamError, match="down --purge"):
        read_state(tmp_path)


def test_readers_see_a_whole_state_while_it_is_replaced(tmp_path: Path) -> None:
    state = _running(tmp_path)
    state.services = [ServiceState(name=f"s{n}", note="x" * 2000) for n in range(50)]
    written = threading.Event()

    def write() -> None:
        for _ in range(100):
            write_state(tmp_path, state)
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not written.is_set():
        assert read_state(tmp_path) is not None
        reads += 1
    writer.join()
    assert reads > 0
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_the_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    inside = threading.Event()

    def enter() -> None:
        with stack_lock(tmp_path):
            inside.set()

    with stack_lock(tmp_path):
        other = threading.Thread(target=enter)
        other.start()
        assert not inside.wait(0.3)
    assert inside.wait(30)
    other.join()


def test_a_lock_on_a_removed_folder_is_not_a_lock(tmp_path: Path) -> None:
    home = tmp_path / "home"
    inside = threading.Event()

    def enter() -> None:
        with stack_lock(home):
            assert (home / LOCK_FILE).exists()
            inside.set()

    with stack_lock(home):
        other = threading.Thread(target=enter)
        other.start()
        shutil.rmtree(home)
    assert inside.wait(30)
    other.join()


def test_down_ends_what_a_killed_supervisor_left_and_keeps_the_data(tmp_path: Path) -> None:
    child = spawn("left", ["sleep", "600"], tmp_path / "logs" / "left.log")
    (tmp_path / "kafka").mkdir()
    left = ServiceState(name="left", state="up", pid=child.pid, born=process_identity(child.pid))
    write_state(tmp_path, StackState(phase="up", pid=2**22 + 1, born="boot:1", services=[left]))

    assert down(StackSettings.model_validate({"home": tmp_path})) is False

    wait_until(lambda: process_identity(child.pid) is None, 30, "the end of what was left")
    state = read_state(tmp_path)
    assert state is not None
    assert (state.phase, state.pid) == ("down", None)
    assert (tmp_path / "kafka").exists()


def test_purge_removes_the_folder_also_when_its_state_is_damaged(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / STATE_FILE).write_text("{")
    with pytest.raises(SidstreamError, match="not the state of a stack"):
        down(StackSettings.model_validate({"home": home}))
    down(StackSettings.model_validate({"home": home}), purge=True)
    assert not home.exists()


def test_a_folder_with_other_files_is_neither_taken_nor_removed(tmp_path: Path) -> None:
    from sidstream.settings import Settings

    (tmp_path / "thesis.tex").write_text("years of work")
    settings = Settings.model_validate({"stack": {"home": str(tmp_path)}})
    with pytest.raises(SidstreamError, match=r"thesis\.tex"):
        up(settings)
    with pytest.raises(SidstreamError, match=r"thesis\.tex"):
        down(settings.stack, purge=True)
    assert (tmp_path / "thesis.tex").exists()


def test_the_current_folder_is_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(tmp_path, StackState(phase="down"))
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    with pytest.raises(SidstreamError, match="by hand"):
        down(StackSettings.model_validate({"home": tmp_path}), purge=True)
    assert (tmp_path / STATE_FILE).exists()


@pytest.mark.parametrize(
    ("options", "lacks"), [({"brokers": 3}, "1 broker"), ({}, "--infra"), ({"trainer": True}, "--infra")]
)
def test_a_second_up_that_asks_for_more_is_refused_with_what_is_lacking(
    tmp_path: Path, options: dict[str, object], lacks: str
) -> None:
    from sidstream.settings import Settings

    write_state(tmp_path, _running(tmp_path).model_copy(update={"infra": True}))
    stack = {"home": str(tmp_path), "brokers": options.get("brokers", 1)}
    with pytest.raises(SidstreamError, match=lacks):
        up(Settings.model_validate({"stack": stack}), trainer=bool(options.get("trainer")))
