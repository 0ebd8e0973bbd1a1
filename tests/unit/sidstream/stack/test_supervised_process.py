"""A supervised process: an error at its first start, a restart with growing pauses later."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.servers import wait_until
from sidstream.stack.children import spawn
from sidstream.stack.settings import StackSettings
from sidstream.stack.state import ServiceState
from sidstream.stack.supervised_process import SupervisedProcess, last_error_line
from streams.errors import SidstreamError


def _stack(**changed: float) -> StackSettings:
    return StackSettings.model_validate(
        {"restart_backoff_s": 0.05, "restart_backoff_max_s": 0.4, "start_timeout_s": 30, **changed}
    )


def _supervised(folder: Path, command: str, ready: bool = True) -> SupervisedProcess:
    log = folder / "worker.log"
    return SupervisedProcess(
        "worker",
        lambda: spawn("worker", ["sh", "-c", command], log),
        lambda: ready,
        ServiceState(name="worker"),
    )


def test_a_death_at_the_first_start_is_an_error_with_the_commands_own_words(tmp_path: Path) -> None:
    process = _supervised(tmp_path, "echo 'error: no address given'; exit 3", ready=False)
    process.launch()
    assert process.child is not None
    process.child.wait(30)
    with pytest.raises(
        SidstreamError, match=r"worker ended with exit code 3 .*no address given.*worker\.log"
    ):
        process.check(_stack(), first=True)
    assert process.service.state == "failed"


def test_what_never_answers_is_an_error_that_names_the_log(tmp_path: Path) -> None:
    process = _supervised(tmp_path, "sleep 600", ready=False)
    process.launch()
    try:
        with pytest.raises(SidstreamError, match=r"does not answer after .*worker\.log"):
            wait_until(lambda: process.check(_stack(start_timeout_s=0.2), first=True), 30, "the error")
    finally:
        assert process.child is not None
        process.child.kill()


def test_a_service_that_dies_is_started_again_and_counted(tmp_path: Path) -> None:
    process, stack = _supervised(tmp_path, "sleep 600"), _stack()
    process.launch()
    wait_until(lambda: process.check(stack, first=True), 30, "the first start")
    assert process.service.state == "up"
    first = process.child
    assert first is not None
    first.kill()

    wait_until(lambda: process.check(stack, first=False), 30, "the death to be seen")
    assert (process.service.state, process.service.pid) == ("restarting", None)
    assert "exit code" in (process.service.note or "")
    wait_until(lambda: process.check(stack, first=False) and process.service.state == "up", 30, "the restart")

    assert process.service.restarts == 1
    assert process.service.note is None
    assert process.child is not None
    assert process.child.pid == process.service.pid != first.pid
    process.child.kill()


def test_the_pause_doubles_up_to_its_bound(tmp_path: Path) -> None:
    process, stack = _supervised(tmp_path, "exit 1", ready=False), _stack()
    process.launch()
    pauses = []
    for _ in range(5):
        wait_until(
            lambda: process.check(stack, first=False) and process.service.state == "restarting", 30, "a death"
        )
        pauses.append(process.restart_wait_s)
        wait_until(
            lambda: process.check(stack, first=False) and process.service.state == "starting", 30, "a start"
        )
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.4]


def test_only_the_last_error_line_of_a_log_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_error_line(log) == ""
    log.write_text("error: first\nTraceback\nerror: last\nbye\n")
    assert last_error_line(log) == " (last)"
