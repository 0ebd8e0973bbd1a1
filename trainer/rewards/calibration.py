"""The calibrated chances of a click and of a purchase, from a model's scores and from what happened.

Logistic regressions of the outcome (Platt 1999): of a click on the log-probability of the item, over those
answers that were drawn by chance, so that both outcomes are seen where the model did not choose; of a
purchase after a click on that, and on how often the item was bought when it was clicked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from trainer.sequences.batches import Int64

Floats = npt.NDArray[np.float64]
# Clicks that an item's own rate must have to weigh as much as that of all items.
_PRIOR_CLICKS = 10.0


@dataclass(frozen=True)
class PurchaseRates:
    """Clicks (I,) of each item and those of them (I,) that led to a purchase."""

    clicks: Int64
    sold: Int64

    def logit(self, items: Int64, without: Int64 | None = None) -> Floats:
        """The log-odds (N,) of a purchase after a click on each item, drawn towards that of all items.

        `without` (N,): each row's own outcome, 0 or 1, which is taken out of its item's rate: a rate that has
        seen the outcome that it is to tell looks better than it is.
        """
        clicks, sold = self.clicks[items].astype(np.float64), self.sold[items].astype(np.float64)
        if without is not None:
            clicks, sold = clicks - 1, sold - without
        of_all = (self.sold.sum() + 1) / (self.clicks.sum() + 2)
        rate = (sold + _PRIOR_CLICKS * of_all) / (clicks + _PRIOR_CLICKS)
        made: Floats = np.log(rate / (1 - rate))
        return made


@dataclass(frozen=True)
class CalibratedChances:
    """What tells chances; None where too little happened to tell."""

    purchase_rates: PurchaseRates
    of_click: Any = None
    of_purchase: Any = None

    def click(self, scores: Floats) -> Floats | None:
        """(N,) the chance that an item with such a score is clicked where it is shown first."""
        return None if self.of_click is None else self.of_click.predict_proba(scores[:, None])[:, 1]

    def purchase(self, items: Int64, scores: Floats) -> Floats | None:
        """(N,) the chance that a click on an item with such a score leads to a purchase."""
        if self.of_purchase is None:
            return None
        told = np.stack((self.purchase_rates.logit(items), scores), axis=1)
        made: Floats = self.of_purchase.predict_proba(told)[:, 1]
        return made


def purchase_rates(items: Int64, bought: Int64, size: int) -> PurchaseRates:
    """Of the clicks (N,) on rows of a catalogue of `size`, whose outcomes (N,) are 0 or 1."""
    return PurchaseRates(np.bincount(items, minlength=size), np.bincount(items[bought == 1], minlength=size))


def calibrate_chances(
    known: PurchaseRates, shown: tuple[Floats, Int64], clicked: tuple[Int64, Floats, Int64], least: int
) -> CalibratedChances:
    """Fitted to what was `shown` (scores, clicks 0 or 1) and `clicked` (items, scores, purchases 0 or 1).

    A chance needs `least` of either outcome.
    """
    items, scores, bought = clicked
    told = np.stack((known.logit(items, bought), scores), axis=1)
    return CalibratedChances(
        known,
        _logistic_regression(shown[0][:, None], shown[1], least),
        _logistic_regression(told, bought, least),
    )


def _logistic_regression(features: Floats, outcomes: Int64, least: int) -> Any:
    if np.bincount(outcomes, minlength=2).min() < max(1, least):
        return None
    return make_pipeline(StandardScaler(), LogisticRegression()).fit(features, outcomes)
