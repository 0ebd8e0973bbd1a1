"""The first place of some answers, drawn by chance with a known probability.

A beam search is deterministic: what it puts first has probability 1 and all else 0, and such logs do not tell
how another ranking would have done (Horvitz and Thompson 1952: every choice needs a known probability above
0). So for a small share of requests the first item is drawn from the best candidates by softmax of their
scores, and what it was drawn from is logged. Which requests, and what each draws, are hashes of the request's
id: a request that is answered again is drawn alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from registry.releases.rollout import user_share

# Salts of the two hashes. They differ, or the requests that are explored would all draw the first candidates.
_WHETHER, _WHICH = "explore", "explore-draw"


@dataclass(frozen=True)
class Explorer:
    """How much is explored: a share of requests in [0, 1], from how many candidates, at which temperature."""

    share: float
    candidates: int
    temperature: float

    def chosen(self, request_id: str) -> bool:
        """Whether this request is explored."""
        return user_share(_WHETHER, request_id) < self.share


@dataclass(frozen=True)
class Draw:
    """Which of the candidates was drawn, and the probability with which it was."""

    chosen: int
    propensity: float


def propensities(scores: Sequence[float], temperature: float) -> NDArray[np.float64]:
    """(N,) softmax(scores / temperature) in float64, for N >= 1 finite scores and a temperature above 0."""
    scaled = np.asarray(scores, dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    made: NDArray[np.float64] = weights / weights.sum()
    return made


def draw(scores: Sequence[float], temperature: float, request_id: str) -> Draw:
    """Draw one of N >= 1 candidates with finite scores; the same for the same arguments.

    By inversion: the first candidate whose cumulative probability is above a number in [0, 1) that is uniform
    over request ids. A candidate whose probability is rounded to 0 is never drawn.
    """
    chances = propensities(scores, temperature)
    upto = np.cumsum(chances)
    chosen = int(np.searchsorted(upto, user_share(_WHICH, request_id) * upto[-1], side="right"))
    return Draw(chosen, float(chances[chosen]))
