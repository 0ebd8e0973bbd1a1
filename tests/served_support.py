"""Held-out users asked through the recommender of the serving agent: what the offline figures must be of."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from registry.bundles.context import Context
from registry.bundles.ranking import Ranking
from registry.decoding.list_rules import ListLimits
from registry.decoding.onnx_generator import OnnxGenerator
from registry.decoding.sid_index import SidIndex
from serving.bundle_loader import LoadedBundle, LoadedRollout
from serving.exploration import Explorer
from serving.recommender import Recommender, Request
from streams.events import Arm, Rollout, Trigger
from streams.settings import HistorySettings
from streams.state import history
from tests.tiny_shop import Shop
from trainer.sequences.held_out import HeldOut

_BOOK = "a" * 16
_NOW_S = 1_700_000_000


def stored_history(sids: list[tuple[int, ...]], bought: np.ndarray, ages_s: np.ndarray) -> bytes | None:
    """The bytes that agents keep of a history, oldest first."""
    changes = []
    for at, (sid, is_bought, age) in enumerate(zip(sids, bought, ages_s, strict=True)):
        kind = history.PURCHASE if is_bought else history.CLICK
        ts = (_NOW_S - int(age)) * 1000 + at
        entry = history.pack_entry(ts, kind, f"e{at}", history.pack_sid(sid))
        changes.append(history.HistoryChange(None, 0, entry))
    value, _, _ = history.apply_changes(
        None, changes, codebook=_BOOK, levels=3, incarnations={"clicks": 1, "purchases": 1},
        bounds=HistorySettings.model_validate({"max_age_days": 10_000}),
    )  # fmt: skip
    return value


def served_lists(
    tiny: Shop, folder: Path, ranking: Ranking, limits: ListLimits, held_out: HeldOut,
    active: np.ndarray | None = None, k: int = 10,
) -> list[list[str]]:  # fmt: skip
    """Item ids of the answer to each held-out user's request from the page of the newest item."""
    generator = OnnxGenerator(folder, tiny.prompt.sizes, tiny.prompt.max_items)
    bundle = LoadedBundle(
        "b0", _BOOK, tiny.prompt.max_items, (), generator, generator.items, ranking, Context()
    )
    rollout = Rollout.new(
        name="s", action="start", trial="t", arms=[Arm(name="champion", bundle="b0", weight=1.0, version="1")]
    )
    index = SidIndex.build(np.array(tiny.catalogue.sids), tiny.catalogue.item_ids, active)
    recommender = Recommender(lambda _: index, limits, Explorer(0, 1, 1.0))
    requests = []
    for user, items in enumerate(held_out.histories):
        trigger = Trigger.new(
            request_id=f"r{user}", user_id=f"u{user}", item_id=tiny.catalogue.item_ids[items[-1]], k=k,
            ts=_NOW_S * 1000 + 500,
        )  # fmt: skip
        sids = [tiny.catalogue.sids[item] for item in items]
        requests.append(Request(trigger, stored_history(sids, held_out.bought[user], held_out.ages_s[user])))
    answers = recommender.recommend(requests, LoadedRollout(rollout, {"b0": bundle}))
    return [[item.item_id for item in answer.recommendation.items] for answer in answers]
