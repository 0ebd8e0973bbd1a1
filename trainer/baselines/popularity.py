"""The most popular items for everybody: the floor of every table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.evaluation.ranker import Mask, Progress, fill_order, in_chunks
from trainer.evaluation.sequences import Float64, Int64
from trainer.evaluation.splits import Shard, Split


class Popularity:
    """Items by how often they occur in training, the earlier item first among equals."""

    name = "popularity"
    head = "popularity"
    seeded = False

    def fit(self, data: Split, seed: int, progress: Progress) -> None:
        """Count."""
        self._counts = data.train_counts()

    def update(self, shard: Shard) -> None:
        """Count on."""
        for items in shard.fresh:
            np.add.at(self._counts, items, 1)

    def rank(self, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) the same list for all, but for what `mask` leaves out."""
        order = fill_order(self._counts)

        def score(rows: Sequence[Int64]) -> Float64:
            return np.tile(order, (len(rows), 1))

        return in_chunks(score, histories, k, mask)
