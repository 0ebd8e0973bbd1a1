"""Printing for commands: progress on stderr, results on stdout, one line for an error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
# Pause between two lines of progress in a file: enough to see that the command goes on.
_EVERY_S = 60.0


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a command's result: one line of JSON where a program reads it, else `text`."""
    if as_json:
        sys.stdout.write(json.dumps(result, default=str) + "\n")
    else:
        out.print(text, markup=False)


@contextmanager
def status(text: str, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[str], None]]:
    """Show on stderr what runs now; yields `show(text)`. In a file or a pipe: at most one line a minute."""
    if err.is_terminal:
        with err.status(text) as spinner:
            yield spinner.update
        return
    printed_at = clock()

    def print_at_most_once_a_minute(now: str) -> None:
        nonlocal printed_at
        if clock() - printed_at >= _EVERY_S:
            printed_at = clock()
            err.print(now, markup=False)

    yield print_at_most_once_a_minute


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Any]:
    """A progress bar on stderr; yields `advance(n)`."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=err, transient=not err.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(label, total=total)

        def advance(n: int = 1) -> None:
            bar.advance(task, n)

        yield advance
