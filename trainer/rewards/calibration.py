"""Calibrated probabilities of a click and of a purchase, from a model's scores and the outcomes in the log.

Logistic regressions of the outcome (Platt 1999): of a click on the log-probability of the item, over
explorations, which are drawn by chance and so have outcomes of items that the model would not choose; of a
purchase after a click on that log-probability and on the item's own purchase rate.
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
# With so many clicks an item's own rate weighs as much as the rate of all items.
_PRIOR_CLICKS = 10.0


@dataclass(frozen=True)
class PurchaseRates:
    """Clicks (I,) of each item and those of them (I,) that led to a purchase."""

    clicks: Int64
    purchases: Int64

    def logit(self, items: Int64, own_outcomes: Int64 | None = None) -> Floats:
        """The log-odds (N,) of a purchase after a click on each item, drawn towards that of all items.

        `own_outcomes` (N,): each row's own outcome, 0 or 1, which is taken out of its item's rate. A rate
        that contains the outcome that it predicts looks better than it is.
        """
        clicks, purchases = self.clicks[items].astype(np.float64), self.purchases[items].astype(np.float64)
        if own_outcomes is not None:
            clicks, purchases = clicks - 1, purchases - own_outcomes
        overall_rate = (self.purchases.sum() + 1) / (self.clicks.sum() + 2)
        rate = (purchases + _PRIOR_CLICKS * overall_rate) / (clicks + _PRIOR_CLICKS)
        log_odds: Floats = np.log(rate / (1 - rate))
        return log_odds


@dataclass(frozen=True)
class CalibratedChances:
    """The fitted regressions; None where there are too few outcomes to fit one."""

    item_rates: PurchaseRates
    of_click: Any = None
    of_purchase: Any = None

    def click(self, scores: Floats) -> Floats | None:
        """(N,) the chance that an item with such a score is clicked where it is shown first."""
        return None if self.of_click is None else self.of_click.predict_proba(scores[:, None])[:, 1]

    def purchase(self, items: Int64, scores: Floats) -> Floats | None:
        """(N,) the chance that a click on an item with such a score leads to a purchase."""
        if self.of_purchase is None:
            return None
        features = np.stack((self.item_rates.logit(items), scores), axis=1)
        chances: Floats = self.of_purchase.predict_proba(features)[:, 1]
        return chances


def purchase_rates(items: Int64, bought: Int64, size: int) -> PurchaseRates:
    """The rates of clicks (N,) on rows of a catalogue of `size`, with outcomes (N,) 0 or 1."""
    return PurchaseRates(np.bincount(items, minlength=size), np.bincount(items[bought == 1], minlength=size))


def calibrate_chances(
    item_rates: PurchaseRates,
    explored: tuple[Floats, Int64],
    clicked: tuple[Int64, Floats, Int64],
    min_outcomes: int,
) -> CalibratedChances:
    """Fitted to what was `explored` (scores, clicks 0 or 1) and `clicked` (items, scores, purchases 0 or 1).

    A chance needs `min_outcomes` of either outcome.
    """
    items, scores, bought = clicked
    features = np.stack((item_rates.logit(items, bought), scores), axis=1)
    return CalibratedChances(
        item_rates,
        _logistic_regression(explored[0][:, None], explored[1], min_outcomes),
        _logistic_regression(features, bought, min_outcomes),
    )


def _logistic_regression(features: Floats, outcomes: Int64, min_outcomes: int) -> Any:
    if np.bincount(outcomes, minlength=2).min() < max(1, min_outcomes):
        return None
    return make_pipeline(StandardScaler(), LogisticRegression()).fit(features, outcomes)
