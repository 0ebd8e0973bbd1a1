"""One supervised process: started, watched until it answers, started again when it dies."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sidstream.stack.children import Child, born
from sidstream.stack.settings import StackSettings
from sidstream.stack.state import ServiceState
from streams.backoff import Backoff
from streams.errors import SidstreamError

log = logging.getLogger(__name__)

# The end of a log in which a command's own error line is looked for.
_TAIL_BYTES = 4096


@dataclass
class Unit:
    """What is run, and how one sees that it answers."""

    name: str
    start: Callable[[], Child]
    ready: Callable[[], bool]
    shown: ServiceState
    child: Child | None = None
    began: float = 0.0
    next_start: float = 0.0
    backoff: Backoff | None = None
    restart_wait_s: float = 0.0  # the wait before the last restart
    prepared: float = 0.0  # seconds that went into its first start before the process

    def launch(self) -> None:
        """Start the process; it is `starting` until it answers."""
        self.began = time.monotonic()
        self.child = self.start()
        self.shown.state = "starting"
        self.shown.pid, self.shown.born = self.child.pid, born(self.child.pid)
        self.shown.log = str(self.child.log)
        self.shown.note = None

    def check(self, stack: StackSettings, first: bool) -> bool:
        """Look once and act; True when its state changed. `first`: a death is an error, not a restart.

        Raises SidstreamError, which names the log, when it dies or takes too long at the first start.
        """
        before = self.shown.model_copy()
        if self.shown.state == "restarting":
            if time.monotonic() >= self.next_start:
                self.shown.restarts += 1
                self.launch()
        elif self.shown.state in ("starting", "up") and self.child is not None:
            self._look(self.child, stack, first)
        return self.shown != before

    def _look(self, child: Child, stack: StackSettings, first: bool) -> None:
        age = time.monotonic() - self.began
        code = child.exit_code
        if code is not None:
            if first:
                self.shown.state = "failed"
                raise SidstreamError(
                    f"{self.name} ended with exit code {code} while it started"
                    f"{said(child.log)}: see {child.log}"
                )
            self._plan_restart(f"ended with exit code {code}", age, stack)
        elif self.shown.state == "starting":
            if self.ready():
                self.shown.state = "up"
                self.shown.seconds = round(age + (self.prepared if first else 0.0), 1)
                self.shown.note = None
                log.info("%s is up after %.1f s", self.name, self.shown.seconds)
            elif age > stack.start_timeout_s:
                if first:
                    self.shown.state = "failed"
                    raise SidstreamError(
                        f"{self.name} does not answer after {stack.start_timeout_s:.0f} s: see {child.log}, "
                        "or allow more with SIDSTREAM_STACK__START_TIMEOUT_S"
                    )
                child.kill()
                self._plan_restart(f"did not answer within {stack.start_timeout_s:.0f} s", age, stack)

    def _plan_restart(self, why: str, age: float, stack: StackSettings) -> None:
        if self.shown.state == "up" and age > stack.restart_backoff_max_s:
            self.backoff = None  # it ran well, so this failure is a new one
        if self.backoff is None:
            self.backoff = Backoff(stack.restart_backoff_s, stack.restart_backoff_max_s)
        self.restart_wait_s = self.backoff.next_wait()
        self.next_start = time.monotonic() + self.restart_wait_s
        self.shown.state = "restarting"
        self.shown.pid = self.shown.born = self.shown.seconds = None
        self.shown.note = f"{why}; started again after {self.restart_wait_s:.0f} s"
        log.warning(
            "%s %s; starting it again in %.1f s (log: %s)",
            self.name,
            why,
            self.restart_wait_s,
            self.shown.log,
        )


def said(path: Path) -> str:
    """The error line that a command of ours left at the end of its log, as ` (...)`; empty: none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f" ({errors[-1]})" if errors else ""
