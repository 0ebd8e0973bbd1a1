"""What every model fulfils to be evaluated, and the last step that most of them share: scores to a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from trainer.evaluation.sequences import Int64, flatten
from trainer.evaluation.splits import Shard, Split

# What may be listed: every item, or every item but those of the user's own past.
Mask = Literal["none", "seen"]
MASKS: tuple[Mask, ...] = ("none", "seen")
# What orders a list of the generator: the beam alone, the beam's items by the dense head, the dense head, or
# both, mixed with the weight that validation chose.
Head = Literal["beam", "reordered", "dense", "mixed"]
Progress = Callable[[str], None]
# Users scored at once: 512 rows of 12,000 items in float64 are 50 MB.
CHUNK = 512


class Ranker(Protocol):
    """A model that ranks the whole catalogue for a history.

    It may also have `update` (see `Learner`), `rank_for` (see `Personal`) and, after `fit`, these attributes:
    `parameters` (trained numbers), `invalid_rate` (share of answers spelled without the constraint that are
    no item), `sids` ((I, L) int64, its own SIDs, by which its lists are counted too), `trained_s` (seconds of
    training, where several models share one); and `seeded`, False where `seed` changes nothing, so that one
    run says it all.
    """

    name: str
    head: str  # what orders the list, such as "popularity" or "beam"

    def fit(self, data: Split, seed: int, progress: Progress) -> None:
        """Learn from `data.train`; validation may choose when to stop, the test is not to be looked at."""

    def rank(self, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) item rows, best first, none twice, -1 where they end; an empty history is answered."""


@runtime_checkable
class Personal(Protocol):
    """A ranker that also looks at what the data set says of a user."""

    def rank_for(self, users: Int64, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """As `Ranker.rank`; `users` (B,) rows of Sequences.users."""


@runtime_checkable
class Learner(Protocol):
    """A ranker that goes on learning after `fit`."""

    def update(self, shard: Shard) -> None:
        """Learn what users did since: `fresh` of each, after `histories`, which are known already."""


def top_k(scores: npt.NDArray[Any], k: int, seen: Sequence[Int64] | None = None) -> Int64:
    """Scores (B, I), of any float type -> the k best items (B, k), best first; -1 where there are fewer.

    `seen`: B histories whose items are left out; `scores` is written over there. An item with a score of -inf
    is never listed. Equal scores at the edge of the list are cut in no promised order.
    """
    count = scores.shape[1]
    if seen is not None:
        items, starts = flatten(seen)
        scores[np.repeat(np.arange(len(seen)), np.diff(starts)), items] = -np.inf
    kept = min(k, count)
    found = np.argpartition(scores, count - kept, axis=1)[:, count - kept :]
    values = np.take_along_axis(scores, found, 1)
    order = np.lexsort((found, -values))
    best = np.full((len(scores), k), -1, np.int64)
    best[:, :kept] = np.where(
        np.isneginf(np.take_along_axis(values, order, 1)), -1, np.take_along_axis(found, order, 1)
    )
    return best


def in_chunks(
    score: Callable[[Sequence[Int64]], npt.NDArray[Any]], histories: Sequence[Int64], k: int, mask: Mask
) -> Int64:
    """The lists of a model that scores every item: `score` gives (b, I), which is written over."""
    lists = [np.zeros((0, k), np.int64)]
    for low in range(0, len(histories), CHUNK):
        rows = histories[low : low + CHUNK]
        lists.append(top_k(score(rows), k, rows if mask == "seen" else None))
    return np.concatenate(lists)


def fill_order(counts: Int64 | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(I,) scores in (0, 1) that fall with popularity, the earlier item first among equals."""
    order = np.argsort(-counts, kind="stable")
    fill = np.empty(len(counts))
    fill[order] = (len(counts) - np.arange(len(counts))) / (len(counts) + 1)
    return fill
