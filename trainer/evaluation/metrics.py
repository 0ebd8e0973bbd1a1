"""Metrics of ranked lists with one relevant item each, over the whole catalogue, by item and by SID."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.evaluation.sequences import Float64, Int64

CUTOFFS = (1, 5, 10, 20)
# Length of the lists that the metrics need.
LONGEST_LIST = max(CUTOFFS)


def target_ranks(lists: Int64, targets: Int64, groups: Int64 | None = None) -> Int64:
    """Lists (B, k) of items and targets (B,) -> place of the target (B,), from 0; -1 where it is not listed.

    With `groups` (I,) an item of the target's group is a hit as well: with SIDs' groups, a hit by SID.
    """
    if groups is not None:
        lists, targets = np.where(lists < 0, -1, groups[lists]), groups[targets]
    hit = lists == targets[:, None]
    return np.where(hit.any(1), hit.argmax(1), -1)


def accuracy(ranks: Int64) -> dict[str, Float64]:
    """Ranks (B,) as of `hit_ranks` -> HR, NDCG and MRR at each of CUTS, each (B,).

    One item is relevant, so recall is the hit rate, the ideal DCG is 1 and NDCG is 1 / log2(rank + 2)
    (Jarvelin and Kekalainen 2002).
    """
    metrics: dict[str, Float64] = {}
    for cut in CUTOFFS:
        hit = (ranks >= 0) & (ranks < cut)
        place = np.where(hit, ranks, 0)
        metrics[f"HR@{cut}"] = hit.astype(np.float64)
        metrics[f"NDCG@{cut}"] = np.where(hit, 1 / np.log2(place + 2), 0.0)
        metrics[f"MRR@{cut}"] = np.where(hit, 1 / (place + 1), 0.0)
    return metrics


def coverage(lists: Int64, items: int, cut: int = 10) -> float:
    """Share of the catalogue's `items` that is in the first `cut` places of at least one list."""
    listed = lists[:, :cut]
    return len(np.unique(listed[listed >= 0])) / items


def category_entropy(lists: Int64, categories: Sequence[str], cut: int = 10) -> Float64:
    """(B,) entropy in bits of the categories in the first `cut` places of each list; 0 for an empty list."""
    numbers = np.unique(np.array(categories), return_inverse=True)[1].reshape(-1)
    listed = lists[:, :cut]
    codes = np.where(listed < 0, -1, numbers[listed])
    same = (codes[:, :, None] == codes[:, None, :]) & (codes >= 0)[:, :, None]
    length = np.maximum((codes >= 0).sum(1), 1)[:, None]
    # Each place adds -log2(share of its category) / length; a category of n places adds n of them.
    share = np.maximum(same.sum(2), 1) / length
    return np.where(codes >= 0, -np.log2(share), 0.0).sum(1) / length[:, 0]
