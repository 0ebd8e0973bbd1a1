"""The most popular items for everybody: the floor of every table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.evaluation.ranker import Mask, Progress, popularity_scores, rank_in_chunks
from trainer.evaluation.sequences import Float64, Int64
from trainer.evaluation.splits import EvaluationSplit, TimeShard


class Popularity:
    """Items by how often they occur in training, the earlier item first among equals."""

    name = "popularity"
    head = "popularity"
    seeded = False

    def fit(self, split: EvaluationSplit, seed: int, progress: Progress) -> None:
        """Count how often each item occurs in training."""
        self._counts = split.train_counts()

    def update(self, shard: TimeShard) -> None:
        """Add the shard's counts."""
        self._counts += shard.new_counts(len(self._counts))

    def rank(self, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) the same list for every history, without the items that `mask` leaves out."""
        order = popularity_scores(self._counts)

        def score(rows: Sequence[Int64]) -> Float64:
            return np.tile(order, (len(rows), 1))

        return rank_in_chunks(score, histories, k, mask)
