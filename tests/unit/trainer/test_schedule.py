"""The trainer's service: one cycle at a time, errors do not end it, a signal does."""

from __future__ import annotations

import threading
from collections.abc import Callable

from streams.errors import SidstreamError
from trainer.cycle_result import CycleResult
from trainer.schedule import run_periodically
from trainer.settings import ScheduleSettings

SOON = ScheduleSettings.model_validate({"every_minutes": 0.2 / 60, "misfire_minutes": 1.0})


def test_cycles_follow_each_other_one_at_a_time_and_an_error_is_told() -> None:
    ended = threading.Event()
    running = threading.Lock()
    results: list[CycleResult | SidstreamError] = []
    overlaps: list[int] = []

    def cycle(stop: Callable[[], bool]) -> CycleResult:
        if not running.acquire(blocking=False):
            overlaps.append(1)
            return CycleResult()
        try:
            if len(results) == 1:
                raise SidstreamError("the broker does not answer")
            # Longer than the interval: the next start must wait.
            threading.Event().wait(0.5)
            return CycleResult(skipped="nothing new")
        finally:
            running.release()

    def tell(outcome: CycleResult | SidstreamError) -> None:
        results.append(outcome)
        if len(results) == 3:
            ended.set()

    run_periodically(cycle, SOON, tell, ended)
    assert not overlaps
    assert isinstance(results[0], CycleResult)
    assert isinstance(results[1], SidstreamError)
    assert isinstance(results[2], CycleResult)


def test_the_end_asks_the_running_cycle_to_stop_and_waits_for_it() -> None:
    ended = threading.Event()
    steps: list[str] = []

    def cycle(stop: Callable[[], bool]) -> CycleResult:
        steps.append("began")
        threading.Timer(0.1, ended.set).start()
        assert ended.wait(30)
        assert stop()
        steps.append("checkpoint written")
        return CycleResult(skipped="interrupted")

    run_periodically(cycle, SOON, lambda outcome: steps.append("told"), ended)
    assert steps == ["began", "checkpoint written", "told"]
