"""Event time: the timestamp below which all events of a partition have arrived, within the lateness."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

# One device with a wrong clock must not close everybody's windows: a time ahead of the wall clock counts
# once so many users have reached it.
AHEAD_USERS: Final = 3
# Users ahead of the wall clock that are kept, the furthest ahead first.
_MAX_AHEAD_USERS: Final = 64


@dataclass
class _TopicProgress:
    last_record_at: float  # monotonic seconds; at first, of the assignment
    newest_ts: int | None = None
    caught_up: bool = False
    ahead: dict[str, int] = field(default_factory=dict)

    def observe(self, user: str, ts: int, wall_ms: int) -> None:
        if ts > wall_ms:
            self.ahead[user] = max(ts, self.ahead.get(user, ts))
            if len(self.ahead) > 2 * _MAX_AHEAD_USERS:
                self.ahead = dict(
                    heapq.nlargest(_MAX_AHEAD_USERS, self.ahead.items(), key=lambda user_ts: user_ts[1])
                )
            if len(self.ahead) < AHEAD_USERS:
                return
            ts = heapq.nlargest(AHEAD_USERS, self.ahead.values())[-1]
        if self.newest_ts is None or ts > self.newest_ts:
            self.newest_ts = ts


@dataclass
class PartitionClock:
    """Watermark of one partition number over the user-keyed topics.

    The smallest of the topics' newest timestamps; a topic that is read to its end and was silent for `idle_s`
    does not hold the others back. When all are silent, time goes on with the wall clock.

    `answer_topics` repeat the times of requests, and a request may come long after the events around it (a
    request of today on a replayed year). They hold time back until they are read, and never move it on.
    """

    topics: Iterable[str]
    idle_s: float
    now: float
    floor: int | None = None
    answer_topics: Iterable[str] = ()
    _progress: dict[str, _TopicProgress] = field(init=False)
    _answer_progress: dict[str, _TopicProgress] = field(init=False)

    def __post_init__(self) -> None:
        self._progress = {topic: _TopicProgress(self.now) for topic in self.topics}
        self._answer_progress = {topic: _TopicProgress(self.now) for topic in self.answer_topics}
        self._started = self.now

    def observe(self, topic: str, user: str, ts: int, now: float, wall_ms: int) -> None:
        """Note one record: its topic, and its event's user and time (ms). `now` is monotonic seconds."""
        state = self._progress.get(topic) or self._answer_progress.get(topic)
        if state is not None:
            state.last_record_at = now
            if state.newest_ts is None or ts > state.newest_ts:
                state.observe(user, ts, wall_ms)

    def observe_lag(self, topic: str, lag: int) -> None:
        """Note how many records of the topic's partition are still to be read."""
        state = self._progress.get(topic) or self._answer_progress.get(topic)
        if state is not None:
            state.caught_up = lag == 0

    def watermark(self, now: float) -> int | None:
        """Milliseconds, never less than before; None: no event came yet. `now` is monotonic seconds."""
        active = [
            t for t in self._progress.values() if not (t.caught_up and now - t.last_record_at >= self.idle_s)
        ]
        newest_times = [t.newest_ts for t in self._progress.values() if t.newest_ts is not None]
        watermark_ms: int | None = None
        unread_answers = [t for t in self._answer_progress.values() if not t.caught_up]
        if active or unread_answers:
            unfinished_times = [t.newest_ts for t in (*active, *unread_answers)]
            # Where only answers are unread, the newest events bound the time.
            limits = unfinished_times if active else [*unfinished_times, *newest_times]
            if limits and None not in limits:
                watermark_ms = min(ts for ts in limits if ts is not None)
        elif newest_times:
            silent = now - max(t.last_record_at for t in self._progress.values())
            watermark_ms = max(newest_times) + int(silent * 1000)
        elif self.floor is not None:
            # No event came since the start: time goes on from the last worker's watermark.
            watermark_ms = self.floor + int((now - self._started) * 1000)
            self._started = now
        if watermark_ms is not None and (self.floor is None or watermark_ms > self.floor):
            self.floor = watermark_ms
        return self.floor
