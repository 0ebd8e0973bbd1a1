"""The interface of every model that is evaluated, and the step from scores to lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from trainer.evaluation.sequences import Int64, flatten
from trainer.evaluation.splits import EvaluationSplit, TimeShard

# Which items a list may have. "none": all items; "seen": all but those of the user's history.
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

    It may also have `update` (see `UpdatableRanker`), `rank_for` (see `UserAwareRanker`) and, after `fit`,
    these attributes: `parameters` (count of trained numbers), `invalid_rate` (share of unconstrained answers
    that are no item), `sids` ((I, L) int64, its own SIDs, by which its lists are also counted), `trained_s`
    (seconds of training on the processor, where several models share one), `validation_ndcg` (NDCG@10 on the
    validation part, by which it stopped: `trainer.evaluation.validation`); and `seeded`, False where `seed`
    changes nothing, so that one run is enough.
    """

    name: str
    head: str  # what orders the list, such as "popularity" or "beam"

    def fit(self, split: EvaluationSplit, seed: int, progress: Progress) -> None:
        """Learn from `split.train`; `split.valid` may decide when to stop; `split.test` must not be used."""

    def rank(self, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """(B, k) item rows, best first, each once, padded with -1; an empty history gets a list as well."""


@runtime_checkable
class UserAwareRanker(Protocol):
    """A ranker that also uses the attributes which the data set has of a user."""

    def rank_for(self, users: Int64, histories: Sequence[Int64], k: int, mask: Mask) -> Int64:
        """As `Ranker.rank`; `users` (B,) rows of SequenceDataset.users."""


@runtime_checkable
class UpdatableRanker(Protocol):
    """A ranker that goes on learning after `fit`."""

    def update(self, shard: TimeShard) -> None:
        """Learn `new_items` of each user of the shard; their `histories` have been learned before."""


def top_k(scores: npt.NDArray[Any], k: int, seen: Sequence[Int64] | None = None) -> Int64:
    """Scores (B, I), of any float type -> the k best items (B, k), best first; -1 where there are fewer.

    `seen`: B histories whose items are left out; their `scores` are overwritten. An item with a score of -inf
    is never listed. Which of several equal scores at the end of the list is listed is not defined.
    """
    count = scores.shape[1]
    if seen is not None:
        items, starts = flatten(seen)
        scores[np.repeat(np.arange(len(seen)), np.diff(starts)), items] = -np.inf
    listed = min(k, count)
    best_items = np.argpartition(scores, count - listed, axis=1)[:, count - listed :]
    values = np.take_along_axis(scores, best_items, 1)
    order = np.lexsort((best_items, -values))
    best = np.full((len(scores), k), -1, np.int64)
    best[:, :listed] = np.where(
        np.isneginf(np.take_along_axis(values, order, 1)), -1, np.take_along_axis(best_items, order, 1)
    )
    return best


def rank_in_chunks(
    score: Callable[[Sequence[Int64]], npt.NDArray[Any]], histories: Sequence[Int64], k: int, mask: Mask
) -> Int64:
    """(B, k) lists of a model that scores every item.

    `score`: b histories -> scores (b, I), which are overwritten.
    """
    lists = [np.zeros((0, k), np.int64)]
    for low in range(0, len(histories), CHUNK):
        rows = histories[low : low + CHUNK]
        lists.append(top_k(score(rows), k, rows if mask == "seen" else None))
    return np.concatenate(lists)


def popularity_scores(counts: Int64 | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(I,) scores in (0, 1) that fall with popularity, the earlier item first among equals."""
    order = np.argsort(-counts, kind="stable")
    scores = np.empty(len(counts))
    scores[order] = (len(counts) - np.arange(len(counts))) / (len(counts) + 1)
    return scores
