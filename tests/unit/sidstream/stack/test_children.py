"""Child processes end with their parent, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from harness.servers import wait_until
from sidstream.stack.children import Child, end_session, process_identity, spawn

# A command with a process of its own below it, which tells both pids.
_TWO = ["sh", "-c", "sleep 600 & echo $$ $! > pids; wait"]


def _two(folder: Path) -> tuple[Child, list[int]]:
    child = spawn("two", _TWO, folder / "log", cwd=folder)
    return child, _pids(folder)


def _pids(folder: Path) -> list[int]:
    path = folder / "pids"
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"), 30, "the command's pids")
    return [int(pid) for pid in path.read_text().split()]


def _all_ended(pids: list[int]) -> bool:
    return all(process_identity(pid) is None for pid in pids)


def test_a_killed_parent_takes_its_children_and_theirs_along(tmp_path: Path) -> None:
    parent = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from sidstream.stack.children import spawn
        spawn("two", {_TWO!r}, Path("log"), cwd=Path({str(tmp_path)!r}))
        time.sleep(600)
    """)
    root = Path(__file__).parents[4]
    process = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}
    )
    pids = _pids(tmp_path)
    assert not _all_ended(pids[:1])

    process.kill()
    process.wait()

    wait_until(lambda: _all_ended(pids), 30, "the end of the children")


def test_a_child_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    started: list[Child] = []
    thread = threading.Thread(
        target=lambda: started.append(spawn("sleep", ["sleep", "600"], tmp_path / "log"))
    )
    thread.start()
    thread.join()
    child = started[0]

    assert child.wait(1.0) is None

    child.kill()
    assert not child.alive
    assert process_identity(child.pid) is None


def test_a_killed_child_takes_along_what_it_started(tmp_path: Path) -> None:
    child, pids = _two(tmp_path)
    child.kill()
    wait_until(lambda: _all_ended(pids), 30, "the end of the session")


def test_what_a_child_started_ends_when_the_child_ends(tmp_path: Path) -> None:
    child, pids = _two(tmp_path)
    os.kill(pids[0], signal.SIGKILL)
    wait_until(lambda: _all_ended(pids), 30, "the end of the session")
    assert child.wait(30) == 128 + signal.SIGKILL


def test_the_end_of_the_go_between_ends_the_child(tmp_path: Path) -> None:
    child, pids = _two(tmp_path)
    child.process.kill()
    wait_until(lambda: child.exit_code is not None and _all_ended(pids), 30, "the end of the session")


def test_stop_asks_first_and_kills_what_does_not_listen(tmp_path: Path) -> None:
    polite = spawn("polite", ["sh", "-c", "trap 'exit 7' TERM; echo on; sleep 600 & wait"], tmp_path / "a")
    wait_until(lambda: "on" in (tmp_path / "a").read_text(), 30, "the trap")
    polite.stop(grace=30)
    assert polite.exit_code == 7

    deaf = spawn("deaf", ["sh", "-c", "trap '' TERM; echo on; sleep 600"], tmp_path / "b")
    wait_until(lambda: "on" in (tmp_path / "b").read_text(), 30, "the trap")
    deaf.stop(grace=0.2)
    assert process_identity(deaf.pid) is None


def test_a_command_that_cannot_run_says_so_in_its_log(tmp_path: Path) -> None:
    child = spawn("none", ["/no/such/command"], tmp_path / "log")
    assert child.wait(30) == 127
    assert "/no/such/command" in (tmp_path / "log").read_text()


def test_a_process_that_ends_while_it_is_looked_at_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def end_now(self: Path, *arguments: object, **named: object) -> str:
        raise ProcessLookupError(3, "No such process")

    monkeypatch.setattr(Path, "read_text", end_now)
    assert process_identity(os.getpid()) is None


def test_a_session_is_ended_only_under_its_own_identity(tmp_path: Path) -> None:
    child, pids = _two(tmp_path)
    end_session(child.pid, "another life of this pid", timeout=5)
    assert child.alive

    identity = process_identity(child.pid)
    assert identity is not None
    end_session(child.pid, identity, timeout=30)
    wait_until(lambda: _all_ended(pids), 30, "the end of the session")


def test_a_large_log_is_set_aside_at_the_next_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * (10 * 1024 * 1024 + 1))
    spawn("echo", ["echo", "new"], log).wait(30)
    assert log.read_text() == "new\n"
    assert (tmp_path / "log.1").stat().st_size > 10 * 1024 * 1024
