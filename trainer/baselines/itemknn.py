"""Time-decayed item-kNN: items that the same users had; the newest items of a history count most.

No training and no tuning, seconds on one core, and above several published generative tables. The decay by
place in the history follows session kNN (Ludewig and Jannach 2018, arXiv 1803.09587).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from trainer.evaluation.ranker import Mask, Progress, popularity_scores, rank_in_chunks
from trainer.evaluation.sequences import Float64, Int64, flatten
from trainer.evaluation.splits import EvaluationSplit, TimeShard

# Weight of one step back in the history, and how many of its newest items count.
DECAY = 0.8
LAST_ITEMS = 20
# Only this many newest items of a user make pairs: distant items of a heavy user have less in common.
PAIRED_ITEMS = 50
# So small that popularity decides only between items of equal similarity.
_POPULARITY_WEIGHT = 1e-9


class ItemKnn:
    """score(j) = sum over the last items i of DECAY ** (steps back of i) * cosine(i, j).

    cosine(i, j) = users of both / sqrt(count of i * count of j), over training. With `forward` only users who
    had j after i count, as in sequential rules (Ludewig and Jannach 2018, section 3.1).
    """

    head = "similarity"
    seeded = False

    def __init__(self, forward: bool = False) -> None:
        self.name = "itemknn-forward" if forward else "itemknn"
        self._forward = forward

    def fit(self, split: EvaluationSplit, seed: int, progress: Progress) -> None:
        """Count the users of each pair of items."""
        self._counts = split.train_counts()
        self._pair_counts = self._count_pairs([np.zeros(0, np.int64)] * len(split.train), split.train)
        self._similarities = self._cosine()

    def update(self, shard: TimeShard) -> None:
        """Add the pairs that the new items make, among themselves and with the old ones of their users."""
        self._counts += shard.new_counts(len(self._counts))
        self._pair_counts = (self._pair_counts + self._count_pairs(shard.histories, shard.new_items)).tocsr()
        self._similarities = self._cosine()

    def rank(self, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) the most similar items, filled up by popularity."""
        popularity = _POPULARITY_WEIGHT * popularity_scores(self._counts)

        def score(rows: Sequence[Int64]) -> Float64:
            last = [row[-LAST_ITEMS:] for row in rows]
            items, starts = flatten(last)
            weights = np.concatenate([DECAY ** np.arange(len(row))[::-1] for row in [*last, np.zeros(0)]])
            recent = sparse.csr_array((weights, items, starts), shape=(len(rows), len(self._counts)))
            scores: Float64 = (recent @ self._similarities).toarray()
            return scores + popularity

        return rank_in_chunks(score, histories, k, mask)

    def _count_pairs(self, histories: Sequence[Int64], new_items: Sequence[Int64]) -> sparse.csr_array:
        """(I, I) how many users had j after i, where j is among the user's `new_items`."""
        first, second = [], []
        for history, items in zip(histories, new_items, strict=True):
            earlier = np.unique(history[-PAIRED_ITEMS:])
            items = items[-PAIRED_ITEMS:]
            distinct = np.concatenate([earlier, items[~np.isin(items, earlier)]])
            distinct = distinct[np.sort(np.unique(distinct, return_index=True)[1])]  # at its first place
            before, after = np.triu_indices(len(distinct), 1)
            is_new = after >= len(earlier)
            first.append(distinct[before[is_new]])
            second.append(distinct[after[is_new]])
        i, j = (np.concatenate([*parts, np.zeros(0, np.int64)]) for parts in (first, second))
        return sparse.csr_array((np.ones(len(i)), (i, j)), shape=(len(self._counts), len(self._counts)))

    def _cosine(self) -> sparse.csr_array:
        """(I, I) cosines of different items; an item is not its own neighbour."""
        scale = sparse.diags_array(1 / np.sqrt(np.maximum(self._counts, 1.0)))
        pair_counts = self._pair_counts if self._forward else self._pair_counts + self._pair_counts.T
        return (scale @ pair_counts @ scale).tocsr()
