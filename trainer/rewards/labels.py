"""Reward labels: which reward fields a log has, the values of each event, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from registry.bundles.context import Context
from registry.bundles.rewards import (
    CLICK,
    COMMISSION,
    FIELD_PREFIX,
    PRICE,
    PURCHASE,
    REWARD_NAMES,
    HasPrice,
    Rewards,
    quantile_edges,
)
from trainer.sequences.batches import Int32, Int64
from trainer.sequences.interactions import Interactions
from trainer.sequences.labelled_answers import LabelledAnswers, join_answers
from trainer.sequences.tasks import bought_within
from trainer.settings import RewardSettings

# The value of a field that is not known.
UNKNOWN = -1


def purchase_labels(log: Interactions, window_ms: int) -> Int64:
    """(N,) 1 for a purchase, and for a click whose user bought the item within `window_ms` after it.

    0 for a click whose window closed without a purchase before the newest event of the log; UNKNOWN while the
    window is open, since the user may still buy.
    """
    led = bought_within(log, window_ms)
    is_open = log.ts + window_ms >= log.ts.max(initial=0)
    return np.where(led, 1, np.where(is_open, UNKNOWN, 0))


def reward_values(rewards: Rewards, items: Sequence[HasPrice | None], rows: Int64, bought: Int64) -> Int64:
    """Values (N, 4) of every field of NAMES for N clicks; UNKNOWN where a value is not known.

    `items`: for each row of the catalogue, None where the item has no record; `rows` (N,): the clicked items;
    `bought` (N,): as of `purchase_labels`.
    """
    values = np.full((len(rows), len(REWARD_NAMES)), UNKNOWN, dtype=np.int64)
    values[:, REWARD_NAMES.index(CLICK)] = 1
    values[:, REWARD_NAMES.index(PURCHASE)] = bought
    for name in (PRICE, COMMISSION):
        values[:, REWARD_NAMES.index(name)] = item_bins(rewards, name, items)[rows]
    return values


def item_bins(rewards: Rewards, name: str, items: Sequence[HasPrice | None]) -> Int64:
    """The bin (I,) of each item's price or commission; UNKNOWN where it has none."""
    bins = (None if item is None else rewards.bin_of(name, item) for item in items)
    return np.array([UNKNOWN if number is None else number for number in bins], dtype=np.int64)


def learn_rewards(
    items: Sequence[HasPrice | None],
    log: Interactions,
    bought: Int64,
    unclicked: int,
    settings: RewardSettings,
) -> Rewards | None:
    """The reward fields of a catalogue and a log, with bins and masses; None where rewards are switched off.

    Price and commission are fields where a share `min_share` of the items has one; click and purchase are as
    in `extend_rewards`. A mass is a bin's share of the converting events (purchases, and clicks that led to
    one), or of all events where fewer than `min_count` convert.
    """
    if not settings.enabled:
        return None
    described_items = [item for item in items if item is not None]
    edges = {}
    for name in (PRICE, COMMISSION):
        field_edges = quantile_edges(name, described_items, settings.bins, settings.min_category)
        only_edges = Rewards({name: field_edges}, {})
        if field_edges and (item_bins(only_edges, name, items) >= 0).mean() >= settings.min_share:
            edges[name] = field_edges
    converting = bought == 1
    if converting.sum() < settings.min_count:
        converting = np.ones(len(log), dtype=bool)
    mass = {}
    for name in edges:
        item_bin = item_bins(Rewards(edges, {}), name, items)[log.items]
        bins = item_bin[converting & (item_bin >= 0)]
        if len(bins):
            mass[name] = _shares(bins, settings.bins)
    rewards = Rewards({name: bins for name, bins in edges.items() if name in mass}, mass)
    return extend_rewards(rewards, bought, unclicked, settings)


def extend_rewards(
    rewards: Rewards, bought: Int64, unclicked: int, settings: RewardSettings, context: Context | None = None
) -> Rewards:
    """The rewards with the fields click and purchase, where each of their values occurs `min_count` times.

    `bought` (N,): as of `purchase_labels`, for the log's clicks and purchases; `unclicked`: the number of
    answers that were not clicked. A field without tokens in `context` is not added; None: the context is made
    later, from these rewards.
    """
    purchase_counts = np.bincount(bought[bought >= 0], minlength=2)
    counts_of = {
        CLICK: (unclicked, len(bought)),
        PURCHASE: (int(purchase_counts[0]), int(purchase_counts[1])),
    }
    mass = dict(rewards.mass)
    for name, counts in counts_of.items():
        has_tokens = context is None or FIELD_PREFIX + name in context.fields
        if name not in mass and has_tokens and min(counts) >= settings.min_count:
            # Masses are shares of converting events, all of which were clicked and bought.
            mass[name] = {"0": 0.0, "1": 1.0}
    return replace(rewards, mass=mass)


def _shares(values: Int64, count: int) -> dict[str, float]:
    shares = np.bincount(values, minlength=count) / max(1, len(values))
    return {str(value): float(share) for value, share in enumerate(shares)}


def reward_tokens(values: Int64, rewards: Rewards, context: Context) -> Int32:
    """(N, 4) values of NAMES -> (N, R) token ids of the R reward fields of a context.

    0 where a value is not known, and for a field without a mass: a value that all events share is no signal.
    """
    names = [name for name in context.fields if name.startswith(FIELD_PREFIX)]
    token_ids: npt.NDArray[np.int32] = np.zeros((len(values), len(names)), dtype=np.int32)
    place = {name: at for at, name in enumerate(context.fields)}
    for column, name in enumerate(names):
        field = name.removeprefix(FIELD_PREFIX)
        for value in context.fields[name] if field in rewards.mass else ():
            token = context.row({name: value})[place[name]]
            token_ids[values[:, REWARD_NAMES.index(field)] == int(value), column] = token
    return token_ids


def with_reward_labels(
    log: Interactions,
    items: Sequence[HasPrice | None],
    bought: Int64,
    rewards: Rewards | None,
    context: Context,
) -> Interactions:
    """The log with the reward tokens of its events, by the reward fields of `context`."""
    if rewards is None:
        return log
    return replace(
        log, rewards=reward_tokens(reward_values(rewards, items, log.items, bought), rewards, context)
    )


def answers_with_rewards(
    histories: Sequence[Int64],
    targets: Int64,
    context: Int32,
    values: Int64,
    rewards: Rewards,
    vocabulary: Context,
) -> LabelledAnswers:
    """Answers that brought `values` (N, 4) of each field of NAMES; what was ignored is told so every time."""
    labels = reward_tokens(values, rewards, vocabulary)
    unclicked = np.full((1, len(REWARD_NAMES)), UNKNOWN, dtype=np.int64)
    unclicked[0, REWARD_NAMES.index(CLICK)] = 0
    unclicked_labels = reward_tokens(unclicked, rewards, vocabulary)
    return join_answers(
        histories, targets, context, labels, (labels == unclicked_labels) & (unclicked_labels > 0)
    )
