"""Training, validation and test parts of a data set: leave-one-out, a cut in time, and shards of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from streams.errors import SidstreamError
from trainer.evaluation.sequences import Bool, Int64, SequenceDataset

LEAVE_ONE_OUT = "leave-one-out"
TIME = "time"
SPLITS = (LEAVE_ONE_OUT, TIME)


@dataclass(frozen=True)
class Queries:
    """B items to predict, each from what its user did before it."""

    users: Int64  # (B,) row of SequenceDataset.users
    histories: list[Int64]  # item rows, oldest first; never empty
    targets: Int64  # (B,) item rows
    bought: Bool | None = None  # (B,) whether the target was bought, as in `SequenceDataset`

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, at: Int64) -> Queries:
        """The queries at the places `at` (N,), in that order."""
        bought = None if self.bought is None else self.bought[at]
        return Queries(self.users[at], [self.histories[n] for n in at], self.targets[at], bought)


@dataclass(frozen=True)
class EvaluationSplit:
    """One data set, cut into parts. No target of `valid` or `test` is in `train`."""

    kind: str
    dataset: SequenceDataset
    train: list[Int64]  # item rows of each user of `dataset`; empty for a user who came later
    valid: Queries
    test: Queries
    # Times at which validation and test begin, milliseconds; None for leave-one-out.
    part_starts: tuple[int, int] | None = None
    # For each item of `train`, whether it was bought before the cut: later purchases are unknown in training.
    bought: list[Bool] | None = None

    def train_counts(self) -> Int64:
        """(I,) how often each item occurs in training."""
        return np.bincount(np.concatenate([*self.train, np.zeros(0, np.int64)]), minlength=self.dataset.size)

    def with_train_lengths(self, lengths: Sequence[int]) -> EvaluationSplit:
        """This split in time with the first `lengths` (U,) items of each user as its training part."""
        train = [row[:length] for row, length in zip(self.dataset.items, lengths, strict=True)]
        end = max(
            (int(ts[n - 1]) for ts, n in zip(_times(self.dataset), lengths, strict=True) if n), default=0
        )
        return replace(self, train=train, bought=_bought_before(self.dataset, train, end + 1))


@dataclass(frozen=True)
class TimeShard:
    """A stretch of time: first its queries are answered, then what happened in it may be learned."""

    queries: Queries
    users: Int64  # (U,) users with an event in it, rows of SequenceDataset.users
    histories: list[Int64]  # what each of them did before it
    new_items: list[Int64]  # what each of them did in it

    def new_counts(self, size: int) -> Int64:
        """(size,) how often each item occurs among `new_items`."""
        return np.bincount(np.concatenate([*self.new_items, np.zeros(0, np.int64)]), minlength=size)


def leave_one_out(dataset: SequenceDataset) -> EvaluationSplit:
    """Each user's last item is the test, the one before it validation, the rest training.

    The validation item is history at test. Users of fewer than three items are in training only. It leaks:
    other users' later items are trained on (Ji et al. 2020, arXiv 2010.11060), so it serves the comparison
    with published tables.
    """
    test_users = np.flatnonzero(np.array([len(row) for row in dataset.items], np.int64) >= 3)
    train = [row[:-2] if len(row) >= 3 else row for row in dataset.items]

    def queries(at: int) -> Queries:
        targets = np.array([dataset.items[u][at] for u in test_users], np.int64)
        bought = None
        if dataset.bought is not None:
            bought = np.array([dataset.bought[u][at] for u in test_users], bool)
        return Queries(test_users, [dataset.items[u][:at] for u in test_users], targets, bought)

    train_bought = dataset.bought and [
        flags[: len(row)] for flags, row in zip(dataset.bought, train, strict=True)
    ]
    return EvaluationSplit(LEAVE_ONE_OUT, dataset, train, queries(-2), queries(-1), bought=train_bought)


def cut_times(dataset: SequenceDataset, train: float = 0.8, valid: float = 0.1) -> tuple[int, int]:
    """(t1, t2): about `train` of the events are before t1, and `valid` of them from t1 to before t2."""
    ts = np.sort(np.concatenate(_times(dataset)))
    places = [min(len(ts) - 1, int(len(ts) * share)) for share in (train, train + valid)]
    return int(ts[places[0]]), int(ts[places[1]])


def split_by_time(dataset: SequenceDataset, t1: int | None = None, t2: int | None = None) -> EvaluationSplit:
    """Training before t1, validation from t1 to before t2, test from t2 on; by default 80, 10 and 10 %.

    Every event that follows another one of its user is a target, with all of that user's earlier events as
    history, validation and test ones included. Raises SidstreamError for a set without times.
    """
    first, second = cut_times(dataset)
    t1, t2 = first if t1 is None else t1, second if t2 is None else t2
    if t1 > t2:
        raise SidstreamError(f"t1 is {t1} and t2 is {t2}: validation has to begin before the test does")
    train = [row[: np.searchsorted(ts, t1)] for row, ts in zip(dataset.items, _times(dataset), strict=True)]
    valid, test = _queries_between(dataset, t1, t2), _queries_between(dataset, t2, None)
    return EvaluationSplit(TIME, dataset, train, valid, test, (t1, t2), _bought_before(dataset, train, t1))


def _bought_before(dataset: SequenceDataset, train: list[Int64], end: int) -> list[Bool] | None:
    """For each item of the training part, whether it was bought before `end` (milliseconds)."""
    if dataset.bought is None:
        return None
    when = dataset.bought_ts or [np.full(len(row), -1, np.int64) for row in dataset.bought]
    flags = zip(dataset.bought, when, train, strict=True)
    return [(bought & (at < end))[: len(train_row)] for bought, at, train_row in flags]


def shard_between(dataset: SequenceDataset, low: int, high: int | None) -> TimeShard:
    """What happened from `low` to before `high` (None: to the end)."""
    users, histories, new_items = [], [], []
    for user, (row, ts) in enumerate(zip(dataset.items, _times(dataset), strict=True)):
        begin, end = _span(ts, low, high)
        if end > begin:
            users.append(user)
            histories.append(row[:begin])
            new_items.append(row[begin:end])
    return TimeShard(_queries_between(dataset, low, high), np.array(users, np.int64), histories, new_items)


def time_shards(dataset: SequenceDataset, start: int, count: int) -> Iterator[TimeShard]:
    """The time from `start` on in `count` shards of about as many events each (prequential, Dawid 1984).

    Fewer where there are fewer moments than that.
    """
    later = np.sort(np.concatenate(_times(dataset)))
    later = later[later >= start]
    inner = [int(later[len(later) * n // count]) for n in range(1, count)] if len(later) else []
    edges = sorted({start, *inner})
    for low, high in zip(edges, [*edges[1:], None], strict=True):
        yield shard_between(dataset, low, high)


def _times(dataset: SequenceDataset) -> list[Int64]:
    if dataset.ts is None:
        raise SidstreamError(f"{dataset.name} has no times: give --split {LEAVE_ONE_OUT}")
    return dataset.ts


def _span(ts: Int64, low: int, high: int | None) -> tuple[int, int]:
    """Places of the times in [low, high); None is no bound."""
    return int(np.searchsorted(ts, low)), len(ts) if high is None else int(np.searchsorted(ts, high))


def _queries_between(dataset: SequenceDataset, low: int, high: int | None) -> Queries:
    """Every event of [low, high) that follows another one of its user, by user and then by time."""
    users, histories, targets = [], [], []
    bought_flags: list[bool] = []
    for user, (row, ts) in enumerate(zip(dataset.items, _times(dataset), strict=True)):
        begin, end = _span(ts, low, high)
        for at in range(max(begin, 1), end):
            users.append(user)
            histories.append(row[:at])
            targets.append(int(row[at]))
            bought_flags.append(dataset.bought is not None and bool(dataset.bought[user][at]))
    bought = None if dataset.bought is None else np.array(bought_flags, bool)
    return Queries(np.array(users, np.int64), histories, np.array(targets, np.int64), bought)
