"""Held-out figures for the registry and as words: new events and old ones apart, and forgetting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.offline_checks.bootstrap import relative_changes
from trainer.offline_checks.quality import HeldOutQuality

# Below it the standard error of a hit rate of .1 is more than .03: a third of it.
FEW_USERS = 100


@dataclass(frozen=True)
class Forgetting:
    """The change of HR@10 on events from before the new window, from a parent to its candidate."""

    users: int
    before: float
    now: float
    change: float  # relative to `before`, with its 95 % interval over the users
    low: float
    high: float

    def metrics(self, stage: str) -> dict[str, float]:
        """Figures for the registry, by name; a bound that is not finite is left out."""
        figures = {"": self.change, "_low": self.low, "_high": self.high, "_users": float(self.users)}
        return {f"{stage}/forgetting{end}": value for end, value in figures.items() if np.isfinite(value)}

    def summary(self) -> str:
        """The change in a few words."""
        return f"{self.before:.3f} -> {self.now:.3f} on {self.users:,} old events ({self.change:+.1%})"


def forgetting(parent: HeldOutQuality, candidate: HeldOutQuality) -> Forgetting | None:
    """What a candidate lost of what its parent knew; both are of the same held-out events in the same order.

    None where no event is old, or the parent knew none of them.
    """
    old = ~parent.fresh
    before, now = parent.hits[old].astype(float), candidate.hits[old].astype(float)
    if not before.any():
        return None
    change, low, high = relative_changes(now[:, None], before[:, None], np.arange(len(before)))[0]
    return Forgetting(len(before), float(before.mean()), float(now.mean()), change, low, high)


def quality_metrics(stage: str, quality: HeldOutQuality) -> dict[str, float]:
    """Figures for the registry, by name: `<stage>/hr10` and others."""
    numbers = {
        "users": quality.users, "hr10": quality.hr10, "ndcg10": quality.ndcg10, "validity": quality.validity,
        "dense_weight": quality.ranking.dense_weight,
    }  # fmt: skip
    if quality.purchases:
        numbers["purchase_hr10"] = quality.purchase_hr10
    for age, users in _by_age(quality).items():
        numbers |= {f"{age}_users": len(users)} | ({f"{age}_hr10": users.mean()} if len(users) else {})
    return {f"{stage}/{name}": float(value) for name, value in numbers.items()}


def describe_ages(quality: HeldOutQuality) -> str:
    """HR@10 of new and of old events, as text; empty where all are of one kind."""
    ages = {age: users for age, users in _by_age(quality).items() if len(users)}
    if len(ages) < 2:
        return ""
    return ", ".join(f"{age} {users.mean():.3f} of {len(users):,}" for age, users in ages.items())


def describe_validation(quality: HeldOutQuality | None, validation_users: int) -> str:
    """What a reader must know of the users who judge: that there are none, or few; else empty.

    `validation_users`: those who are left out of training, with or without an event that can be scored.
    """
    setting = "SIDSTREAM_TRAINER__VALIDATION_SHARE"
    if quality is None:
        return f"no held-out figures: of {validation_users:,} validation users nobody is scored ({setting})"
    if quality.users < FEW_USERS:
        return f"held-out figures are of {quality.users:,} users only and differ by chance ({setting})"
    return ""


def _by_age(quality: HeldOutQuality) -> dict[str, np.ndarray]:
    """Hits of the users whose event is of the new window, and of the others."""
    return {"new": quality.hits[quality.fresh], "old": quality.hits[~quality.fresh]}
