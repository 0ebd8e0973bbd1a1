"""Which arm serves a user: a pure function, the same in every process and after every restart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from streams.errors import SidstreamError
from streams.events import Arm


def share(trial: str, user_id: str) -> float:
    """A number in [0, 1) from the hash of trial and user: uniform over users, independent between trials."""
    digest = hashlib.blake2b(user_id.encode(), key=hashlib.sha256(trial.encode()).digest(), digest_size=8)
    # 53 bits: what a double holds exactly, so the result never rounds up to 1.
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2**53


def assign(trial: str, user_id: str, arms: Sequence[Arm]) -> Arm:
    """The arm whose stretch of the cumulative weights (scaled to 1) holds the user's share.

    Raises SidstreamError when no arm has weight.
    """
    total = sum(arm.weight for arm in arms)
    if total <= 0:
        raise SidstreamError(f"the arms of trial {trial} have no weight; publish a rollout that gives one")
    point = share(trial, user_id) * total
    upto = 0.0
    chosen = None
    for arm in arms:
        if arm.weight > 0:
            # Rounding may leave the sum a hair below the total: then the last arm with weight has the rest.
            chosen = arm
            upto += arm.weight
            if point < upto:
                break
    if chosen is None:
        raise SidstreamError(f"the arms of trial {trial} have no weight; publish a rollout that gives one")
    return chosen
