"""Which arm serves a user: a pure function, the same in every process and after every restart."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Final

from registry.arms import ANCHOR
from streams.errors import SidstreamError
from streams.events import Arm, Rollout

# The salt of the permanent hold-out. No trial changes it, so that its users stay the same for ever.
_HOLD_OUT_SALT: Final = "anchor"


def user_share(trial: str, user_id: str) -> float:
    """A number in [0, 1) from the hash of trial and user: uniform over users, independent between trials."""
    digest = hashlib.blake2b(user_id.encode(), key=hashlib.sha256(trial.encode()).digest(), digest_size=8)
    # 53 bits: what a double holds exactly, so the result never rounds up to 1.
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2**53


def arm_of(rollout: Rollout, user_id: str) -> Arm:
    """The arm of a rollout that serves a user. All steps of a trial share one salt.

    Challengers stand at the two ends of the users' line, the champion between them: as their weights grow
    from step to step, users only ever move from the champion to one of them.
    """
    return assign(rollout.salt or rollout.trial, user_id, rollout.arms)


def assign(trial: str, user_id: str, arms: Sequence[Arm]) -> Arm:
    """The arm that serves a user.

    An anchor beside other arms is a permanent hold-out: its users are those whose share under a salt that no
    trial changes is below its weight, so they see the anchor in every trial of that weight, and are the first
    of a greater one. Everybody else gets the arm whose stretch of the other arms' cumulative weights (scaled
    to 1) holds the user's share of the trial. Raises SidstreamError when no arm has weight.
    """
    served = [arm for arm in arms if arm.weight > 0]
    if not served:
        raise SidstreamError(f"the arms of trial {trial} have no weight; publish a rollout that gives one")
    held = [arm for arm in served if arm.name == ANCHOR]
    others = [arm for arm in served if arm.name != ANCHOR]
    if held:
        # fsum: rounded once, so that the order of the arms cannot move a user in or out.
        weight = math.fsum(arm.weight for arm in held)
        if user_share(_HOLD_OUT_SALT, user_id) < weight / math.fsum(arm.weight for arm in served):
            return held[0]
        served = others
    point = user_share(trial, user_id) * sum(arm.weight for arm in served)
    upto = 0.0
    for arm in served:
        upto += arm.weight
        if point < upto:
            return arm
    # Rounding may leave the sum a hair below the total: then the last arm has the rest.
    return served[-1]
