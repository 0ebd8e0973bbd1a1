"""How a bundle's two scores become one order, and which past items it may show again.

Both are fitted on held-out events when the bundle is made, and kept in it: a weight that fits one model does
not fit another.
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
# always: any item may come again. never: none of the history. bought: none that was bought. within: none that
# was touched in the last `within_s` seconds.
Rule = Literal["always", "never", "bought", "within"]


class Repeats(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which items of a user's past may be shown again."""

    repeats: Rule = "always"
    within_s: int = 0

    def __post_init__(self) -> None:
        if self.within_s < 0 or (self.repeats == "within") != (self.within_s > 0):
            raise ValueError(f"within_s is {self.within_s} for the rule {self.repeats}")

    def told(self) -> str:
        """For people, as in `past items: always`."""
        return f"within {self.within_s} s" if self.repeats == "within" else self.repeats


class Ranking(Repeats, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A candidate's score: (1 - dense_weight) * log p(SID) + dense_weight * log p(item) of the dense head."""

    dense_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dense_weight <= 1:
            raise ValueError(f"dense_weight is {self.dense_weight}; it is a share, from 0 to 1")


def write(ranking: Ranking, folder: Path) -> None:
    """Put the ranking into a bundle's folder."""
    (folder / RANKING).write_bytes(msgspec.json.format(msgspec.json.encode(ranking), indent=1) + b"\n")


def read(folder: Path) -> Ranking:
    """The ranking of a bundle; one without the file ranks by its SIDs alone. Raises SidstreamError."""
    path = folder / RANKING
    if not path.exists():
        return Ranking()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Ranking)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise SidstreamError(f"{path} is no ranking ({error}); fetch the bundle again") from error


def left_out(rule: Repeats, bought: npt.ArrayLike, ages_s: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which past items may not be shown again: `bought` and `ages_s` (...), seconds -> (...) bool."""
    was, ages = np.asarray(bought, dtype=bool), np.asarray(ages_s)
    if rule.repeats == "bought":
        return was.copy()
    if rule.repeats == "within":
        within: npt.NDArray[np.bool_] = ages < rule.within_s
        return within
    return np.full(was.shape, rule.repeats == "never")
