"""Simulated shoppers: what they like is known, so that a test can read the truth behind their clicks.

Every item has a vector: the sum of its title's words, each word a fixed random unit vector weighted by how
rare it is. A shopper's taste is the mean of the items in the shopper's past. The chance of a click grows with
taste and with likeness to the trigger; the chance that a click becomes a purchase grows with the item's
*value*, which clicks do not see. So a model that only learns what is clicked leaves conversions on the table,
and one aligned to purchases can truly win.

Value is one of two things (`ShoppersSettings.value`). "title": another direction of the space of words, so
that an item is worth the same to all shoppers, and counting what is bought finds it. "taste": the product of
hidden factors of the item, which are drawn at random and which no title says, with the shopper's own taste in
them, the mean of what is in the shopper's past. There, an item is worth as much as any other one on average
over shoppers.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from streams.events import CatalogItem
from streams.settings import ShoppersSettings

# Enough that two random words are nearly orthogonal (cosine about 1/sqrt(48) = .14), and still quick.
DIMENSIONS = 48
# Of hidden tastes: few enough that a few purchases of a shopper tell them (matrix factorisation of small logs
# uses as few), and more than one, so that there is no common order of items.
HIDDEN_FACTORS = 4
_WORD = re.compile(r"[a-z]{3,}")

Vector = NDArray[np.float64]


def _random_unit(*parts: object, size: int = DIMENSIONS) -> Vector:
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    vector = np.random.default_rng(int.from_bytes(digest, "big")).standard_normal(size)
    return vector / np.linalg.norm(vector)


def _sigmoid(x: Vector) -> Vector:
    return 1.0 / (1.0 + np.exp(-x))


class Truth:
    """The known propensities over one catalogue.

    `vectors` is (N, D) with unit rows in the order of `items`. `factors` is (N, F): an item's value to a
    shopper is their product with the shopper's `purchase_taste` (F,), with mean 0 and variance 1 over items.
    """

    def __init__(self, catalogue: Sequence[CatalogItem], settings: ShoppersSettings) -> None:
        self.settings = settings
        self.items = [item.item_id for item in catalogue]
        self.row = {item_id: row for row, item_id in enumerate(self.items)}
        words = [_WORD.findall(f"{item.title} {item.category}".lower()) for item in catalogue]
        seen_in = Counter(word for bag in words for word in set(bag))
        unit = {word: _random_unit(settings.seed, "word", word) for word in seen_in}
        rarity = {word: math.log(1 + len(words) / count) for word, count in seen_in.items()}
        self.vectors = np.zeros((len(words), DIMENSIONS))
        for row, bag in enumerate(words):
            # A title without words gets a vector of its own: it is like nothing else.
            total = sum((rarity[w] * unit[w] for w in bag), np.zeros(DIMENSIONS))
            norm = float(np.linalg.norm(total))
            self.vectors[row] = total / norm if norm else _random_unit(settings.seed, "item", self.items[row])
        self.factors = self._factors()

    def _factors(self) -> Vector:
        if self.settings.value == "title":
            raw = self.vectors @ _random_unit(self.settings.seed, "value")
            return ((raw - raw.mean()) / (raw.std() or 1.0))[:, None]
        units = [_random_unit(self.settings.seed, "factors", i, size=HIDDEN_FACTORS) for i in self.items]
        raw = np.array(units).reshape(-1, HIDDEN_FACTORS)
        return raw - raw.mean(axis=0)

    def taste(self, user_id: str, past: Iterable[str]) -> Vector:
        """Unit (D,): the mean of the items in the user's past; a random direction for a user without one."""
        rows = [self.row[item] for item in past if item in self.row]
        mean = self.vectors[rows].sum(axis=0) if rows else np.zeros(DIMENSIONS)
        norm = float(np.linalg.norm(mean))
        return mean / norm if norm else _random_unit(self.settings.seed, "user", user_id)

    def purchase_taste(self, user_id: str, past: Iterable[str]) -> Vector:
        """(F,): what the factors of an item are worth to a user; to all the same where a title says it.

        A hidden taste is the mean of the past's factors, as `taste` is of its words, and a random direction
        for a user without a past.
        """
        if self.settings.value == "title":
            return np.ones(1)
        rows = [self.row[item] for item in past if item in self.row]
        mean = self.factors[rows].sum(axis=0) if rows else np.zeros(HIDDEN_FACTORS)
        norm = float(np.linalg.norm(mean))
        if not norm:
            mean = _random_unit(self.settings.seed, "buyer", user_id, size=HIDDEN_FACTORS)
        # The product of two random unit vectors has variance 1 / F.
        return mean / (norm or 1.0) * HIDDEN_FACTORS**0.5

    def click_probability(self, taste: Vector, items: Sequence[str], trigger: str | None) -> Vector:
        """(n,): the chance that each shown item is clicked, the first shown first."""
        s = self.settings
        shown = self.vectors[[self.row[item] for item in items]]
        odds = s.click_base + s.click_taste * (shown @ taste)
        if trigger in self.row:
            odds = odds + s.click_trigger * (shown @ self.vectors[self.row[trigger]])
        return _sigmoid(odds) * self.examination(len(items))

    def examination(self, places: int) -> Vector:
        """(places,): the chance that each place is looked at, the first shown first.

        Shoppers look from the top and stop: each place that is looked at leads to the next one with the
        chance `click_position`, whatever stands there (the cascade of Craswell et al. 2008, in which here a
        click does not end the look).
        """
        return np.asarray(self.settings.click_position ** np.arange(places), dtype=np.float64)

    def examined_places(self, places: int, rng: np.random.Generator) -> int:
        """How many of the places one shopper looks at, drawn by `examination`; at least the first."""
        return int((rng.random() < self.examination(places)).sum())

    def purchase_probability(self, taste: Vector, purchase_taste: Vector, items: Sequence[str]) -> Vector:
        """(n,): the chance that each item is bought once it is clicked."""
        s = self.settings
        rows = [self.row[item] for item in items]
        value = self.factors[rows] @ purchase_taste
        return _sigmoid(s.buy_base + s.buy_value * value + s.buy_taste * (self.vectors[rows] @ taste))


class Shopper:
    """One simulated user: an id, tastes in what to click and to buy, and the items that may open a page."""

    def __init__(self, truth: Truth, user_id: str, past: Sequence[str]) -> None:
        self.user_id = user_id
        self.past = [item for item in past if item in truth.row]
        self.taste = truth.taste(user_id, self.past)
        self.purchase_taste = truth.purchase_taste(user_id, self.past)

    def trigger(self, truth: Truth, rng: np.random.Generator) -> str:
        """The item that opens a page: one of the shopper's past, else any."""
        choices = self.past or truth.items
        return choices[int(rng.integers(len(choices)))]


def population(truth: Truth, pasts: Mapping[str, Sequence[str]]) -> list[Shopper]:
    """One shopper a user, sorted by user id."""
    return [Shopper(truth, user, pasts[user]) for user in sorted(pasts)]
