"""The user's own items, recent and frequent ones first: the floor where people buy the same items again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.baselines.popularity import Popularity
from trainer.evaluation.ranker import Mask, popularity_scores, rank_in_chunks
from trainer.evaluation.sequences import Float64, Int64

# Steps back in the history after which an item counts half. Of 3, 10, 30, 100 and 300 the best or next to it
# on validation of Tmall and REES46; Online Retail, whose invoices have dozens of lines, would have 300.
HALF_LIFE_STEPS = 30


class OwnPast(Popularity):
    """Items of the history by the sum of 2^(-steps back / HALF_LIFE_STEPS) over their places, then others.

    The newest item itself comes last of the past: to repeat it is no recommendation.
    """

    name = "own-past"
    head = "own past"

    def rank(self, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) the users' own items, then the most popular ones."""
        order = popularity_scores(self._counts)

        def score(rows: Sequence[Int64]) -> Float64:
            scores = np.tile(order, (len(rows), 1))
            for at, row in enumerate(rows):
                if not len(row):
                    continue
                own = np.zeros(len(order))
                np.add.at(own, row, 2.0 ** (-np.arange(len(row))[::-1] / HALF_LIFE_STEPS))
                own[row[-1]] = 0.0
                # The scores of popularity are below 1.
                scores[at, row] = 1.0 + own[row]
            return scores

        return rank_in_chunks(score, histories, k, mask)
