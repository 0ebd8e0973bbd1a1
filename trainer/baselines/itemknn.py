"""Time-decayed item-kNN: what users had together, the newest items of a history counting most.

No training and no tuning, seconds on one core, and above several published generative tables. The decay by
place in the history follows session kNN (Ludewig and Jannach 2018, arXiv 1803.09587).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from trainer.evaluation.ranker import Mask, Progress, fill_order, in_chunks
from trainer.evaluation.sequences import Float64, Int64, flatten
from trainer.evaluation.splits import Shard, Split

# Weight of one step back in the history, and how many of its last items count.
DECAY = 0.8
LAST = 20
# Items of a user that make pairs, the newest kept: those of a heavy user have less to do with one another.
SPAN = 50
# Below every similarity worth naming: popularity orders what similarity leaves equal.
_FILL = 1e-9


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

    def fit(self, data: Split, seed: int, progress: Progress) -> None:
        """Count who had what together."""
        self._counts = data.train_counts()
        self._together = self._pairs([np.zeros(0, np.int64)] * len(data.train), data.train)
        self._similarities = self._cosine()

    def update(self, shard: Shard) -> None:
        """Add the pairs that the new items make, among themselves and with the old ones of their users."""
        for items in shard.fresh:
            np.add.at(self._counts, items, 1)
        self._together = (self._together + self._pairs(shard.histories, shard.fresh)).tocsr()
        self._similarities = self._cosine()

    def rank(self, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) the most similar items, filled up by popularity."""
        fill = _FILL * fill_order(self._counts)

        def score(rows: Sequence[Int64]) -> Float64:
            last = [row[-LAST:] for row in rows]
            items, starts = flatten(last)
            weights = np.concatenate([DECAY ** np.arange(len(row))[::-1] for row in [*last, np.zeros(0)]])
            recent = sparse.csr_array((weights, items, starts), shape=(len(rows), len(self._counts)))
            scores: Float64 = (recent @ self._similarities).toarray()
            return scores + fill

        return in_chunks(score, histories, k, mask)

    def _pairs(self, histories: Sequence[Int64], fresh: Sequence[Int64]) -> sparse.csr_array:
        """(I, I) how many users had j after i, where j is new among the user's `fresh` items."""
        first, second = [], []
        for past, items in zip(histories, fresh, strict=True):
            known = np.unique(past[-SPAN:])
            items = items[-SPAN:]
            had = np.concatenate([known, items[~np.isin(items, known)]])
            had = had[np.sort(np.unique(had, return_index=True)[1])]  # each once, in its first place
            one, two = np.triu_indices(len(had), 1)
            new = two >= len(known)
            first.append(had[one[new]])
            second.append(had[two[new]])
        i, j = (np.concatenate([*parts, np.zeros(0, np.int64)]) for parts in (first, second))
        return sparse.csr_array((np.ones(len(i)), (i, j)), shape=(len(self._counts), len(self._counts)))

    def _cosine(self) -> sparse.csr_array:
        """(I, I) cosines of different items; an item is not its own neighbour."""
        scale = sparse.diags_array(1 / np.sqrt(np.maximum(self._counts, 1.0)))
        together = self._together if self._forward else self._together + self._together.T
        return (scale @ together @ scale).tocsr()
