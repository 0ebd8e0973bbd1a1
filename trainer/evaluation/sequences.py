"""Users' items in time order: the form of every data set before it is split."""

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
PURCHASE_WINDOW_MS = 86_400_000


@dataclass(frozen=True)
class SequenceDataset:
    """What users did, by user. An item is a row number, 0 to I - 1, in the order of first appearance."""

    name: str
    users: list[str]
    items: list[Int64]  # a user's item rows, oldest first
    item_names: list[str]  # (I,)
    texts: list[str]  # (I,) title of each item; "" where it has none
    ts: list[Int64] | None = None  # times of `items`, milliseconds since 1970; None where the set has none
    categories: list[str] | None = None  # (I,); "" where an item has none
    sids: Int64 | None = None  # (I, L) published codes, which two items may share
    profiles: list[dict[str, str]] | None = None  # (U,) attributes of each user; None where the set has none
    # For each of `items`, whether its user bought it then or within a day after; None where the set has no
    # purchases.
    bought: list[Bool] | None = None
    bought_ts: list[Int64] | None = None  # time of that purchase, milliseconds since 1970; -1 without one
    offers: list[Offer] | None = None  # (I,) prices and commissions; None where the set has none

    @property
    def size(self) -> int:
        """I, the number of items."""
        return len(self.item_names)

    @property
    def events(self) -> int:
        """How many interactions there are."""
        return sum(map(len, self.items))


class GroupedEvents(NamedTuple):
    """Events by user; users and items in the order of their first event."""

    users: list[str]
    items: list[Int64]  # item rows, oldest first
    ts: list[Int64]  # of `items`, milliseconds
    item_names: list[str]  # (I,)
    bought: list[Bool] | None  # as in `SequenceDataset`
    bought_ts: list[Int64] | None


def group_events_by_user(
    users: Sequence[str], items: Sequence[str], ts: Int64, purchase: Sequence[bool] | None = None
) -> GroupedEvents:
    """Events (N,) of any order -> users, their item rows and times in time order, and the items' names.

    Equal times keep the order given. An item that follows itself counts once, at its first time: a view, the
    cart and the purchase of one thing are one step, and to repeat the last item is no recommendation.

    `purchase` (N,): which events are purchases. A step is bought where one of its events is a purchase, or
    its user buys its item within a day after it; `bought_ts` is the time of the first such purchase.
    """
    order = np.argsort(ts, kind="stable")
    when = np.full(len(ts), -1) if purchase is None else _bought_at(users, items, ts, purchase, order)
    rows: dict[str, int] = {}
    by_user: dict[str, tuple[list[int], list[int], list[int]]] = {}
    for n in order.tolist():
        item = rows.setdefault(items[n], len(rows))
        item_rows, times, bought = by_user.setdefault(users[n], ([], [], []))
        if not item_rows or item_rows[-1] != item:
            item_rows.append(item)
            times.append(int(ts[n]))
            bought.append(int(when[n]))
        elif bought[-1] < 0:
            bought[-1] = int(when[n])
    sequences, item_ts, purchase_ts = (
        [np.array(lists[part], np.int64) for lists in by_user.values()] for part in range(3)
    )
    has_purchases = purchase is not None
    flags = [row >= 0 for row in purchase_ts] if has_purchases else None
    return GroupedEvents(
        list(by_user), sequences, item_ts, list(rows), flags, purchase_ts if has_purchases else None
    )


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
        if later is not None and later - ts[n] <= PURCHASE_WINDOW_MS:
            when[n] = later
    return when


def flatten(sequences: Sequence[Int64]) -> tuple[Int64, Int64]:
    """Sequences -> (all items (N,), starts (len + 1,)): row r is items[starts[r] : starts[r + 1]]."""
    starts = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum([len(row) for row in sequences], out=starts[1:])
    items = np.concatenate(sequences) if len(sequences) else np.zeros(0, np.int64)
    return items.astype(np.int64), starts


def sid_groups(codes: Int64) -> Int64:
    """Codes (I, L) -> (I,) a number that two items share exactly when their SIDs are equal."""
    return np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
