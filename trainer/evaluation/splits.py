"""What is learned from and what is predicted: leave-one-out, a cut in time, and shard after shard of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from streams.errors import SidstreamError
from trainer.evaluation.sequences import Bool, Int64, Sequences

LEAVE_ONE_OUT = "leave-one-out"
TIME = "time"
SPLITS = (LEAVE_ONE_OUT, TIME)


@dataclass(frozen=True)
class Queries:
    """B items to be predicted, each from what its user did before it."""

    users: Int64  # (B,) row of Sequences.users
    histories: list[Int64]  # item rows, oldest first; never empty
    targets: Int64  # (B,) item rows
    bought: Bool | None = None  # (B,) whether the target was bought, as in `Sequences`

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, at: Int64) -> Queries:
        """The queries of these places (N,), in their order."""
        bought = None if self.bought is None else self.bought[at]
        return Queries(self.users[at], [self.histories[n] for n in at], self.targets[at], bought)


@dataclass(frozen=True)
class Split:
    """One data set, cut. Nothing of `valid` or `test` targets is in `train`."""

    kind: str
    data: Sequences
    train: list[Int64]  # per user of `data`; empty for a user who came later
    valid: Queries
    test: Queries
    starts: tuple[int, int] | None = None  # when validation and test begin, where the cut is one in time
    # Of `train`: what was bought before the cut. A purchase of the future is no mark of the past.
    bought: list[Bool] | None = None

    def train_counts(self) -> Int64:
        """(I,) how often each item occurs in training."""
        return np.bincount(np.concatenate([*self.train, np.zeros(0, np.int64)]), minlength=self.data.size)

    def until(self, lengths: Sequence[int]) -> Split:
        """This split of a log with times, with so many of each user's items as its training part."""
        train = [row[:length] for row, length in zip(self.data.items, lengths, strict=True)]
        end = max((int(ts[n - 1]) for ts, n in zip(_times(self.data), lengths, strict=True) if n), default=0)
        return replace(self, train=train, bought=_bought_before(self.data, train, end + 1))


@dataclass(frozen=True)
class Shard:
    """A stretch of time: first its queries are answered, then what happened in it may be learned."""

    queries: Queries
    users: Int64  # (U',) who did something in it, rows of Sequences.users
    histories: list[Int64]  # what each of them did before
    fresh: list[Int64]  # and what in it


def leave_one_out(data: Sequences) -> Split:
    """Each user's last item is the test, the one before it validation, the rest training.

    The validation item is history at test. Users of fewer than three items are in training only. It leaks:
    other users' later items are trained on (Ji et al. 2020, arXiv 2010.11060), so it serves the comparison
    with published tables.
    """
    tested = np.flatnonzero(np.array([len(row) for row in data.items], np.int64) >= 3)
    train = [row[:-2] if len(row) >= 3 else row for row in data.items]

    def queries(at: int) -> Queries:
        targets = np.array([data.items[u][at] for u in tested], np.int64)
        marks = None if data.bought is None else np.array([data.bought[u][at] for u in tested], bool)
        return Queries(tested, [data.items[u][:at] for u in tested], targets, marks)

    marks = data.bought and [row[: len(kept)] for row, kept in zip(data.bought, train, strict=True)]
    return Split(LEAVE_ONE_OUT, data, train, queries(-2), queries(-1), bought=marks)


def cut_times(data: Sequences, train: float = 0.8, valid: float = 0.1) -> tuple[int, int]:
    """(t1, t2): about `train` of the events are before t1, and `valid` of them from t1 to before t2."""
    ts = np.sort(np.concatenate(_times(data)))
    places = [min(len(ts) - 1, int(len(ts) * share)) for share in (train, train + valid)]
    return int(ts[places[0]]), int(ts[places[1]])


def by_time(data: Sequences, t1: int | None = None, t2: int | None = None) -> Split:
    """Training before t1, validation from t1 to before t2, test from t2 on; by default 80, 10 and 10 %.

    Every event that follows another one of its user is a target, with all of that user's earlier events as
    history, validation and test ones included. Raises SidstreamError for a set without times.
    """
    first, second = cut_times(data)
    t1, t2 = first if t1 is None else t1, second if t2 is None else t2
    if t1 > t2:
        raise SidstreamError(f"t1 is {t1} and t2 is {t2}: validation has to begin before the test does")
    train = [row[: np.searchsorted(ts, t1)] for row, ts in zip(data.items, _times(data), strict=True)]
    valid, test = _between(data, t1, t2), _between(data, t2, None)
    return Split(TIME, data, train, valid, test, (t1, t2), _bought_before(data, train, t1))


def _bought_before(data: Sequences, train: list[Int64], end: int) -> list[Bool] | None:
    """Of the training part: what was bought before `end`."""
    if data.bought is None:
        return None
    when = data.bought_ts or [np.full(len(row), -1, np.int64) for row in data.bought]
    marks = zip(data.bought, when, train, strict=True)
    return [(bought & (at < end))[: len(kept)] for bought, at, kept in marks]


def stretch(data: Sequences, low: int, high: int | None) -> Shard:
    """What happened from `low` to before `high` (None: to the end)."""
    users, histories, fresh = [], [], []
    for user, (row, ts) in enumerate(zip(data.items, _times(data), strict=True)):
        begin, end = _span(ts, low, high)
        if end > begin:
            users.append(user)
            histories.append(row[:begin])
            fresh.append(row[begin:end])
    return Shard(_between(data, low, high), np.array(users, np.int64), histories, fresh)


def shards(data: Sequences, start: int, count: int) -> Iterator[Shard]:
    """The time from `start` on in `count` shards of about as many events each (prequential, Dawid 1984).

    Fewer where there are fewer moments than that.
    """
    later = np.sort(np.concatenate(_times(data)))
    later = later[later >= start]
    inner = [int(later[len(later) * n // count]) for n in range(1, count)] if len(later) else []
    edges = sorted({start, *inner})
    for low, high in zip(edges, [*edges[1:], None], strict=True):
        yield stretch(data, low, high)


def _times(data: Sequences) -> list[Int64]:
    if data.ts is None:
        raise SidstreamError(f"{data.name} has no times: give --split {LEAVE_ONE_OUT}")
    return data.ts


def _span(ts: Int64, low: int, high: int | None) -> tuple[int, int]:
    """Places of the times in [low, high); None is no bound."""
    return int(np.searchsorted(ts, low)), len(ts) if high is None else int(np.searchsorted(ts, high))


def _between(data: Sequences, low: int, high: int | None) -> Queries:
    """Every event of [low, high) that follows another one of its user, by user and then by time."""
    users, histories, targets = [], [], []
    marks: list[bool] = []
    for user, (row, ts) in enumerate(zip(data.items, _times(data), strict=True)):
        begin, end = _span(ts, low, high)
        for at in range(max(begin, 1), end):
            users.append(user)
            histories.append(row[:at])
            targets.append(int(row[at]))
            marks.append(data.bought is not None and bool(data.bought[user][at]))
    bought = None if data.bought is None else np.array(marks, bool)
    return Queries(np.array(users, np.int64), histories, np.array(targets, np.int64), bought)
