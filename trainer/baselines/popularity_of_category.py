"""What is popular in the categories of a user's last items: the floor for new users and new items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streams.errors import SidstreamError
from trainer.evaluation.ranker import Mask, Progress, fill_order, in_chunks
from trainer.evaluation.sequences import Float64, Int64
from trainer.evaluation.splits import Shard, Split

# The user's last items whose categories count.
LAST = 20


class PopularityOfCategory:
    """The user's categories, the most frequent one first; inside of one, its items by popularity.

    An item that training has not seen is taken to be as popular as its category's mean. Items of other
    categories follow by popularity.
    """

    name = "popularity-of-category"
    head = "popularity"
    seeded = False

    def fit(self, data: Split, seed: int, progress: Progress) -> None:
        """Count. Raises SidstreamError for a data set without categories."""
        if data.data.categories is None:
            raise SidstreamError(f"{data.data.name} has no categories: leave {self.name} out of --models")
        names, rows = np.unique(np.array(data.data.categories), return_inverse=True)
        self._category: Int64 = rows.reshape(-1).astype(np.int64)
        self._named = names != ""  # items without a category share nothing
        self._counts = data.train_counts()

    def update(self, shard: Shard) -> None:
        """Count on."""
        for items in shard.fresh:
            np.add.at(self._counts, items, 1)

    def rank(self, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) lists of the user's categories."""
        order = self._order()

        def score(rows: Sequence[Int64]) -> Float64:
            affinity = np.zeros((len(rows), len(self._named)))
            for row, history in enumerate(rows):
                np.add.at(affinity[row], self._category[history[-LAST:]], 1.0)
            affinity *= self._named
            # Whole numbers of the user's items, below which `order`, between 0 and 1, decides.
            return affinity[:, self._category] + order

        return in_chunks(score, histories, k, mask)

    def _order(self) -> Float64:
        """(I,) scores in (0, 1) by popularity, unseen items at their category's mean."""
        seen = self._counts > 0
        total = np.bincount(self._category, self._counts, len(self._named))
        members = np.bincount(self._category, seen, len(self._named))
        mean = (total / np.maximum(members, 1))[self._category]
        return fill_order(np.where(seen, self._counts, mean))
