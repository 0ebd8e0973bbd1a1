"""Exploration: the first item of a share of the answers is drawn at random, with a logged probability.

A beam search is deterministic: its first item has probability 1 and all other items 0. Such logs cannot
estimate how another ranking would have done (Horvitz and Thompson 1952: every choice needs a known
probability above 0). So for a small share of requests the first item is drawn from the best candidates by
softmax of their scores, and candidates and probability are logged. Hashes of the request's id choose the
requests and draw the items: a request that is answered twice draws the same item twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from registry.hold_out import user_share

# Salts of the two hashes. They differ, or the requests that are explored would all draw the first candidates.
_SHARE_SALT, _DRAW_SALT = "explore", "explore-draw"


@dataclass(frozen=True)
class Explorer:
    """How much is explored: a share of requests in [0, 1], from how many candidates, at which temperature."""

    share: float
    candidates: int
    temperature: float

    def explores(self, request_id: str) -> bool:
        """Whether this request is explored."""
        return user_share(_SHARE_SALT, request_id) < self.share


@dataclass(frozen=True)
class DrawnCandidate:
    """The position of the drawn candidate, and the probability with which it was drawn."""

    position: int
    propensity: float


def propensities(scores: Sequence[float], temperature: float) -> NDArray[np.float64]:
    """(N,) softmax(scores / temperature) in float64, for N >= 1 finite scores and a temperature above 0."""
    scaled = np.asarray(scores, dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities


def draw_candidate(scores: Sequence[float], temperature: float, request_id: str) -> DrawnCandidate:
    """Draw one of N >= 1 candidates with finite scores; the same for the same arguments.

    By inversion: the first candidate whose cumulative probability is above a number in [0, 1) that is uniform
    over request ids. A candidate whose probability is rounded to 0 is never drawn.
    """
    probabilities = propensities(scores, temperature)
    cumulative = np.cumsum(probabilities)
    position = int(
        np.searchsorted(cumulative, user_share(_DRAW_SALT, request_id) * cumulative[-1], side="right")
    )
    return DrawnCandidate(position, float(probabilities[position]))
