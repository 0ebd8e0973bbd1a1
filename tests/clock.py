"""A clock that tests set."""

from __future__ import annotations


class Clock:
    """Seconds that pass when told so: `clock.now += 2`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
