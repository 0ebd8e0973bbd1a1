"""What the user had before, newest and most often first: the floor where people come back to things."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.baselines.popularity import Popularity
from trainer.evaluation.ranker import Mask, fill_order, in_chunks
from trainer.evaluation.sequences import Float64, Int64

# Steps back in the history after which an item counts half. Of 3, 10, 30, 100 and 300 the best or next to it
# on validation of Tmall and REES46; Online Retail, whose invoices have dozens of lines, would have 300.
HALF = 30


class OwnPast(Popularity):
    """Items of the history by the sum of 2^(-steps back / HALF) over their places; then the most popular.

    The newest item itself comes last of the past: to repeat it is no recommendation.
    """

    name = "own-past"
    head = "own past"

    def rank(self, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) the users' own items, then the most popular ones."""
        order = fill_order(self._counts)

        def score(rows: Sequence[Int64]) -> Float64:
            made = np.tile(order, (len(rows), 1))
            for at, row in enumerate(rows):
                if not len(row):
                    continue
                own = np.zeros(len(order))
                np.add.at(own, row, 2.0 ** (-np.arange(len(row))[::-1] / HALF))
                own[row[-1]] = 0.0
                # The popular have less than 1.
                made[at, row] = 1.0 + own[row]
            return made

        return in_chunks(score, histories, k, mask)
