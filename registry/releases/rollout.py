"""Which arm serves a user: a pure function, the same in every process and after every restart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from registry.arms import ANCHOR
from registry.hold_out import HoldOut, user_share
from streams.errors import SidstreamError
from streams.events import Arm, Rollout

# The salt of the permanent hold-out. No trial changes it, so that its users stay the same for ever.
_HOLD_OUT_SALT: Final = "anchor"


def is_held_out(user_id: str, share: float) -> bool:
    """True where the user is in the permanent hold-out of a `share` (0 to 1) of all users.

    A greater share adds users and lets none go.
    """
    return HoldOut(salt=_HOLD_OUT_SALT, share=share).has(user_id)


def arm_of(rollout: Rollout, user_id: str) -> Arm:
    """The arm of a rollout that serves a user. All steps of a trial share one salt.

    Challengers take the two ends of the interval [0, 1) of user shares, the champion the middle. As their
    weights grow from step to step, users only move from the champion to a challenger.
    """
    return assign(rollout.salt or rollout.trial, user_id, rollout.arms)


def assign(salt: str, user_id: str, arms: Sequence[Arm]) -> Arm:
    """The arm that serves a user; `salt` is the trial's.

    An anchor beside other arms is a permanent hold-out. Its users are those that `is_held_out` names, so that
    they see the anchor in every trial; a greater weight adds users to them. The cumulative weights of the
    other arms, scaled to 1, cut [0, 1) into one interval an arm. Every other user gets the arm whose interval
    contains the user's share under `salt`. Raises SidstreamError when no arm has weight.
    """
    served = [arm for arm in arms if arm.weight > 0]
    if not served:
        raise SidstreamError(f"the arms of trial {salt} have no weight; publish a rollout that gives one")
    anchors = [arm for arm in served if arm.name == ANCHOR]
    others = [arm for arm in served if arm.name != ANCHOR]
    if anchors:
        # fsum: rounded once, so that the order of the arms cannot move a user in or out.
        weight = math.fsum(arm.weight for arm in anchors)
        if is_held_out(user_id, weight / math.fsum(arm.weight for arm in served)):
            return anchors[0]
        served = others
    point = user_share(salt, user_id) * sum(arm.weight for arm in served)
    upper = 0.0
    for arm in served:
        upper += arm.weight
        if point < upper:
            return arm
    # Rounding may leave the sum slightly below the total: then the last arm gets the rest.
    return served[-1]
