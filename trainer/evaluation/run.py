"""One evaluation run: fit a model, rank the items, measure the lists, on the same targets for every model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from streams.errors import SidstreamError
from trainer.evaluation.metrics import LONGEST_LIST, accuracy, category_entropy, coverage, target_ranks
from trainer.evaluation.ranker import Mask, Progress, Ranker, UpdatableRanker, UserAwareRanker
from trainer.evaluation.sequences import Float64, Int64, sid_groups
from trainer.evaluation.splits import EvaluationSplit, Queries, TimeShard, shard_between, time_shards

BY_SID = " by SID"
# Slices of the targets that are also measured on their own, and the metrics of a slice.
NEW_ITEMS = ", new items"
NEW_USERS = ", new users"
_OF_SLICES = ("HR@10", "NDCG@10")
# Targets on which the seconds of one answer are measured.
_TIMED_TARGETS = 512


@dataclass(frozen=True)
class MeasuredRun:
    """The metrics of one model's lists under one mask."""

    model: str
    head: str
    seed: int | None  # None: the mean of several
    mask: Mask
    users: Int64  # (B,) the user of each target
    target_metrics: dict[
        str, Float64
    ]  # metric -> (B,) a value for each target; NaN where the target is not of its slice
    run_metrics: dict[str, float]  # metric -> one figure of the whole run
    # Of the mean of several seeds: the runs that it is of.
    seed_runs: tuple[MeasuredRun, ...] = ()


def evaluate_ranker(
    split: EvaluationSplit,
    ranker: Ranker,
    seed: int,
    masks: Sequence[Mask],
    progress: Progress,
    shard_count: int = 0,
) -> list[MeasuredRun]:
    """One fitted run of a model under every mask.

    `shard_count` above 0: prequential; the test is cut into so many stretches of time, and a model that can
    learn (`Learner`) learns each of them after it has been scored, and the validation time before the first.
    """
    # On the processor: what a model costs does not depend on what else the machine does.
    started = time.process_time()
    ranker.fit(split, seed, progress)
    fit_seconds = getattr(ranker, "trained_s", time.process_time() - started)
    answer_seconds = _seconds_per_answer(ranker, split.test)
    progress(f"answering {len(split.test):,} targets")
    if shard_count:
        lists, queries = _rank_shard_by_shard(ranker, split, masks, shard_count, progress)
    else:
        lists, queries = _rank_lists(ranker, split.test, masks), split.test
    runs = []
    for mask in masks:
        rows, totals = _measure_lists(split, ranker, lists[mask], queries)
        totals |= {"CPU seconds of training": fit_seconds, "ms per answer": 1000 * answer_seconds}
        for metric, attribute in (("parameters", "parameters"), ("invalid rate", "invalid_rate")):
            value = getattr(ranker, attribute, None)
            if value is not None:
                totals[metric] = float(value)
        runs.append(MeasuredRun(ranker.name, ranker.head, seed, mask, queries.users, rows, totals))
    return runs


def with_means(measured: Sequence[MeasuredRun]) -> list[MeasuredRun]:
    """The runs by model and mask, several seeds followed by their mean."""
    groups: dict[tuple[str, str], list[MeasuredRun]] = {}
    for run in measured:
        groups.setdefault((run.model, run.mask), []).append(run)
    return [run for group in groups.values() for run in ([*group, _mean(group)] if len(group) > 1 else group)]


def _seconds_per_answer(ranker: Ranker, queries: Queries) -> float:
    """Seconds of one answer on the processor, over a few targets that were not ranked before: models may
    cache lists.

    Never more than half of the targets: all of them are ranked afterwards.
    """
    timed_queries = queries.take(np.arange(min(_TIMED_TARGETS, (len(queries) + 1) // 2)))
    started = time.process_time()
    _rank_lists(ranker, timed_queries, ("none",))
    return (time.process_time() - started) / max(1, len(timed_queries))


def _rank_lists(ranker: Ranker, queries: Queries, masks: Sequence[Mask]) -> dict[Mask, Int64]:
    """Lists (B, LONGEST) by mask."""
    if isinstance(ranker, UserAwareRanker):
        return {mask: ranker.rank_for(queries.users, queries.histories, LONGEST_LIST, mask) for mask in masks}
    return {mask: ranker.rank(queries.histories, LONGEST_LIST, mask) for mask in masks}


def _rank_shard_by_shard(
    ranker: Ranker, split: EvaluationSplit, masks: Sequence[Mask], count: int, progress: Progress
) -> tuple[dict[Mask, Int64], Queries]:
    """As `_rank_lists`, shard after shard of the test."""
    if split.part_starts is None:
        raise SidstreamError(f"shards are of time, and this split is {split.kind}: give --split time")

    def learn(shard: TimeShard) -> None:
        if isinstance(ranker, UpdatableRanker):
            ranker.update(shard)

    learn(shard_between(split.dataset, *split.part_starts))
    parts: list[tuple[dict[Mask, Int64], Queries]] = []
    for shard in time_shards(split.dataset, split.part_starts[1], count):
        parts.append((_rank_lists(ranker, shard.queries, masks), shard.queries))
        learn(shard)
        progress(f"shard {len(parts)} of {count}")
    queries = Queries(
        np.concatenate([part[1].users for part in parts]),
        [history for part in parts for history in part[1].histories],
        np.concatenate([part[1].targets for part in parts]),
        None if split.dataset.bought is None else np.concatenate([part[1].bought for part in parts]),
    )
    lists = {mask: np.concatenate([part[0][mask] for part in parts]) for mask in masks}
    return lists, queries


def _measure_lists(
    split: EvaluationSplit, ranker: Ranker, lists: Int64, queries: Queries
) -> tuple[dict[str, Float64], dict[str, float]]:
    """The metrics of lists (B, LONGEST): by target, and of the whole."""
    dataset = split.dataset
    rows = accuracy(target_ranks(lists, queries.targets))
    for slice_name, is_member in (
        (NEW_ITEMS, split.train_counts()[queries.targets] == 0),
        (NEW_USERS, np.array([not len(split.train[user]) for user in queries.users], np.bool_)),
    ):
        if is_member.any():
            rows |= {metric + slice_name: np.where(is_member, rows[metric], np.nan) for metric in _OF_SLICES}
    ranker_sids = getattr(ranker, "sids", None)
    sids = dataset.sids if ranker_sids is None else ranker_sids
    if sids is not None:
        by_sid = accuracy(target_ranks(lists, queries.targets, sid_groups(sids)))
        rows |= {metric + BY_SID: values for metric, values in by_sid.items()}
    if dataset.categories is not None:
        rows["category entropy@10"] = category_entropy(lists, dataset.categories)
    return rows, {"coverage@10": coverage(lists, dataset.size)}


def _mean(runs: Sequence[MeasuredRun]) -> MeasuredRun:
    """The mean over seeds of every target's values; it keeps the runs, for the spread between them."""
    first = runs[0]

    def mean(of: Callable[[MeasuredRun], dict[str, float]]) -> dict[str, float]:
        return {name: float(np.mean([of(run)[name] for run in runs])) for name in of(first)}

    rows = {
        name: np.mean([run.target_metrics[name] for run in runs], axis=0) for name in first.target_metrics
    }
    totals = mean(lambda run: run.run_metrics)
    totals["NDCG@10, deviation of seeds"] = float(
        np.std([run.target_metrics["NDCG@10"].mean() for run in runs], ddof=1) if len(first.users) else np.nan
    )
    return MeasuredRun(first.model, first.head, None, first.mask, first.users, rows, totals, tuple(runs))
