"""Waits double from the first to the longest, and begin again after a success."""

from __future__ import annotations

from streams.backoff import Backoff


def test_waits_double_up_to_the_longest_and_begin_again_after_a_reset() -> None:
    backoff = Backoff(0.5, 3.0)
    assert [backoff.next_wait() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    backoff.reset()
    assert [backoff.next_wait() for _ in range(2)] == [0.5, 1.0]


def test_the_longest_wait_also_bounds_the_first() -> None:
    assert [Backoff(5.0, 2.0).next_wait()] == [2.0]
