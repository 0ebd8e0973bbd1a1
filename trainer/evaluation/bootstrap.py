"""Intervals of a figure and of a difference: users are drawn again, with all that is theirs.

The percentile bootstrap (Efron 1979), clustered by user (Field and Welsh 2007): answers to one user are not
independent. Two runs are compared on the same users, so that what is hard for both cancels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trainer.evaluation.sequences import Float64, Int64

# Users' draws made at once: 64 of 22,000 users are 11 MB.
_CHUNK = 64


class Interval(NamedTuple):
    """A mean and its bounds."""

    value: float
    low: float
    high: float


def intervals(
    values: Float64, users: Int64, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> list[Interval]:
    """Values (B, M) of M figures and the user of each row (B,) -> the mean of each and its interval.

    The same draws for every figure, and for every call with these users and this seed. NaN without rows.
    """
    if not len(values):
        return [Interval(np.nan, np.nan, np.nan)] * values.shape[1]
    who, place = np.unique(users, return_inverse=True)
    place = place.reshape(-1)
    sums = np.stack([np.bincount(place, column, len(who)) for column in values.T], axis=1)
    rows = np.bincount(place, minlength=len(who)).astype(np.float64)
    random = np.random.default_rng(seed)
    means = []
    for low in range(0, resamples, _CHUNK):
        count = min(_CHUNK, resamples - low)
        drawn = random.integers(0, len(who), (count, len(who)))
        drawn += np.arange(count)[:, None] * len(who)
        weights = np.bincount(drawn.ravel(), minlength=count * len(who)).reshape(count, -1)
        weights = weights.astype(np.float64)
        means.append((weights @ sums) / (weights @ rows)[:, None])
    tail = (1 - level) / 2
    bounds = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    middle = sums.sum(0) / rows.sum()
    return [Interval(*map(float, three)) for three in zip(middle, *bounds, strict=True)]


def differences(
    ours: Float64, theirs: Float64, users: Int64, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> list[Interval]:
    """As `intervals`, of ours - theirs, both (B, M) and row by row about the same targets."""
    return intervals(ours - theirs, users, seed, resamples, level)
