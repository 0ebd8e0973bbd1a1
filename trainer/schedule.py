"""`sidstream trainer`: periodic update cycles, one at a time, until SIGTERM."""

from __future__ import annotations

import datetime
import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType

from apscheduler.schedulers.background import BackgroundScheduler

from streams.errors import SidstreamError
from trainer.cycle_result import CycleResult
from trainer.settings import ScheduleSettings

_LOG = logging.getLogger(__name__)
_JOB = "cycle"


def run_periodically(
    cycle: Callable[[Callable[[], bool]], CycleResult],
    schedule: ScheduleSettings,
    on_result: Callable[[CycleResult | SidstreamError], None],
    ended: threading.Event | None = None,
) -> None:
    """Call `cycle(stop)` periodically, until `ended` is set (by SIGTERM and SIGINT where it is not given).

    Starts that fall into a running cycle, or that were missed while the machine slept, become one.
    `on_result` gets each result, or the error that ended a cycle: the next one starts all the same. On the
    way out the running cycle is asked to stop, writes its checkpoint, and is waited for.
    """
    finish = ended or on_signal()

    def run_once() -> None:
        try:
            on_result(cycle(finish.is_set))
        except SidstreamError as error:
            on_result(error)
        except Exception:
            # A fault of ours must not end the service in silence; the next cycle may do better.
            _LOG.exception("the cycle failed")
            on_result(
                SidstreamError("the cycle failed by a fault of the trainer: see the log for the traceback")
            )

    # The library tells of every start and miss; the results say it better.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    scheduler = BackgroundScheduler(timezone=datetime.UTC)
    now = datetime.datetime.now(datetime.UTC)
    scheduler.add_job(
        run_once, "interval", minutes=schedule.every_minutes, id=_JOB, max_instances=1, coalesce=True,
        misfire_grace_time=max(1, round(schedule.misfire_minutes * 60)),
        next_run_time=now + datetime.timedelta(minutes=schedule.first_after_minutes),
    )  # fmt: skip
    scheduler.start()
    try:
        finish.wait()
    finally:
        scheduler.shutdown(wait=True)


def on_signal() -> threading.Event:
    """An event that SIGTERM and SIGINT set from now on, in place of ending the process."""
    finish = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        finish.set()

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, end)
    return finish
