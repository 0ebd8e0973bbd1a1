"""What is popular in the categories of a user's last items: the floor for new users and new items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streams.errors import SidstreamError
from trainer.baselines.popularity import Popularity
from trainer.evaluation.ranker import Mask, Progress, popularity_scores, rank_in_chunks
from trainer.evaluation.sequences import Float64, Int64
from trainer.evaluation.splits import EvaluationSplit

# Only the categories of this many newest items of a user count.
LAST_ITEMS = 20


class PopularityOfCategory(Popularity):
    """The user's categories, the most frequent one first; inside of one, its items by popularity.

    An item without an event in training counts as popular as the mean of its category. Items of other
    categories follow by popularity.
    """

    name = "popularity-of-category"

    def fit(self, split: EvaluationSplit, seed: int, progress: Progress) -> None:
        """Count items and categories. Raises SidstreamError for a data set without categories."""
        if split.dataset.categories is None:
            raise SidstreamError(f"{split.dataset.name} has no categories: leave {self.name} out of --models")
        names, rows = np.unique(np.array(split.dataset.categories), return_inverse=True)
        self._category: Int64 = rows.reshape(-1).astype(np.int64)
        self._is_category = names != ""  # items without a category have nothing in common
        super().fit(split, seed, progress)

    def rank(self, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) items of the user's categories first, then all others."""
        order = self._order()

        def score(rows: Sequence[Int64]) -> Float64:
            affinity = np.zeros((len(rows), len(self._is_category)))
            for row, history in enumerate(rows):
                np.add.at(affinity[row], self._category[history[-LAST_ITEMS:]], 1.0)
            affinity *= self._is_category
            # Affinities are whole numbers; `order`, between 0 and 1, decides between equal ones.
            return affinity[:, self._category] + order

        return rank_in_chunks(score, histories, k, mask)

    def _order(self) -> Float64:
        """(I,) scores in (0, 1) by popularity, items without an event at their category's mean."""
        in_training = self._counts > 0
        total = np.bincount(self._category, self._counts, len(self._is_category))
        members = np.bincount(self._category, in_training, len(self._is_category))
        mean = (total / np.maximum(members, 1))[self._category]
        return popularity_scores(np.where(in_training, self._counts, mean))
