"""The rewards that a log's events brought: which fields there are, and each event's tokens of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from registry.bundles.context import Context
from registry.bundles.rewards import (
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
from trainer.sequences.batches import Int32, Int64
from trainer.sequences.interactions import Interactions
from trainer.sequences.labelled_answers import LabelledAnswers, join_answers
from trainer.sequences.tasks import bought_within
from trainer.settings import RewardSettings

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


def obtained(rewards: Rewards, items: Sequence[Priced | None], rows: Int64, bought: Int64) -> Int64:
    """(N, 4) what N clicks on items brought of every field of NAMES; UNKNOWN where it is not known.

    `items`: of each row of the catalogue, None where nothing is known of it; `rows` (N,): the items that were
    clicked; `bought` (N,): as of `purchased`.
    """
    made = np.full((len(rows), len(NAMES)), UNKNOWN, dtype=np.int64)
    made[:, NAMES.index(CLICK)] = 1
    made[:, NAMES.index(PURCHASE)] = bought
    for name in (PRICE, COMMISSION):
        made[:, NAMES.index(name)] = item_bins(rewards, name, items)[rows]
    return made


def item_bins(rewards: Rewards, name: str, items: Sequence[Priced | None]) -> Int64:
    """(I,) the bin of each item's price or commission; UNKNOWN where it has none."""
    found = (None if item is None else rewards.bin_of(name, item) for item in items)
    return np.array([UNKNOWN if one is None else one for one in found], dtype=np.int64)


def learned(
    items: Sequence[Priced | None], log: Interactions, bought: Int64, ignored: int, settings: RewardSettings
) -> Rewards | None:
    """The bins of a catalogue and what a log says of them; None where rewards are switched off.

    A price or a commission is a field where a share `min_share` of the items has one; a click or a purchase
    as in `grown`. Masses are of the events that were purchases or led to one; of all, where those are fewer
    than `min_count`.
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
    converting = bought == 1
    if converting.sum() < settings.min_count:
        converting = np.ones(len(log), dtype=bool)
    mass = {}
    for name in edges:
        of = item_bins(Rewards(edges, {}), name, items)[log.items]
        some = of[converting & (of >= 0)]
        if len(some):
            mass[name] = _shares(some, settings.bins)
    known = Rewards({name: some for name, some in edges.items() if name in mass}, mass)
    return grown(known, bought, ignored, settings)


def grown(
    rewards: Rewards, bought: Int64, ignored: int, settings: RewardSettings, context: Context | None = None
) -> Rewards:
    """Rewards that know of clicks and purchases, too, once each value of them was seen `min_count` times.

    `bought` (N,): as of `purchased`, of the log's clicks and purchases; `ignored`: answers that were not
    clicked. A `context` without tokens for a field learns nothing of it; None: it is not made yet.
    """
    sold = np.bincount(bought[bought >= 0], minlength=2)
    seen = {CLICK: (ignored, len(bought)), PURCHASE: (int(sold[0]), int(sold[1]))}
    mass = dict(rewards.mass)
    for name, counts in seen.items():
        spoken = context is None or PREFIX + name in context.fields
        if name not in mass and spoken and min(counts) >= settings.min_count:
            # Of what converted, which is what masses are of: all of it was clicked and bought.
            mass[name] = {"0": 0.0, "1": 1.0}
    return replace(rewards, mass=mass)


def _shares(values: Int64, count: int) -> dict[str, float]:
    shares = np.bincount(values, minlength=count) / max(1, len(values))
    return {str(value): float(share) for value, share in enumerate(shares)}


def tokens(values: Int64, rewards: Rewards, context: Context) -> Int32:
    """(N, 4) values of NAMES -> (N, R) token ids of the R reward fields of a context.

    0 where a value is not known, and for a field that nothing can be asked of yet: what every event has says
    nothing.
    """
    names = [name for name in context.fields if name.startswith(PREFIX)]
    made: npt.NDArray[np.int32] = np.zeros((len(values), len(names)), dtype=np.int32)
    place = {name: at for at, name in enumerate(context.fields)}
    for column, name in enumerate(names):
        field = name.removeprefix(PREFIX)
        for value in context.fields[name] if field in rewards.mass else ():
            token = context.row({name: value})[place[name]]
            made[values[:, NAMES.index(field)] == int(value), column] = token
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
    return replace(log, rewards=tokens(obtained(rewards, items, log.items, bought), rewards, context))


def labelled(
    histories: Sequence[Int64], targets: Int64, context: Int32, values: Int64, worth: Rewards, known: Context
) -> LabelledAnswers:
    """Answers that brought `values` (N, 4) of each field of NAMES; what was ignored is told so every time."""
    made = tokens(values, worth, known)
    never = np.full((1, len(NAMES)), UNKNOWN, dtype=np.int64)
    never[0, NAMES.index(CLICK)] = 0
    refused = tokens(never, worth, known)
    return join_answers(histories, targets, context, made, (made == refused) & (refused > 0))
