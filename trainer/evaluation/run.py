"""Evaluate: fit, list, count; once for each model, seed and mask, on the very same targets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from streams.errors import SidstreamError
from trainer.evaluation.metrics import LONGEST, accuracy, category_entropy, coverage, hit_ranks
from trainer.evaluation.ranker import Learner, Mask, Personal, Progress, Ranker
from trainer.evaluation.sequences import Float64, Int64, same_groups
from trainer.evaluation.splits import Queries, Shard, Split, shards, stretch

BY_SID = " by SID"
# Targets that are told apart, and the metrics that are given of them.
NEW_ITEMS = ", new items"
NEW_USERS = ", new users"
_OF_SLICES = ("HR@10", "NDCG@10")
# Targets that the cost of an answer is taken of.
_TIMED = 512


@dataclass(frozen=True)
class Measured:
    """One model's lists under one mask."""

    model: str
    head: str
    seed: int | None  # None: the mean of several
    mask: Mask
    users: Int64  # (B,) whose answers these are
    rows: dict[
        str, Float64
    ]  # metric -> (B,) a value for each target; NaN where the target is not of its slice
    totals: dict[str, float]  # metric -> one figure of the whole run


def evaluate(
    split: Split, ranker: Ranker, seed: int, masks: Sequence[Mask], progress: Progress, shard_count: int = 0
) -> list[Measured]:
    """One fitted run of a model under every mask.

    `shard_count` above 0: prequential; the test is cut into so many stretches of time, and a model that can
    learn (`Learner`) learns each of them after it has been scored, and the validation time before the first.
    """
    started = time.perf_counter()
    ranker.fit(split, seed, progress)
    fitted = getattr(ranker, "trained_s", time.perf_counter() - started)
    each = _cost(ranker, split.test)
    progress(f"answering {len(split.test):,} targets")
    if shard_count:
        lists, queries = _through_time(ranker, split, masks, shard_count, progress)
    else:
        lists, queries = _at_once(ranker, split.test, masks), split.test
    found = []
    for mask in masks:
        rows, totals = _count(split, ranker, lists[mask], queries)
        totals |= {"seconds of training": fitted, "ms per answer": 1000 * each}
        for metric, attribute in (("parameters", "parameters"), ("invalid rate", "invalid_rate")):
            told = getattr(ranker, attribute, None)
            if told is not None:
                totals[metric] = float(told)
        found.append(Measured(ranker.name, ranker.head, seed, mask, queries.users, rows, totals))
    return found


def with_means(measured: Sequence[Measured]) -> list[Measured]:
    """The runs by model and mask, several seeds followed by their mean."""
    groups: dict[tuple[str, str], list[Measured]] = {}
    for run in measured:
        groups.setdefault((run.model, run.mask), []).append(run)
    return [run for group in groups.values() for run in ([*group, _mean(group)] if len(group) > 1 else group)]


def _cost(ranker: Ranker, queries: Queries) -> float:
    """Seconds an answer, of a few targets that nobody was asked for before: models may keep what they found.

    Never more than half of them: all of them are asked for afterwards.
    """
    few = queries.take(np.arange(min(_TIMED, (len(queries) + 1) // 2)))
    started = time.perf_counter()
    _at_once(ranker, few, ("none",))
    return (time.perf_counter() - started) / max(1, len(few))


def _at_once(ranker: Ranker, queries: Queries, masks: Sequence[Mask]) -> dict[Mask, Int64]:
    """Lists (B, LONGEST) by mask."""
    if isinstance(ranker, Personal):
        return {mask: ranker.rank_for(queries.users, queries.histories, LONGEST, mask) for mask in masks}
    return {mask: ranker.rank(queries.histories, LONGEST, mask) for mask in masks}


def _through_time(
    ranker: Ranker, split: Split, masks: Sequence[Mask], count: int, progress: Progress
) -> tuple[dict[Mask, Int64], Queries]:
    """As `_at_once`, shard after shard of the test."""
    if split.starts is None:
        raise SidstreamError(f"shards are of time, and this split is {split.kind}: give --split time")

    def learn(shard: Shard) -> None:
        if isinstance(ranker, Learner):
            ranker.update(shard)

    learn(stretch(split.data, *split.starts))
    parts: list[tuple[dict[Mask, Int64], Queries]] = []
    for shard in shards(split.data, split.starts[1], count):
        parts.append((_at_once(ranker, shard.queries, masks), shard.queries))
        learn(shard)
        progress(f"shard {len(parts)} of {count}")
    queries = Queries(
        np.concatenate([part[1].users for part in parts]),
        [history for part in parts for history in part[1].histories],
        np.concatenate([part[1].targets for part in parts]),
        None if split.data.bought is None else np.concatenate([part[1].bought for part in parts]),
    )
    lists = {mask: np.concatenate([part[0][mask] for part in parts]) for mask in masks}
    return lists, queries


def _count(
    split: Split, ranker: Ranker, lists: Int64, queries: Queries
) -> tuple[dict[str, Float64], dict[str, float]]:
    """The metrics of lists (B, LONGEST): by target, and of the whole."""
    data = split.data
    rows = accuracy(hit_ranks(lists, queries.targets))
    for slice_name, at in (
        (NEW_ITEMS, split.train_counts()[queries.targets] == 0),
        (NEW_USERS, np.array([not len(split.train[user]) for user in queries.users], np.bool_)),
    ):
        if at.any():
            rows |= {metric + slice_name: np.where(at, rows[metric], np.nan) for metric in _OF_SLICES}
    own = getattr(ranker, "sids", None)
    sids = data.sids if own is None else own
    if sids is not None:
        by_sid = accuracy(hit_ranks(lists, queries.targets, same_groups(sids)))
        rows |= {metric + BY_SID: values for metric, values in by_sid.items()}
    if data.categories is not None:
        rows["category entropy@10"] = category_entropy(lists, data.categories)
    return rows, {"coverage@10": coverage(lists, data.size)}


def _mean(runs: Sequence[Measured]) -> Measured:
    """The mean over seeds of every target's values, so that its interval is one over users."""
    first = runs[0]

    def mean(of: Callable[[Measured], dict[str, float]]) -> dict[str, float]:
        return {name: float(np.mean([of(run)[name] for run in runs])) for name in of(first)}

    rows = {name: np.mean([run.rows[name] for run in runs], axis=0) for name in first.rows}
    totals = mean(lambda run: run.totals)
    totals["NDCG@10, deviation of seeds"] = float(
        np.std([run.rows["NDCG@10"].mean() for run in runs], ddof=1) if len(first.users) else np.nan
    )
    return Measured(first.model, first.head, None, first.mask, first.users, rows, totals)
