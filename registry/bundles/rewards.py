"""Rewards that a request may ask for, beside relevance: a click, a purchase, a price, a commission.

Rewards-in-Context (Yang et al., ICML 2024, arXiv 2402.10207): a model learns each event together with the
rewards that the event brought. A request then names the rewards that it wants. They are fields of the context
(registry.bundles.context), `reward.<name>`: `0` or `1` for a click and a purchase, the number of a quantile
bin for a price and a commission. A field without a value means any reward. The bundle keeps the bins
(`rewards.json`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import log1p
from pathlib import Path
from typing import NamedTuple, Protocol, get_args

import msgspec
import numpy as np

from registry.bundles.context import Context
from streams.errors import SidstreamError
from streams.events import Reward

REWARDS = "rewards.json"
FIELD_PREFIX = "reward."
CLICK, PURCHASE, PRICE, COMMISSION = REWARD_NAMES = get_args(Reward)
# Quantiles over the converting interactions: the value of the highest weight, and of the smallest one.
_HIGH_QUANTILE, _LOW_QUANTILE = 0.9, 0.5
# A value with a smaller share has too few examples in training, so that no request may name it.
_MIN_SHARE = 0.01


class HasPrice(Protocol):
    """An item with a price, from which bins are made: events.CatalogItem, or `Offer`."""

    @property
    def category(self) -> str: ...

    @property
    def price(self) -> float | None: ...

    @property
    def commission_rate(self) -> float | None: ...


class Offer(NamedTuple):
    """The fields of an item that decide its bins."""

    category: str = ""
    price: float | None = None
    commission_rate: float | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    edges: dict[str, dict[str, list[float]]]
    mass: dict[str, dict[str, float]]


def log_value(name: str, item: HasPrice) -> float | None:
    """log(1 + price), or log(1 + price * commission rate), of one unit; None where the item does not say."""
    if item.price is None:
        return None
    if name == PRICE:
        return log1p(item.price)
    return None if item.commission_rate is None else log1p(item.price * item.commission_rate)


def quantile_edges(name: str, items: Iterable[HasPrice], bins: int, min_items: int) -> dict[str, list[float]]:
    """The edges between `bins` quantile bins of each category with `min_items` values, and of all items ("").

    (bins - 1,) ascending; a value on an edge is of the upper bin. Empty without any value.
    """
    values: dict[str, list[float]] = {}
    for item in items:
        value = log_value(name, item)
        if value is not None:
            values.setdefault("", []).append(value)
            if item.category:
                values.setdefault(item.category, []).append(value)
    quantiles = np.arange(1, bins) / bins
    return {
        category: np.quantile(of_category, quantiles).tolist()
        for category, of_category in values.items()
        if not category or len(of_category) >= min_items
    }


@dataclass(frozen=True)
class Rewards:
    """The bins of a bundle, and how often each value occurred.

    `edges`: the edges between a field's bins, by category; "" for all other categories. `mass`: the share of
    each value of a field among the converting interactions. A request can ask for the fields in `mass`.
    """

    edges: Mapping[str, Mapping[str, Sequence[float]]]
    mass: Mapping[str, Mapping[str, float]]

    @property
    def fields(self) -> dict[str, list[str]]:
        """The values of each field that have a token in a model.

        A click and a purchase always have tokens. A log of purchases alone gives neither of them a meaning,
        but a model that starts from it may learn them from a later log.
        """
        binary = {CLICK: ["0", "1"], PURCHASE: ["0", "1"]}
        values_of = binary | {name: list(values) for name, values in self.mass.items()}
        return {name: values_of[name] for name in REWARD_NAMES if name in values_of}

    def bin_of(self, name: str, item: HasPrice) -> int | None:
        """The bin (from 0) of an item's price or commission in its category; None for an item without it."""
        value = log_value(name, item)
        if value is None or name not in self.edges:
            return None
        edges = self.edges[name]
        return bisect_right(edges.get(item.category, edges[""]), value)

    def requested_rewards(self, weights: Mapping[Reward, float]) -> dict[str, int]:
        """The value of each field for a request's weights: RiC's l-infinity mapping (section 3.3 there).

        With w the weights over their sum and n the number of weights above 0, the field of the highest weight
        gets `high`, every other one `low + min(n * w, 1) * (high - low)`, rounded. A weight of 0 gets no
        value. High is the value that nine of ten conversions do not exceed. Low is the median of conversions,
        where RiC has the worst value: a small weight must not lead to less than no weight does. A value with
        few conversions is replaced by the nearest one of `supported_values`. Fields that the bundle does not
        have are ignored.
        """
        positive = {
            name: weights[name] for name in REWARD_NAMES if weights.get(name, 0) > 0 and self.mass.get(name)
        }
        # Divided by the largest before they are summed: the sum of very small weights could be zero.
        largest = max(positive.values(), default=0.0)
        scaled = {name: weight / largest for name, weight in positive.items()}
        total = sum(scaled.values())
        rewards = {}
        for name, weight in scaled.items():
            low, high = self._quantile(name, _LOW_QUANTILE), self._quantile(name, _HIGH_QUANTILE)
            share = 1.0 if weight == 1 else min(len(scaled) * weight / total, 1.0)
            value = low + share * (high - low)
            rewards[name] = min(self.supported_values(name), key=lambda supported: abs(supported - value))
        return rewards

    def _quantile(self, name: str, share: float) -> int:
        values = sorted((int(value), mass) for value, mass in self.mass[name].items())
        for (value, _), below in zip(values, accumulate(mass for _, mass in values), strict=True):
            if below >= share * (1 - 1e-9):
                return value
        return values[-1][0]

    def supported_values(self, name: str) -> list[int]:
        """The values of a field with enough conversions, ascending; at least one."""
        mass = self.mass[name]
        largest = max(mass.values())
        return sorted(int(value) for value, share in mass.items() if share >= min(_MIN_SHARE, largest))


def reward_fields(rewards: Mapping[str, int]) -> dict[str, str]:
    """Rewards, value by name, as fields of a context."""
    return {FIELD_PREFIX + name: str(value) for name, value in rewards.items()}


def without_reward_fields(context: Context) -> Context:
    """A context without its reward fields; the tokens of the other fields stay the same."""
    return Context(
        context.first,
        {name: values for name, values in context.fields.items() if not name.startswith(FIELD_PREFIX)},
    )


def with_reward_fields(context: Context, rewards: Rewards | None) -> Context:
    """A context with the values of the reward fields after all of its own."""
    fields = rewards.fields if rewards else {}
    return Context(
        context.first, dict(context.fields) | {FIELD_PREFIX + name: v for name, v in fields.items()}
    )


def write(rewards: Rewards | None, folder: Path) -> None:
    """Write the bins into a bundle's folder. None writes no file."""
    if rewards is not None:
        text = msgspec.json.encode({"edges": rewards.edges, "mass": rewards.mass})
        (folder / REWARDS).write_bytes(msgspec.json.format(text, indent=1) + b"\n")


def read(folder: Path) -> Rewards | None:
    """Read the bins of a bundle; None without the file. Raises SidstreamError for a damaged file."""
    path = folder / REWARDS
    if not path.exists():
        return None
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise SidstreamError(f"{path} has no bins of rewards ({error}); fetch the bundle again") from error
    return Rewards(file.edges, file.mass)
