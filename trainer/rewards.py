"""The rewards that a log's events brought: which fields there are, and each event's tokens of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from registry.context import Context
from registry.rewards import (
    CLICK,
    COMMISSION,
    NAMES,
    PREFIX,
    PRICE,
    PURCHASE,
    Priced,
    Rewards,
    quantile_edges,
)
from trainer.batches import Int32, Int64
from trainer.data import Interactions
from trainer.settings import RewardSettings
from trainer.tasks import bought_within

# Where a value of a field is not known.
UNKNOWN = -1


def purchased(log: Interactions, window_ms: int) -> Int64:
    """(N,) 1 for a purchase and for a click whose user bought the item within `window_ms` after it.

    0 for a click whose window has closed without one, by the newest event of the log; UNKNOWN while it is
    open, since "clicked, not bought" is no fact yet.
    """
    led = bought_within(log, log.starts[1:], window_ms)
    is_open = log.ts + window_ms >= log.ts.max(initial=0)
    return np.where(led, 1, np.where(is_open, UNKNOWN, 0))


def obtained(rewards: Rewards, items: Sequence[Priced | None], log: Interactions, bought: Int64) -> Int64:
    """(N, 4) what each event of a log brought of every field of NAMES; UNKNOWN where it is not known.

    `items`: of each row of the catalogue, None where nothing is known of it; `bought`: as of `purchased`.
    """
    made = np.full((len(log), len(NAMES)), UNKNOWN, dtype=np.int64)
    made[:, NAMES.index(CLICK)] = 1
    made[:, NAMES.index(PURCHASE)] = bought
    for name in (PRICE, COMMISSION):
        made[:, NAMES.index(name)] = item_bins(rewards, name, items)[log.items]
    return made


def item_bins(rewards: Rewards, name: str, items: Sequence[Priced | None]) -> Int64:
    """(I,) the bin of each item's price or commission; UNKNOWN where it has none."""
    found = (None if item is None else rewards.bin_of(name, item) for item in items)
    return np.array([UNKNOWN if one is None else one for one in found], dtype=np.int64)


def learned(
    items: Sequence[Priced | None], log: Interactions, bought: Int64, settings: RewardSettings
) -> Rewards | None:
    """The bins of a catalogue and what a log says of them; None where no field has anything to say.

    A price or a commission is a field where a share `min_share` of the items has one. A click or a purchase
    is one where each value was seen `min_count` times. Masses are of the events that were purchases or led
    to one; of all, where those are fewer than `min_count`.
    """
    if not settings.enabled:
        return None
    there = [item for item in items if item is not None]
    edges = {}
    for name in (PRICE, COMMISSION):
        made = quantile_edges(name, there, settings.bins, settings.min_category)
        bare = Rewards({name: made}, {})
        if made and (item_bins(bare, name, items) >= 0).mean() >= settings.min_share:
            edges[name] = made
    values = obtained(Rewards(edges, {}), items, log, bought)
    converting = bought == 1
    if converting.sum() < settings.min_count:
        converting = np.ones(len(log), dtype=bool)
    mass = {}
    for name, column in zip(NAMES, values.T, strict=True):
        if name in edges:
            some = column[converting & (column >= 0)]
            if len(some):
                mass[name] = _shares(some, settings.bins)
        elif np.bincount(column[column >= 0], minlength=2).min() >= settings.min_count:
            mass[name] = _shares(column[converting & (column >= 0)], 2)
    return Rewards({name: some for name, some in edges.items() if name in mass}, mass) if mass else None


def _shares(values: Int64, count: int) -> dict[str, float]:
    shares = np.bincount(values, minlength=count) / max(1, len(values))
    return {str(value): float(share) for value, share in enumerate(shares)}


def tokens(values: Int64, context: Context) -> Int32:
    """(N, 4) values of NAMES -> (N, R) token ids of the R reward fields of a context, 0 where not known."""
    names = [name for name in context.fields if name.startswith(PREFIX)]
    made: npt.NDArray[np.int32] = np.zeros((len(values), len(names)), dtype=np.int32)
    place = {name: at for at, name in enumerate(context.fields)}
    for column, name in enumerate(names):
        for value in context.fields[name]:
            token = context.row({name: value})[place[name]]
            made[values[:, NAMES.index(name.removeprefix(PREFIX))] == int(value), column] = token
    return made


def told(
    log: Interactions,
    items: Sequence[Priced | None],
    bought: Int64,
    rewards: Rewards | None,
    context: Context,
) -> Interactions:
    """The log with the tokens of what its events brought, by the reward fields of `context`."""
    if rewards is None:
        return log
    return replace(log, rewards=tokens(obtained(rewards, items, log, bought), context))
