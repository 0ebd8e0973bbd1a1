"""What a trial has seen: sums by arm, user and cohort, which the agents keep in Redis.

A cohort holds the requests that were first seen within one stretch of event time, with the clicks and orders
that followed. It is mature when no more can follow within the attribution window and the allowed lateness;
only mature cohorts are compared, so that no arm is judged by clicks whose orders are still to come.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from streams.errors import SidstreamError
from streams.state import keys

# Keys a round trip.
_BATCH: Final = 1000
# Beyond every cohort.
_ALL: Final = 2**62
_KINDS: Final = {"i": 0, "c": 1, "o": 2}
_NAMES: Final = frozenset(("arm", "bundle"))
_RULES: Final = ("window_ms", "lateness_ms", "cohort_ms", "partitions")


@dataclass(frozen=True, eq=False)
class Seen:
    """What the mature cohorts of one arm hold.

    `cohorts`: numbers, ascending, the same for every arm of a trial (anchor_ts_ms // cohort_ms).
    `counts`: int64 (users, cohorts, 3), impressions, clicks and orders; users in the order of their keys.
    """

    cohorts: tuple[int, ...]
    counts: npt.NDArray[np.int64]

    def total(self) -> npt.NDArray[np.int64]:
        """int64 (users, 3) over the cohorts; users without an impression in them are left out."""
        total: npt.NDArray[np.int64] = self.counts.sum(axis=1, dtype=np.int64)
        return total[total[:, 0] > 0]

    def upto(self, cohort: int) -> Seen:
        """The cohorts up to and with that one."""
        count = bisect_right(self.cohorts, cohort)
        return Seen(self.cohorts[:count], self.counts[:, :count])


def cohort_ms(redis: Any) -> int:
    """Length of a cohort (ms), as the agents told it; an hour where they told nothing yet."""
    stored = redis.hget(keys.outcomes_rules(), "cohort_ms")
    return 3_600_000 if stored is None else int(stored)


def mature_until(redis: Any) -> int | None:
    """The first cohort that is not mature; None where nothing is known.

    Cohort c is mature once every partition's watermark reached (c + 1) cohort_ms + window_ms + lateness_ms.
    While workers run and all is read, the watermark of a silent partition goes on with the wall clock: after
    the last event of a stream a cohort takes its own length of real time to mature, also where the stream was
    a year replayed in minutes. A partition that a worker has taken, and that has neither a watermark nor an
    open request, holds nothing back: no user of its has been counted. One that no worker has taken holds
    back all, for it may be full of events.
    """
    stored = redis.hmget(keys.outcomes_rules(), _RULES)
    if None in stored:
        return None
    window_ms, lateness_ms, cohort_ms, partitions = (int(value) for value in stored)
    pipeline = redis.pipeline(transaction=False)
    for partition in range(partitions):
        pipeline.hmget(keys.clock(partition), ("outcomes", "incarnations"))
        pipeline.exists(keys.due("outcomes", partition))
    found = pipeline.execute()
    watermarks = []
    for (watermark, taken), waiting in zip(found[::2], found[1::2], strict=True):
        if watermark is not None:
            watermarks.append(int(watermark))
        elif taken is None or waiting:
            return None
    if not watermarks:
        return None
    return max(0, (min(watermarks) - window_ms - lateness_ms) // cohort_ms)


def read_all_outcomes(redis: Any, trial: str) -> tuple[dict[str, Seen], dict[str, Seen]]:
    """By arm: what the mature cohorts of a trial hold, and what all of them do. Raises as `read_outcomes`."""
    # First, as there: what is mature now stays so.
    until = mature_until(redis)
    every = _read(redis, trial, _ALL)
    if until is None:
        return {}, every
    mature = ((arm, seen.upto(until - 1)) for arm, seen in every.items())
    return {arm: seen for arm, seen in mature if seen.counts.any()}, every


def read_outcomes(redis: Any, trial: str) -> dict[str, Seen]:
    """What the mature cohorts of a trial hold, by arm; empty where none is mature.

    `redis` is a redis-py client that answers bytes or text. Memory: 24 bytes a user and cohort. Raises
    SidstreamError for a hash that does not hold whole numbers, none below 0, by cohort.
    """
    # First: what is mature now stays so, and the sums that are read later hold all of it.
    until = mature_until(redis)
    return {} if until is None else _read(redis, trial, until)


def _read(redis: Any, trial: str, until: int) -> dict[str, Seen]:
    """What cohorts below `until` hold, by arm."""
    arms: dict[str, _Rows] = {}
    parsed: dict[bytes | str, tuple[int, int] | None] = {}
    # SCAN may name a key twice; a user counts once. Sorted: the same sums are the same arrays everywhere.
    names = sorted(set(redis.scan_iter(match=keys.sums_pattern(trial), count=_BATCH)))
    for name, stored in _hashes(redis, names):
        arm = stored.get(b"arm", stored.get("arm"))
        if arm is None:
            continue
        rows = arms.setdefault(_text(arm), _Rows())
        filled = len(rows.users)
        try:
            for field, value in stored.items():
                if field not in parsed:
                    parsed[field] = _parse(_text(field))
                place = parsed[field]
                if place is not None and place[0] < until:
                    rows.add(*place, int(value))
        except ValueError as error:
            # The key ends with the user's id, which no message may show.
            raise SidstreamError(
                f"trial {trial} has sums that are no whole numbers by cohort ({error}), in a Redis key whose "
                f"name hashes to {keys.anonymous_user(_text(name))}; delete that key, or, where an older "
                "sidstream wrote it, replay the topics into an empty Redis"
            ) from error
        rows.count += len(rows.users) > filled
    every = sorted({cohort for rows in arms.values() for cohort in rows.cohorts})
    return {arm: rows.seen(every) for arm, rows in sorted(arms.items()) if rows.count}


class _Rows:
    """The mature numbers of one arm's users, one entry each; `count`: users so far."""

    def __init__(self) -> None:
        self.count = 0
        self.users: list[int] = []
        self.cohorts: list[int] = []
        self.kinds: list[int] = []
        self.numbers: list[int] = []

    def add(self, cohort: int, kind: int, number: int) -> None:
        if number < 0:
            raise ValueError(f"{number} is below 0")
        self.users.append(self.count)
        self.cohorts.append(cohort)
        self.kinds.append(kind)
        self.numbers.append(number)

    def seen(self, cohorts: Sequence[int]) -> Seen:
        counts = np.zeros((self.count, len(cohorts), 3), dtype=np.int64)
        counts[self.users, np.searchsorted(cohorts, self.cohorts), self.kinds] = self.numbers
        return Seen(tuple(cohorts), counts)


def _hashes(redis: Any, names: Sequence[bytes | str]) -> Iterator[tuple[bytes | str, dict[Any, Any]]]:
    for begin in range(0, len(names), _BATCH):
        some = names[begin : begin + _BATCH]
        pipeline = redis.pipeline(transaction=False)
        for name in some:
            pipeline.hgetall(name)
        yield from zip(some, pipeline.execute(), strict=True)


def _parse(name: str) -> tuple[int, int] | None:
    """(cohort, kind) of a number's field; None for what is no number. Raises ValueError for others."""
    if name in _NAMES:
        return None
    cohort, _, kind = name.partition(":")
    if kind not in _KINDS:
        raise ValueError(f"field {name!r}")
    return int(cohort), _KINDS[kind]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
