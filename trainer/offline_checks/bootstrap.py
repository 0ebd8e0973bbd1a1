"""Intervals of a figure, a difference and a ratio over users, and of a mean over seeds.

Over users: the percentile bootstrap (Efron 1979), clustered by user (Field and Welsh 2007), since answers to
one user are not independent. Two runs are compared on the same users, so that what is hard for both cancels.
Over seeds: Student's t with the spread between the seeds and the one between the users, since a model that is
trained again is another model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

# Resamples computed at once: 64 of 22,000 users are 11 MB.
_RESAMPLES_AT_ONCE = 64
_RESAMPLES, _LEVEL = 1000, 0.95


class Interval(NamedTuple):
    """A figure and its bounds; NaN where there is no figure, an infinite bound where nothing bounds it."""

    value: float
    low: float
    high: float


def intervals(
    values: Float64, users: Int64, seed: int = 0, resamples: int = _RESAMPLES, level: float = _LEVEL
) -> list[Interval]:
    """Values (B, M) of M figures and the user of each row (B,) -> the mean of each and its interval.

    The same draws for every figure, and for every call with these users and this seed. NaN without rows.
    """
    if not len(values):
        return [Interval(np.nan, np.nan, np.nan)] * values.shape[1]
    sums = _sums_by_user(np.column_stack([values, np.ones(len(values))]), users)
    resampled = _resampled_sums(sums, seed, resamples)
    tail = (1 - level) / 2
    bounds = np.quantile(resampled[:, :-1] / resampled[:, -1:], [tail, 1 - tail], axis=0)
    total = sums.sum(0)
    return [Interval(*map(float, figures)) for figures in zip(total[:-1] / total[-1], *bounds, strict=True)]


def differences(
    ours: Float64, theirs: Float64, users: Int64, seed: int = 0, resamples: int = _RESAMPLES,
    level: float = _LEVEL,
) -> list[Interval]:  # fmt: skip
    """As `intervals`, of ours - theirs, both (B, M) and row by row about the same targets."""
    return intervals(ours - theirs, users, seed, resamples, level)


def relative_changes(
    ours: Float64, theirs: Float64, users: Int64, seed: int = 0, resamples: int = _RESAMPLES,
    level: float = _LEVEL,
) -> list[Interval]:  # fmt: skip
    """Mean of ours over mean of theirs - 1, of M figures of values >= 0, both (B, M) about the same targets.

    Both means are drawn again, so a bound is never below -1, as no such change is. Where all that `theirs`
    has comes from a few users, some resamples have nothing to divide by: their ratio counts as the lowest for
    the lower bound and as infinite for the upper one, since they exclude no change. NaN where the mean of
    `theirs` is 0. Raises ValueError for values below 0, whose ratio means nothing.
    """
    if (ours < 0).any() or (theirs < 0).any():
        raise ValueError("a relative change is of values that are 0 or more")
    if not len(ours):
        return [Interval(np.nan, np.nan, np.nan)] * ours.shape[1]
    figures = ours.shape[1]
    sums = _sums_by_user(np.column_stack([ours, theirs]), users)
    resampled = _resampled_sums(sums, seed, resamples)
    tail = (1 - level) / 2
    result = []
    for after, before, total_after, total_before in zip(
        resampled[:, :figures].T, resampled[:, figures:].T, *np.split(sums.sum(0), 2), strict=True
    ):
        if total_before == 0:
            result.append(Interval(np.nan, np.nan, np.nan))
            continue
        has_base = before > 0
        ratio = after[has_base] / before[has_base]
        nothing = len(before) - len(ratio)
        # Of the ordered resamples the nearest outer one: between a number and infinity is no number.
        low = np.quantile(np.append(ratio, np.zeros(nothing)), tail, method="lower")
        high = np.quantile(np.append(ratio, np.full(nothing, np.inf)), 1 - tail, method="higher")
        result.append(Interval(float(total_after / total_before) - 1, float(low) - 1, float(high) - 1))
    return result


def intervals_over_seeds(runs: Sequence[Float64], users: Int64, level: float = _LEVEL) -> list[Interval]:
    """The mean over S >= 2 seeds of M figures, and its interval over other seeds and other users.

    `runs`: for each seed values (B, M), row by row about the same targets; `users` (B,). The variance over
    users is that of the ratio of sums, clustered by user, of the values' mean over seeds. See
    `mean_over_seeds` for what becomes of it. NaN without rows.
    """
    if not len(users):
        return [Interval(np.nan, np.nan, np.nan)] * runs[0].shape[1]
    over_seeds = np.mean(runs, axis=0)
    sums = _sums_by_user(np.column_stack([over_seeds, np.ones(len(users))]), users)
    values, rows, count = sums[:, :-1], sums[:, -1:], len(sums)
    residuals = values - values.sum(0) / rows.sum() * rows
    user_variances = count / max(1, count - 1) * (residuals**2).sum(0) / rows.sum() ** 2
    return mean_over_seeds(np.array([run.mean(0) for run in runs]), user_variances, count, level)


def relative_changes_over_seeds(
    ours: Sequence[Float64], theirs: Sequence[Float64], users: Int64, level: float = _LEVEL
) -> list[Interval]:
    """As `relative_changes`, of the means over S >= 2 seeds, with the interval over other seeds and users.

    `ours` and `theirs`: for each seed values (B, M) >= 0. The t interval of `mean_over_seeds` is one of the
    logarithms of the seeds' ratios, so that no bound is below -1; the variance over users is that of the
    logarithm of the ratio of sums, by the delta method. Where a seed has nothing on one side, its logarithm
    bounds nothing: the bounds are then -1 and infinity. NaN where the mean of `theirs` is 0.
    """
    ours_means, theirs_means = (np.array([run.mean(0) for run in runs]) for runs in (ours, theirs))
    pooled_ours, pooled_theirs = ours_means.mean(0), theirs_means.mean(0)
    ours_by_user, theirs_by_user = (_sums_by_user(np.mean(runs, axis=0), users) for runs in (ours, theirs))
    count, result = len(ours_by_user), []
    for figure, (after, before) in enumerate(zip(pooled_ours, pooled_theirs, strict=True)):
        if before == 0:
            result.append(Interval(np.nan, np.nan, np.nan))
            continue
        ratio = after / before
        seeds_after, seeds_before = ours_means[:, figure], theirs_means[:, figure]
        if not (seeds_after > 0).all() or not (seeds_before > 0).all():
            result.append(Interval(float(ratio) - 1, -1.0, np.inf))
            continue
        after_shares, before_shares = ours_by_user[:, figure], theirs_by_user[:, figure]
        residuals = after_shares / after_shares.sum() - before_shares / before_shares.sum()
        user_variance = count / max(1, count - 1) * (residuals**2).sum()
        logs = np.log(seeds_after / seeds_before)[:, None]
        log_mean, low, high = mean_over_seeds(logs, np.array([user_variance]), count, level)[0]
        bounds = (float(ratio * np.exp(bound - log_mean)) - 1 for bound in (low, high))
        result.append(Interval(float(ratio) - 1, *bounds))
    return result


def mean_over_seeds(
    seed_means: Float64, user_variances: Float64 | None = None, users: int = 0, level: float = _LEVEL
) -> list[Interval]:
    """Each seed's figures (S, M), S >= 2 -> their mean, and its interval with the seeds' own spread in it.

        V = s^2 / S + W,    mean -+ t_df * sqrt(V),    df = V^2 / ((s^2 / S)^2 / (S - 1) + W^2 / (U - 1))

    s^2: variance (M,) between the seeds' means; W: `user_variances` (M,) of the mean over the U `users` that
    all seeds share; left out where every seed has users of its own, whose spread is then in s^2 already. df
    is the one of Satterthwaite (1946). Three seeds alone have t_2 = 4.3: the interval is as wide as so few
    allow.
    """
    seeds = len(seed_means)
    of_seeds = seed_means.var(0, ddof=1) / seeds
    of_users = np.zeros_like(of_seeds) if user_variances is None else user_variances
    variance = of_seeds + of_users
    spread = of_seeds**2 / (seeds - 1) + of_users**2 / max(1, users - 1)
    freedom = np.where(spread > 0, variance**2 / np.where(spread > 0, spread, 1.0), seeds - 1.0)
    half = stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(variance)
    mean = seed_means.mean(0)
    bounds = zip(mean, mean - half, mean + half, strict=True)
    return [Interval(*map(float, figures)) for figures in bounds]


def _sums_by_user(values: Float64, users: Int64) -> Float64:
    """Values (B, M) of users (B,) -> their sums (U, M) over the rows of each distinct user."""
    distinct_users, place = np.unique(users, return_inverse=True)
    place = place.reshape(-1)
    return np.stack([np.bincount(place, column, len(distinct_users)) for column in values.T], axis=1)


def _resampled_sums(sums: Float64, seed: int, resamples: int) -> Float64:
    """Sums of users (U, M) -> their totals (resamples, M) over U users drawn with replacement."""
    users = len(sums)
    random = np.random.default_rng(seed)
    totals = []
    for low in range(0, resamples, _RESAMPLES_AT_ONCE):
        count = min(_RESAMPLES_AT_ONCE, resamples - low)
        draws = random.integers(0, users, (count, users))
        draws += np.arange(count)[:, None] * users
        weights = np.bincount(draws.ravel(), minlength=count * users).reshape(count, -1)
        totals.append(weights.astype(np.float64) @ sums)
    return np.concatenate(totals)
