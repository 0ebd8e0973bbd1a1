"""Users' items in time order: the one form that every data set takes before it is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from registry.rewards import Offer

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


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
    offers: list[Offer] | None = None  # (I,) prices and commissions; None where the set has none

    @property
    def size(self) -> int:
        """I, the number of items."""
        return len(self.item_names)

    @property
    def events(self) -> int:
        """How many interactions there are."""
        return sum(map(len, self.items))


def group_events(users: Sequence[str], items: Sequence[str], ts: Int64) -> tuple[
    list[str], list[Int64], list[Int64], list[str]
]:  # fmt: skip
    """Events (N,) of any order -> users, their item rows and times in time order, and the items' names.

    Equal times keep the order given. An item that follows itself counts once, at its first time: a view, the
    cart and the purchase of one thing are one step, and to repeat the last item is no recommendation.
    """
    order = np.argsort(ts, kind="stable")
    rows: dict[str, int] = {}
    found: dict[str, tuple[list[int], list[int]]] = {}
    for n in order.tolist():
        item = rows.setdefault(items[n], len(rows))
        seen, times = found.setdefault(users[n], ([], []))
        if not seen or seen[-1] != item:
            seen.append(item)
            times.append(int(ts[n]))
    sequences = [np.array(seen, np.int64) for seen, _ in found.values()]
    return list(found), sequences, [np.array(times, np.int64) for _, times in found.values()], list(rows)


def flatten(sequences: Sequence[Int64]) -> tuple[Int64, Int64]:
    """Sequences -> (all items (N,), starts (len + 1,)): row r is items[starts[r] : starts[r + 1]]."""
    starts = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum([len(row) for row in sequences], out=starts[1:])
    items = np.concatenate(sequences) if len(sequences) else np.zeros(0, np.int64)
    return items.astype(np.int64), starts


def same_groups(codes: Int64) -> Int64:
    """Codes (I, L) -> (I,) a number that two items share exactly when their SIDs are equal."""
    return np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
