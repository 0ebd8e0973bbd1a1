"""What a request may ask of its items beside relevance: a click, a purchase, a price, a commission.

Rewards-in-Context (Yang et al., ICML 2024, arXiv 2402.10207): a model learns each event under the rewards
that it brought, and is later asked under the rewards that are wanted. They are fields of the context
(registry.bundles.context), `reward.<name>`: `0` or `1` for a click and a purchase, the number of a quantile
bin for a price and a commission. A field that is not said means any. The bins are frozen in the bundle
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
# Of the converting interactions: what the highest weight asks for, and what the smallest one does.
_HIGH, _LOW = 0.9, 0.5
# A model has hardly seen a value that is rarer than this: it is not asked for it.
_LEAST = 0.01


class HasPrice(Protocol):
    """What bins are made of: events.CatalogItem, or `Offer`."""

    @property
    def category(self) -> str: ...

    @property
    def price(self) -> float | None: ...

    @property
    def commission_rate(self) -> float | None: ...


class Offer(NamedTuple):
    """The part of an item that its bins are made of."""

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
    at = np.arange(1, bins) / bins
    return {
        category: np.quantile(some, at).tolist()
        for category, some in values.items()
        if not category or len(some) >= min_items
    }


@dataclass(frozen=True)
class Rewards:
    """The frozen bins of a bundle, and how often each value was obtained.

    `edges`: of a field's bins, by category, "" for all others. `mass`: share of each value of a field among
    the interactions that converted; the fields that it has are those that a request can ask for.
    """

    edges: Mapping[str, Mapping[str, Sequence[float]]]
    mass: Mapping[str, Mapping[str, float]]

    @property
    def fields(self) -> dict[str, list[str]]:
        """The values of every field that a model has tokens for.

        A click and a purchase have them before there is anything to tell: a log of purchases alone says
        nothing of either, and a model that was made from it may learn them from a later one.
        """
        binary = {CLICK: ["0", "1"], PURCHASE: ["0", "1"]}
        known = binary | {name: list(values) for name, values in self.mass.items()}
        return {name: known[name] for name in REWARD_NAMES if name in known}

    def bin_of(self, name: str, item: HasPrice) -> int | None:
        """The bin of an item's price or commission, from 0, among its category's; None: it has none."""
        value = log_value(name, item)
        if value is None or name not in self.edges:
            return None
        edges = self.edges[name]
        return bisect_right(edges.get(item.category, edges[""]), value)

    def wanted(self, weights: Mapping[Reward, float]) -> dict[str, int]:
        """The value of each field that preferences ask for: RiC's l-infinity mapping (section 3.3 there).

        With w the weights over their sum and n the weights above 0, the highest-weighted field asks for
        `high`, every other one for `low + min(n * w, 1) * (high - low)`, rounded; a weight of 0 asks for
        nothing. High is the value that nine of ten conversions do not exceed. Low is their median, where
        RiC has the worst value: a small wish must not ask for less than none does. A value that few
        conversions have gives way to the nearest one that enough have. Fields that the bundle does not
        know are passed over.
        """
        asked = {
            name: weights[name] for name in REWARD_NAMES if weights.get(name, 0) > 0 and self.mass.get(name)
        }
        # Over the largest first: weights may be as small as numbers are.
        most = max(asked.values(), default=0.0)
        scaled = {name: weight / most for name, weight in asked.items()}
        total = sum(scaled.values())
        made = {}
        for name, weight in scaled.items():
            low, high = self._quantile(name, _LOW), self._quantile(name, _HIGH)
            share = 1.0 if weight == 1 else min(len(scaled) * weight / total, 1.0)
            value = low + share * (high - low)
            made[name] = min(self.supported(name), key=lambda one: abs(one - value))
        return made

    def _quantile(self, name: str, share: float) -> int:
        values = sorted((int(value), mass) for value, mass in self.mass[name].items())
        for (value, _), below in zip(values, accumulate(mass for _, mass in values), strict=True):
            if below >= share * (1 - 1e-9):
                return value
        return values[-1][0]

    def supported(self, name: str) -> list[int]:
        """The values of a field that enough conversions have, ascending; one at least."""
        mass = self.mass[name]
        most = max(mass.values())
        return sorted(int(one) for one, share in mass.items() if share >= min(_LEAST, most))


def reward_fields(conditions: Mapping[str, int]) -> dict[str, str]:
    """Conditions as what a request says: fields of a context."""
    return {FIELD_PREFIX + name: str(value) for name, value in conditions.items()}


def without_reward_fields(context: Context) -> Context:
    """The part of a context that requests say without preferences; its tokens stay as they are."""
    return Context(
        context.first,
        {name: values for name, values in context.fields.items() if not name.startswith(FIELD_PREFIX)},
    )


def with_reward_fields(context: Context, rewards: Rewards | None) -> Context:
    """A context and, behind all that it has, the values of reward fields."""
    fields = rewards.fields if rewards else {}
    return Context(
        context.first, dict(context.fields) | {FIELD_PREFIX + name: v for name, v in fields.items()}
    )


def write(rewards: Rewards | None, folder: Path) -> None:
    """Put the bins into a bundle's folder; None is no file."""
    if rewards is not None:
        made = msgspec.json.encode({"edges": rewards.edges, "mass": rewards.mass})
        (folder / REWARDS).write_bytes(msgspec.json.format(made, indent=1) + b"\n")


def read(folder: Path) -> Rewards | None:
    """The bins of a bundle; None where it has no file of them. Raises SidstreamError."""
    path = folder / REWARDS
    if not path.exists():
        return None
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise SidstreamError(f"{path} has no bins of rewards ({error}); fetch the bundle again") from error
    return Rewards(file.edges, file.mass)
