"""What the tasks beside the next item are made of: purchases, queries of words, summaries of a history."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from registry.bundles.prompt import BOS, ITEM, TITLE, UNK
from trainer.sequences.interactions import Interactions

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


def bought_within(log: Interactions, within_ms: int) -> Bool:
    """(N,) whether an event is a purchase, or its user bought its item at most `within_ms` later."""
    count = len(log)
    user = np.repeat(np.arange(len(log.starts) - 1), np.diff(log.starts))
    # By user and item, then time, a purchase after the clicks of its moment, which led to it: the next
    # purchase of each row is the next one in its group.
    order = np.lexsort((log.bought, log.ts, log.items, user))
    purchase_place = np.where(log.bought[order], np.arange(count), count)
    following = np.minimum.accumulate(purchase_place[::-1])[::-1]
    with_later_purchase = np.flatnonzero(following < count)
    now, then = order[with_later_purchase], order[following[with_later_purchase]]
    same = (user[now] == user[then]) & (log.items[now] == log.items[then])
    leads_to_purchase = np.zeros(count, dtype=bool)
    leads_to_purchase[now] = same & (log.ts[then] - log.ts[now] <= within_ms)
    return leads_to_purchase


class TitleWords:
    """How telling each word of a catalogue's titles is."""

    def __init__(self, titles: Sequence[Sequence[int]]) -> None:
        """`titles`: token ids of each item's words; none where an item has no title."""
        counts = Counter(word for title in titles for word in _distinct(title))
        named = sum(map(bool, titles))
        # Inverse document frequency (Spärck Jones 1972), above 0 for a word of all titles, too.
        self.idf = {word: math.log(1 + named / count) for word, count in counts.items()}

    def draw_query(self, title: Sequence[int], most: int, rng: np.random.Generator) -> list[int]:
        """1 to `most` distinct words of a title with at least one known word, drawn by their rarity.

        In random order: people do not type words as titles have them.
        """
        words = _distinct(title)
        count = min(int(rng.integers(1, most + 1)), len(words))
        chances = np.array([self.idf[word] for word in words])
        return [words[at] for at in rng.choice(len(words), count, replace=False, p=chances / chances.sum())]

    def typical(self, titles: Iterable[Sequence[int]], most: int) -> list[int]:
        """Up to `most` words of these titles, highest tf-idf first, ties by id; none where none is known."""
        counts = Counter(word for title in titles for word in _distinct(title))
        return sorted(counts, key=lambda word: (-counts[word] * self.idf[word], word))[:most]


def _distinct(title: Iterable[int]) -> list[int]:
    return sorted({*title} - {UNK})


def search_prompt(history: Int64, words: Sequence[int]) -> list[int]:
    """BOS, the codes (H, L) of a history as token ids, the words of a query, ITEM: an item's codes follow."""
    return [BOS, *history.ravel().tolist(), *words, ITEM]


def summary_prompt(history: Int64) -> list[int]:
    """BOS, the codes (H, L) of a history as token ids, TITLE: the words typical of it follow."""
    return [BOS, *history.ravel().tolist(), TITLE]
