"""The demo: the whole loop on a real shop's year, one line a stage.

Each stage is one `sidstream` command in a process of its own, as a person would type it; its output goes to a
log in the state folder. A stage that fails ends the demo with one sentence and the path of that log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from streams.errors import SidstreamError

# The lines of a stage's log that tell a person where it is; everything else stays in the log.
_TAIL_BYTES = 400
_REFRESH_S = 0.25

# What the demo sets beside the defaults; whatever the environment sets already stays.
SETTINGS = {
    # The aligned arm is in both of the gate's comparisons, each other arm in one: with about sqrt(2) times
    # their share both differences have the least variance that so many users can give (Dunnett 1955).
    "SIDSTREAM_ROLLOUT__CHAMPION": "0.3",
    "SIDSTREAM_ROLLOUT__SFT": "0.3",
    "SIDSTREAM_ROLLOUT__DPO": "0.4",
    # A few thousand sessions bring five clicks a purchase: with both in one stage, few of its pairs say what
    # sells. Smaller steps, so that so few pairs are as many steps as those of a full window.
    "SIDSTREAM_TRAINER__DPO__SCHEMES": '["purchased_over_shown"]',
    "SIDSTREAM_TRAINER__DPO__BATCH": "32",
    # Three bundles share each batch of requests: with the default of 16 the model gets five at once.
    "SIDSTREAM_SERVING__MAX_BATCH": "64",
    # Answers run ahead of their clicks by a batch's event time. Longer than the attribution window, and on a
    # busy machine clicks come after it closed and are not counted.
    "SIDSTREAM_SHOPPERS__BATCH": "128",
}


def set_environment(seed: int | None) -> None:
    """Put the demo's settings into the environment of this process, and so of every command it runs."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if seed is not None:
        os.environ |= {"SIDSTREAM_SHOPPERS__SEED": str(seed), "SIDSTREAM_TRAINER__SEED": str(seed)}


@dataclass
class Stage:
    """One line of the demo: what it did and how long it took (seconds)."""

    name: str
    seconds: float = 0.0
    detail: str = ""


@dataclass
class Runner:
    """Runs commands as stages and keeps their times."""

    home: Path
    console: Console
    stages: list[Stage] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time a stage and print its line; an error inside names the stage."""
        stage = Stage(name)
        begun = time.monotonic()
        with Live(console=self.console, refresh_per_second=1 / _REFRESH_S, transient=True) as live:
            self._live, self._current, self._begun = live, stage, begun
            self.show("")
            yield stage
        stage.seconds = time.monotonic() - begun
        self.stages.append(stage)
        self.console.print(f"[green]ok[/green] {name:<14} {stage.seconds:5.1f} s  {stage.detail}")

    def show(self, progress: str) -> None:
        """Redraw the line of the stage that runs."""
        if self.console.is_terminal:
            passed = time.monotonic() - self._begun
            self._live.update(Text(f".. {self._current.name:<14} {passed:5.1f} s  {progress}"[:110]))

    def command(self, *arguments: str) -> dict[str, Any]:
        """Run `sidstream ARGUMENTS --json` and return what it printed.

        Raises SidstreamError with the command's own error line and the path of its log.
        """
        logs = self.home / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"demo-{len(self.stages) + 1:02d}-{'-'.join(arguments[:2])}.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "sidstream", *arguments, "--json"],
                stdout=subprocess.PIPE, stderr=stderr, env={**os.environ, "COLUMNS": "100"},
            )  # fmt: skip
            assert process.stdout is not None
            try:
                while process.poll() is None:
                    self.show(_last_line(log))
                    time.sleep(_REFRESH_S)
            except BaseException:
                process.terminate()
                process.wait()
                raise
            output = process.stdout.read().decode()
        if process.returncode != 0:
            said = _last_line(log).removeprefix("error: ") or f"exit code {process.returncode}"
            raise SidstreamError(f"the stage {self._current.name!r} failed: {said} (log: {log})")
        try:
            parsed: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        except (json.JSONDecodeError, IndexError) as error:
            raise SidstreamError(
                f"the stage {self._current.name!r} printed no result: run it again (log: {log})"
            ) from error
        return parsed

    def until(self, ready: Callable[[], str | None], seconds: float, waiting_for: str) -> str:
        """Poll until `ready` returns a text. Raises SidstreamError after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = ready()
            if found is not None:
                return found
            self.show(waiting_for)
            time.sleep(_REFRESH_S)
        raise SidstreamError(
            f"the stage {self._current.name!r} waited {seconds:.0f} s for {waiting_for} in vain: look at "
            f"`sidstream status` and at the logs in {self.home / 'logs'}"
        )


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
