"""A supervised process: an error at its first start, a restart with growing pauses later."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.servers import wait_until
from sidstream.stack.children import spawn
from sidstream.stack.settings import StackSettings
from sidstream.stack.state import ServiceState
from sidstream.stack.units import Unit, said
from streams.errors import SidstreamError


def _stack(**changed: float) -> StackSettings:
    return StackSettings.model_validate(
        {"restart_backoff_s": 0.05, "restart_backoff_max_s": 0.4, "start_timeout_s": 30, **changed}
    )


def _unit(folder: Path, command: str, ready: bool = True) -> Unit:
    log = folder / "worker.log"
    return Unit(
        "worker",
        lambda: spawn("worker", ["sh", "-c", command], log),
        lambda: ready,
        ServiceState(name="worker"),
    )


def test_a_death_at_the_first_start_is_an_error_with_the_commands_own_words(tmp_path: Path) -> None:
    unit = _unit(tmp_path, "echo 'error: no address given'; exit 3", ready=False)
    unit.launch()
    assert unit.child is not None
    unit.child.wait(30)
    with pytest.raises(
        SidstreamError, match=r"worker ended with exit code 3 .*no address given.*worker\.log"
    ):
        unit.check(_stack(), first=True)
    assert unit.shown.state == "failed"


def test_what_never_answers_is_an_error_that_names_the_log(tmp_path: Path) -> None:
    unit = _unit(tmp_path, "sleep 600", ready=False)
    unit.launch()
    try:
        with pytest.raises(SidstreamError, match=r"does not answer after .*worker\.log"):
            wait_until(lambda: unit.check(_stack(start_timeout_s=0.2), first=True), 30, "the error")
    finally:
        assert unit.child is not None
        unit.child.kill()


def test_a_service_that_dies_is_started_again_and_counted(tmp_path: Path) -> None:
    unit, stack = _unit(tmp_path, "sleep 600"), _stack()
    unit.launch()
    wait_until(lambda: unit.check(stack, first=True), 30, "the first start")
    assert unit.shown.state == "up"
    first = unit.child
    assert first is not None
    first.kill()

    wait_until(lambda: unit.check(stack, first=False), 30, "the death to be seen")
    assert (unit.shown.state, unit.shown.pid) == ("restarting", None)
    assert "exit code" in (unit.shown.note or "")
    wait_until(lambda: unit.check(stack, first=False) and unit.shown.state == "up", 30, "the restart")

    assert unit.shown.restarts == 1
    assert unit.shown.note is None
    assert unit.child is not None
    assert unit.child.pid == unit.shown.pid != first.pid
    unit.child.kill()


def test_the_pause_doubles_up_to_its_bound(tmp_path: Path) -> None:
    unit, stack = _unit(tmp_path, "exit 1", ready=False), _stack()
    unit.launch()
    pauses = []
    for _ in range(5):
        wait_until(lambda: unit.check(stack, first=False) and unit.shown.state == "restarting", 30, "a death")
        pauses.append(unit.restart_wait_s)
        wait_until(lambda: unit.check(stack, first=False) and unit.shown.state == "starting", 30, "a start")
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.4]


def test_only_the_last_error_line_of_a_log_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert said(log) == ""
    log.write_text("error: first\nTraceback\nerror: last\nbye\n")
    assert said(log) == " (last)"
