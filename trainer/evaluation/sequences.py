"""Users' items in time order: the one form that every data set takes before it is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from registry.bundles.rewards import Offer

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

# A click counts as bought where its user buys the item within this time after it, milliseconds.
BUY_WITHIN_MS = 86_400_000


@dataclass(frozen=True)
class Sequences:
    """What users did. An item is its row, 0 to I - 1, in the order of first appearance."""

    name: str
    users: list[str]
    items: list[Int64]  # a user's item rows, oldest first
    item_names: list[str]  # (I,)
    texts: list[str]  # (I,) what is known of an item in words; "" where nothing is
    ts: list[Int64] | None = None  # times of `items`, milliseconds since 1970; None where the set has none
    categories: list[str] | None = None  # (I,); "" where an item has none
    sids: Int64 | None = None  # (I, L) published codes, which two items may share
    profiles: list[dict[str, str]] | None = None  # (U,) attributes of each user; None where the set has none
    # Of `items`: whether it was bought then or, by its user, within a day after; None where nothing tells.
    bought: list[Bool] | None = None
    bought_ts: list[Int64] | None = None  # when, milliseconds since 1970; -1 where it was not
    offers: list[Offer] | None = None  # (I,) prices and commissions; None where the set has none

    @property
    def size(self) -> int:
        """I, the number of items."""
        return len(self.item_names)

    @property
    def events(self) -> int:
        """How many interactions there are."""
        return sum(map(len, self.items))


class Grouped(NamedTuple):
    """Events by user; users and items in the order of their first event."""

    users: list[str]
    items: list[Int64]  # item rows, oldest first
    ts: list[Int64]  # of `items`, milliseconds
    item_names: list[str]  # (I,)
    bought: list[Bool] | None  # as in `Sequences`
    bought_ts: list[Int64] | None


def group_events(
    users: Sequence[str], items: Sequence[str], ts: Int64, purchase: Sequence[bool] | None = None
) -> Grouped:
    """Events (N,) of any order -> users, their item rows and times in time order, and the items' names.

    Equal times keep the order given. An item that follows itself counts once, at its first time: a view, the
    cart and the purchase of one thing are one step, and to repeat the last item is no recommendation.

    `purchase` (N,): which events are purchases. A step is bought where one of its events is a purchase, or
    has one of its item by its user within a day after it; the first such purchase is when.
    """
    order = np.argsort(ts, kind="stable")
    when = np.full(len(ts), -1) if purchase is None else _bought_at(users, items, ts, purchase, order)
    rows: dict[str, int] = {}
    found: dict[str, tuple[list[int], list[int], list[int]]] = {}
    for n in order.tolist():
        item = rows.setdefault(items[n], len(rows))
        seen, times, bought = found.setdefault(users[n], ([], [], []))
        if not seen or seen[-1] != item:
            seen.append(item)
            times.append(int(ts[n]))
            bought.append(int(when[n]))
        elif bought[-1] < 0:
            bought[-1] = int(when[n])
    sequences, moments, at = (
        [np.array(lists[part], np.int64) for lists in found.values()] for part in range(3)
    )
    told = purchase is not None
    flags = [row >= 0 for row in at] if told else None
    return Grouped(list(found), sequences, moments, list(rows), flags, at if told else None)


def _bought_at(
    users: Sequence[str], items: Sequence[str], ts: Int64, purchase: Sequence[bool], order: Int64
) -> Int64:
    """(N,) time of the first purchase of an event's item by its user, itself or up to a day later; or -1."""
    following: dict[tuple[str, str], int] = {}
    when = np.full(len(ts), -1, np.int64)
    for n in order[::-1].tolist():
        key = users[n], items[n]
        if purchase[n]:
            following[key] = int(ts[n])
        later = following.get(key)
        if later is not None and later - ts[n] <= BUY_WITHIN_MS:
            when[n] = later
    return when


def flatten(sequences: Sequence[Int64]) -> tuple[Int64, Int64]:
    """Sequences -> (all items (N,), starts (len + 1,)): row r is items[starts[r] : starts[r + 1]]."""
    starts = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum([len(row) for row in sequences], out=starts[1:])
    items = np.concatenate(sequences) if len(sequences) else np.zeros(0, np.int64)
    return items.astype(np.int64), starts


def same_groups(codes: Int64) -> Int64:
    """Codes (I, L) -> (I,) a number that two items share exactly when their SIDs are equal."""
    return np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
