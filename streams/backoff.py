"""Growing waits between tries of something that is away for a while."""

from __future__ import annotations


class Backoff:
    """Waits in seconds: `first_s`, then twice the last one, up to `longest_s`."""

    def __init__(self, first_s: float, longest_s: float = float("inf")) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._next_s = min(first_s, longest_s)

    def next_wait(self) -> float:
        """The wait before the next try; the wait after that is twice as long."""
        wait = self._next_s
        self._next_s = min(2 * wait, self._longest_s)
        return wait

    def reset(self) -> None:
        """Begin with `first_s` again: the last try succeeded, or the next one is for something else."""
        self._next_s = min(self._first_s, self._longest_s)
