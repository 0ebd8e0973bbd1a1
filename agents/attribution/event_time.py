"""Event time: below which timestamp a partition's events have all arrived, give or take the lateness."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

# One device with a wrong clock must not close everybody's windows: a time ahead of the wall clock counts
# once so many users have reached it.
AHEAD_USERS: Final = 3
# Users ahead of the wall clock that are remembered, the furthest ahead first.
_AHEAD_KEPT: Final = 64


@dataclass
class _Topic:
    seen_at: float  # monotonic s of the newest record, or of the assignment
    newest_ts: int | None = None
    caught_up: bool = False
    ahead: dict[str, int] = field(default_factory=dict)

    def see(self, user: str, ts: int, wall_ms: int) -> None:
        if ts > wall_ms:
            self.ahead[user] = max(ts, self.ahead.get(user, ts))
            if len(self.ahead) > 2 * _AHEAD_KEPT:
                self.ahead = dict(heapq.nlargest(_AHEAD_KEPT, self.ahead.items(), key=lambda kept: kept[1]))
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

    `answers` are topics whose times are those of requests, which may be made at any time about any other (a
    person asks today on a replayed year). They hold time back until they are read, and never move it on.
    """

    topics: Iterable[str]
    idle_s: float
    now: float
    floor: int | None = None
    answers: Iterable[str] = ()
    _topics: dict[str, _Topic] = field(init=False)
    _answers: dict[str, _Topic] = field(init=False)

    def __post_init__(self) -> None:
        self._topics = {topic: _Topic(self.now) for topic in self.topics}
        self._answers = {topic: _Topic(self.now) for topic in self.answers}
        self._started = self.now

    def observe(self, topic: str, user: str, ts: int, now: float, wall_ms: int) -> None:
        """A record came: its event's user and time (ms)."""
        state = self._topics.get(topic) or self._answers.get(topic)
        if state is not None:
            state.seen_at = now
            if state.newest_ts is None or ts > state.newest_ts:
                state.see(user, ts, wall_ms)

    def position(self, topic: str, lag: int) -> None:
        """How many records of the topic's partition are still to be read."""
        state = self._topics.get(topic) or self._answers.get(topic)
        if state is not None:
            state.caught_up = lag == 0

    def watermark(self, now: float) -> int | None:
        """Milliseconds, never less than before; None: nothing is known yet. `now` is monotonic seconds."""
        active = [t for t in self._topics.values() if not (t.caught_up and now - t.seen_at >= self.idle_s)]
        known = [t.newest_ts for t in self._topics.values() if t.newest_ts is not None]
        reached: int | None = None
        unread = [t for t in self._answers.values() if not t.caught_up]
        if active or unread:
            held = [t.newest_ts for t in (*active, *unread)]
            # Only answers left to read: events say how far time is.
            limits = held if active else [*held, *known]
            if limits and None not in limits:
                reached = min(ts for ts in limits if ts is not None)
        elif known:
            silent = now - max(t.seen_at for t in self._topics.values())
            reached = max(known) + int(silent * 1000)
        elif self.floor is not None:
            # Nothing came since the start: time goes on from where the last worker left it.
            reached = self.floor + int((now - self._started) * 1000)
            self._started = now
        if reached is not None and (self.floor is None or reached > self.floor):
            self.floor = reached
        return self.floor
