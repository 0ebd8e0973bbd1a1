"""How the two scores of a bundle become one ranking, and which items of the history it may show again.

Both are fitted on held-out events when the bundle is made. The bundle keeps them, since the weight that fits
one model does not fit another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from streams.errors import SidstreamError

RANKING = "ranking.json"
# The dense head adds a repeat bias to items of the user's history. It depends on buckets of the item's last
# distance (1 for the newest item) and of how often the history has it: the first number of each bucket is
# here, and the last bucket has no end. Trainer and serving read these, so that both have the same buckets.
DISTANCE_STARTS = (1, 2, 3, 5, 9, 17, 33, 65)
COUNT_STARTS = (1, 2, 3, 5, 9)
# Items of the history that are left out. always: none. never: all. bought: those that were bought. within:
# those with an interaction in the last `within_s` seconds.
RepeatPolicy = Literal["always", "never", "bought", "within"]


class RepeatRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which items of a user's history may be shown again."""

    repeats: RepeatPolicy = "always"
    within_s: int = 0

    def __post_init__(self) -> None:
        if self.within_s < 0 or (self.repeats == "within") != (self.within_s > 0):
            raise ValueError(f"within_s is {self.within_s} for the rule {self.repeats}")


class Ranking(RepeatRule, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A candidate's score: (1 - dense_weight) * log p(SID) + dense_weight * log p(item) of the dense head."""

    dense_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dense_weight <= 1:
            raise ValueError(f"dense_weight is {self.dense_weight}; it is a share, from 0 to 1")


def write(ranking: Ranking, folder: Path) -> None:
    """Write the ranking into a bundle's folder."""
    (folder / RANKING).write_bytes(msgspec.json.format(msgspec.json.encode(ranking), indent=1) + b"\n")


def read(folder: Path) -> Ranking:
    """Read the ranking of a bundle; without the file it ranks by SIDs alone. Raises SidstreamError."""
    path = folder / RANKING
    if not path.exists():
        return Ranking()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Ranking)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise SidstreamError(f"{path} is no ranking ({error}); fetch the bundle again") from error


def excluded_by_repeats(
    rule: RepeatRule, bought: npt.ArrayLike, ages_s: npt.ArrayLike
) -> npt.NDArray[np.bool_]:
    """Which items of a history may not be shown again.

    `bought` (...) and `ages_s` (...), seconds since the interaction -> bool (...).
    """
    was_bought, ages = np.asarray(bought, dtype=bool), np.asarray(ages_s)
    if rule.repeats == "bought":
        return was_bought.copy()
    if rule.repeats == "within":
        recent: npt.NDArray[np.bool_] = ages < rule.within_s
        return recent
    return np.full(was_bought.shape, rule.repeats == "never")
