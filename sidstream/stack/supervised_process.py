"""One supervised process: started, watched until it answers, started again when it dies."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sidstream.stack.children import Child, process_identity
from sidstream.stack.settings import StackSettings
from sidstream.stack.state import ServiceState
from streams.backoff import Backoff
from streams.errors import SidstreamError

log = logging.getLogger(__name__)

# The end of a log in which a command's own error line is looked for.
_TAIL_BYTES = 4096


@dataclass
class SupervisedProcess:
    """A process of the stack: how it is started, how to see that it answers, and its state."""

    name: str
    start: Callable[[], Child]
    ready: Callable[[], bool]
    service: ServiceState
    child: Child | None = None
    started_at: float = 0.0
    next_start: float = 0.0
    backoff: Backoff | None = None
    restart_wait_s: float = 0.0  # the wait before the last restart
    preparation_s: float = 0.0  # seconds that went into its first start before the process

    def launch(self) -> None:
        """Start the process; it is `starting` until it answers."""
        self.started_at = time.monotonic()
        self.child = self.start()
        self.service.state = "starting"
        self.service.pid, self.service.born = self.child.pid, process_identity(self.child.pid)
        self.service.log = str(self.child.log)
        self.service.note = None

    def check(self, stack: StackSettings, first: bool) -> bool:
        """Look once and act; True when its state changed. `first`: a death is an error, not a restart.

        Raises SidstreamError, which names the log, when it dies or takes too long at the first start.
        """
        before = self.service.model_copy()
        if self.service.state == "restarting":
            if time.monotonic() >= self.next_start:
                self.service.restarts += 1
                self.launch()
        elif self.service.state in ("starting", "up") and self.child is not None:
            self._check_child(self.child, stack, first)
        return self.service != before

    def _check_child(self, child: Child, stack: StackSettings, first: bool) -> None:
        age = time.monotonic() - self.started_at
        code = child.exit_code
        if code is not None:
            if first:
                self.service.state = "failed"
                raise SidstreamError(
                    f"{self.name} ended with exit code {code} while it started"
                    f"{last_error_line(child.log)}: see {child.log}"
                )
            self._plan_restart(f"ended with exit code {code}", age, stack)
        elif self.service.state == "starting":
            if self.ready():
                self.service.state = "up"
                self.service.seconds = round(age + (self.preparation_s if first else 0.0), 1)
                self.service.note = None
                log.info("%s is up after %.1f s", self.name, self.service.seconds)
            elif age > stack.start_timeout_s:
                if first:
                    self.service.state = "failed"
                    raise SidstreamError(
                        f"{self.name} does not answer after {stack.start_timeout_s:.0f} s: see {child.log}, "
                        "or allow more with SIDSTREAM_STACK__START_TIMEOUT_S"
                    )
                child.kill()
                self._plan_restart(f"did not answer within {stack.start_timeout_s:.0f} s", age, stack)

    def _plan_restart(self, why: str, age: float, stack: StackSettings) -> None:
        if self.service.state == "up" and age > stack.restart_backoff_max_s:
            self.backoff = None  # it ran well, so this failure is a new one
        if self.backoff is None:
            self.backoff = Backoff(stack.restart_backoff_s, stack.restart_backoff_max_s)
        self.restart_wait_s = self.backoff.next_wait()
        self.next_start = time.monotonic() + self.restart_wait_s
        self.service.state = "restarting"
        self.service.pid = self.service.born = self.service.seconds = None
        self.service.note = f"{why}; started again after {self.restart_wait_s:.0f} s"
        log.warning(
            "%s %s; starting it again in %.1f s (log: %s)",
            self.name,
            why,
            self.restart_wait_s,
            self.service.log,
        )


def last_error_line(path: Path) -> str:
    """The error line that a command of ours left at the end of its log, as ` (...)`; empty: none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f" ({errors[-1]})" if errors else ""
