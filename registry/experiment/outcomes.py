"""Outcomes of a trial: impressions, clicks and orders by arm, user and cohort, which the agents sum in Redis.

A cohort holds the requests whose first event lies within one interval of event time, with the clicks and
orders that followed. It is mature when no more of them can follow, by the attribution window and the allowed
lateness. Only mature cohorts are compared, so that no arm is judged by clicks whose orders are still to come.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from streams.errors import SidstreamError
from streams.state import keys

# Keys of one round trip.
_KEYS_PER_TRIP: Final = 1000
# Above the number of every cohort.
_NO_LIMIT: Final = 2**62
_COUNT_COLUMNS: Final = {"i": 0, "c": 1, "o": 2}
# The letter of the sums that are a gate's `value`, in hundredths of the currency.
_VALUE_LETTERS: Final = {"revenue": "r", "commission": "m"}
_TEXT_FIELDS: Final = frozenset(("arm", "bundle"))
_RULE_FIELDS: Final = ("window_ms", "lateness_ms", "cohort_ms", "partitions")


@dataclass(frozen=True, eq=False)
class ArmOutcomes:
    """The outcomes of one arm.

    `cohorts`: numbers, ascending, the same for every arm of a trial (anchor_ts_ms // cohort_ms).
    `counts`: int64 (users, cohorts, 3), impressions, clicks and orders; users in the order of their keys. A
    fourth column, where `gate.value` asks for it, is the orders' revenue or commission (hundredths).
    """

    cohorts: tuple[int, ...]
    counts: npt.NDArray[np.int64]

    def total(self) -> npt.NDArray[np.int64]:
        """Sums over the cohorts, int64 (users, 3 or 4); users without an impression are left out."""
        total: npt.NDArray[np.int64] = self.counts.sum(axis=1, dtype=np.int64)
        return total[total[:, 0] > 0]

    def up_to(self, cohort: int) -> ArmOutcomes:
        """The outcomes of the cohorts up to and including `cohort`."""
        count = bisect_right(self.cohorts, cohort)
        return ArmOutcomes(self.cohorts[:count], self.counts[:, :count])

    def capped(self, max_impressions: int) -> ArmOutcomes:
        """Each user's cohorts in the order of time as long as they come to `max_impressions` at most.

        The cohort that would pass it and all later ones of that user become zero, so a bot counts as one
        heavy user. The rule reads impressions alone, never clicks or orders, and is the same for every arm:
        what is counted of a user is no better and no worse for having been counted. What is compared are
        rates over users' first impressions, so that a user above the limit weighs as one at it.
        """
        is_counted = np.cumsum(self.counts[:, :, 0], axis=1) <= max_impressions
        return ArmOutcomes(self.cohorts, self.counts * is_counted[:, :, None])


def cohort_ms(redis: Any) -> int:
    """Length of a cohort (ms), as the agents have stored it; an hour where they have stored none."""
    stored = redis.hget(keys.outcomes_rules(), "cohort_ms")
    return 3_600_000 if stored is None else int(stored)


def mature_until(redis: Any) -> int | None:
    """The first cohort that is not mature; None where no cohort can be mature yet.

    Cohort c is mature once every partition's watermark reached (c + 1) cohort_ms + window_ms + lateness_ms.
    While workers run and all is read, the watermark of a silent partition advances with the wall clock: after
    the last event of a stream a cohort takes its own length of real time to mature, also where the stream was
    a year replayed in minutes. A partition that a worker has taken, with neither a watermark nor an open
    request, delays no cohort: none of its users has been counted. A partition that no worker has taken makes
    every cohort wait, since it may be full of events.
    """
    stored = redis.hmget(keys.outcomes_rules(), _RULE_FIELDS)
    if None in stored:
        return None
    window_ms, lateness_ms, cohort_ms, partitions = (int(value) for value in stored)
    pipeline = redis.pipeline(transaction=False)
    for partition in range(partitions):
        pipeline.hmget(keys.clock(partition), ("outcomes", "incarnations"))
        pipeline.exists(keys.due("outcomes", partition))
    replies = pipeline.execute()
    watermarks = []
    for (watermark, incarnations), has_open_requests in zip(replies[::2], replies[1::2], strict=True):
        if watermark is not None:
            watermarks.append(int(watermark))
        elif incarnations is None or has_open_requests:
            return None
    if not watermarks:
        return None
    return max(0, (min(watermarks) - window_ms - lateness_ms) // cohort_ms)


def read_all_outcomes(
    redis: Any, step_id: str, value: str = "none"
) -> tuple[dict[str, ArmOutcomes], dict[str, ArmOutcomes]]:
    """A step's outcomes by arm, of its mature cohorts and of all cohorts. Raises as `read_outcomes`."""
    # Read before the sums: a cohort that is mature now stays mature.
    until = mature_until(redis)
    of_all = _read(redis, step_id, value, _NO_LIMIT)
    if until is None:
        return {}, of_all
    of_mature = ((arm, outcomes.up_to(until - 1)) for arm, outcomes in of_all.items())
    return {arm: outcomes for arm, outcomes in of_mature if outcomes.counts.any()}, of_all


def read_outcomes(redis: Any, step_id: str, value: str = "none") -> dict[str, ArmOutcomes]:
    """The outcomes of the mature cohorts of a step, by arm; empty where no cohort is mature.

    `redis` is a redis-py client that answers bytes or text, `value` is that of the gate: none, revenue or
    commission. Memory: 24 bytes a user and cohort, 32 with a value. Raises
    SidstreamError for a hash with a number that is not whole, or is below 0.
    """
    # Read before the sums: a cohort that is mature now stays mature, and the sums hold all of its events.
    until = mature_until(redis)
    return {} if until is None else _read(redis, step_id, value, until)


def _read(redis: Any, step_id: str, value: str, until: int) -> dict[str, ArmOutcomes]:
    """The outcomes of the cohorts below `until`, by arm."""
    arms: dict[str, _ArmRows] = {}
    columns = dict(_COUNT_COLUMNS)
    if value in _VALUE_LETTERS:
        columns[_VALUE_LETTERS[value]] = len(columns)
    parsed: dict[bytes | str, tuple[int, int] | None] = {}
    # SCAN may return a key twice; a user counts once. Sorted: the same sums give the same arrays everywhere.
    names = sorted(set(redis.scan_iter(match=keys.sums_pattern(step_id), count=_KEYS_PER_TRIP)))
    for name, stored in _hashes(redis, names):
        arm = stored.get(b"arm", stored.get("arm"))
        if arm is None:
            continue
        rows = arms.setdefault(_text(arm), _ArmRows(len(columns)))
        size_before = len(rows.users)
        try:
            for field, value in stored.items():
                if field not in parsed:
                    parsed[field] = _parse(_text(field), columns)
                cohort_and_column = parsed[field]
                if cohort_and_column is not None and cohort_and_column[0] < until:
                    rows.add(*cohort_and_column, int(value))
        except ValueError as error:
            # The key ends with the user's id, which no message may show.
            raise SidstreamError(
                f"trial {step_id} has sums that are no whole numbers by cohort ({error}), in a Redis key "
                f"whose name hashes to {keys.anonymous_user(_text(name))}; delete that key, or, where an "
                "older sidstream wrote it, replay the topics into an empty Redis"
            ) from error
        rows.count += len(rows.users) > size_before
    cohorts = sorted({cohort for rows in arms.values() for cohort in rows.cohorts})
    return {arm: rows.outcomes(cohorts) for arm, rows in sorted(arms.items()) if rows.count}


class _ArmRows:
    """The numbers of one arm's users, one entry each; `count`: users so far."""

    def __init__(self, column_count: int) -> None:
        self.count = 0
        self._column_count = column_count
        self.users: list[int] = []
        self.cohorts: list[int] = []
        self.columns: list[int] = []
        self.numbers: list[int] = []

    def add(self, cohort: int, column: int, number: int) -> None:
        if number < 0:
            raise ValueError(f"{number} is below 0")
        self.users.append(self.count)
        self.cohorts.append(cohort)
        self.columns.append(column)
        self.numbers.append(number)

    def outcomes(self, cohorts: Sequence[int]) -> ArmOutcomes:
        counts = np.zeros((self.count, len(cohorts), self._column_count), dtype=np.int64)
        counts[self.users, np.searchsorted(cohorts, self.cohorts), self.columns] = self.numbers
        return ArmOutcomes(tuple(cohorts), counts)


def _hashes(redis: Any, names: Sequence[bytes | str]) -> Iterator[tuple[bytes | str, dict[Any, Any]]]:
    for begin in range(0, len(names), _KEYS_PER_TRIP):
        batch = names[begin : begin + _KEYS_PER_TRIP]
        pipeline = redis.pipeline(transaction=False)
        for name in batch:
            pipeline.hgetall(name)
        yield from zip(batch, pipeline.execute(), strict=True)


def _parse(name: str, columns: Mapping[str, int]) -> tuple[int, int] | None:
    """(cohort, column) of a number's field; None for a text field and for a sum that no column is for.

    Raises ValueError for other fields.
    """
    if name in _TEXT_FIELDS:
        return None
    cohort, _, letter = name.partition(":")
    if letter not in columns:
        if letter in _VALUE_LETTERS.values():
            return None
        raise ValueError(f"field {name!r}")
    return int(cohort), columns[letter]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
