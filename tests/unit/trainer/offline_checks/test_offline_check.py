"""Which models the offline check turns away, and that the remedy is named."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from registry.bundles.ranking import Ranking
from streams.errors import SidstreamError
from tests.tiny_shop import shop
from trainer.cycle_result import CycleResult
from trainer.offline_checks.offline_check import (
    check_finite,
    held_out_probe,
    reason_to_refuse,
    reason_to_refuse_first,
)
from trainer.offline_checks.quality import HeldOutQuality, describe_change, for_json
from trainer.settings import TrainerSettings
from trainer.tuning.sft import SftResult

SETTINGS = TrainerSettings.model_validate({"min_validity": 0.9, "max_fall": 0.1})


def quality(hr10: float = 0.2, validity: float = 1.0) -> HeldOutQuality:
    return HeldOutQuality(100, hr10, hr10 / 2, validity, Ranking())


def test_alignment_is_watched_on_clicks_unless_most_of_what_is_held_out_was_bought() -> None:
    tiny_shop = shop()
    held_out, users = tiny_shop.split.held_out, len(tiny_shop.split.held_out.targets)
    few, most = np.arange(users) < 3, np.arange(users) >= 3

    def probed_users(paid: np.ndarray | None, count: int = 500) -> int:
        chosen = tiny_shop.settings.model_copy(
            update={"dpo": tiny_shop.settings.dpo.model_copy(update={"probe_users": count})}
        )
        probe = held_out_probe(
            held_out._replace(target_bought=paid), tiny_shop.catalogue, tiny_shop.sids, chosen, Ranking()
        )
        return len(probe(tiny_shop.model()).hits) if probe else 0

    assert users == 10
    assert [
        probed_users(None),
        probed_users(few),
        probed_users(most),
        probed_users(few, 5),
        probed_users(few, 0),
    ] == [10, 7, 10, 5, 0]


def test_a_change_is_told_of_clicks_and_of_purchases_with_what_users_leave_open() -> None:
    before, now = np.arange(200) % 4 == 0, np.arange(200) % 4 <= 1
    paid = np.arange(200) >= 120

    def of(hits: np.ndarray, paid: np.ndarray) -> HeldOutQuality:
        return replace(quality(), hits=hits, paid=paid)

    description = describe_change(of(before, paid), of(np.where(paid, now, before), paid))
    changes = re.findall(r"([+-][\d.]+)%", description)
    assert description.startswith("HR@10 of what was clicked 0.250 -> 0.250 (+0.0%, +0.0% to +0.0%), ")
    assert "of what was bought 0.250 -> 0.500 (+100.0%, " in description
    # What an independent bootstrap of the ratio leaves open: the base is a mean over users as well.
    pairs = (before[120:].astype(float), now[120:].astype(float))
    expected = stats.bootstrap(
        pairs, lambda x, y, axis: y.mean(axis) / x.mean(axis) - 1, paired=True, method="percentile",
        n_resamples=4000, random_state=1,
    ).confidence_interval  # fmt: skip
    low, high = (float(change) / 100 for change in changes[-2:])
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.15)
    assert "bought" not in describe_change(of(before, ~before & before), of(now, paid))
    assert describe_change(of(before & ~before, paid), of(now, paid)) == ""
    json_fields = for_json(CycleResult(sft=SftResult(1, 1.0, 1.0, 1.0, of(before, paid), "done")))
    assert json.loads(json.dumps(json_fields))["sft"]["quality"]["hr10"] == 0.2


def test_a_model_that_spells_too_few_sids_is_turned_away_first_or_not() -> None:
    for reason in (
        reason_to_refuse(quality(validity=0.89), None, SETTINGS),
        reason_to_refuse_first(quality(validity=0.89), 0.0, SETTINGS),
    ):
        assert reason is not None
        assert "SIDSTREAM_TRAINER__MIN_VALIDITY" in reason
    assert reason_to_refuse(quality(validity=0.9), None, SETTINGS) is None


def test_a_model_may_fall_below_its_parent_by_the_margin_and_no_more() -> None:
    assert reason_to_refuse(quality(0.181), 0.2, SETTINGS) is None
    reason = reason_to_refuse(quality(0.179), 0.2, SETTINGS)
    assert reason is not None
    assert "SIDSTREAM_TRAINER__MAX_FALL" in reason


def test_a_first_model_must_reach_popularity_unless_that_is_allowed() -> None:
    assert reason_to_refuse_first(quality(0.2), 0.2, SETTINGS) is None
    reason = reason_to_refuse_first(quality(0.19), 0.2, SETTINGS)
    assert reason is not None
    assert "SIDSTREAM_TRAINER__BEAT_POPULARITY=false" in reason
    allowed = SETTINGS.model_copy(update={"beat_popularity": False})
    assert reason_to_refuse_first(quality(0.19), 0.2, allowed) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_diverged_is_named_with_the_setting_to_change(value: float) -> None:
    model = nn.Linear(2, 2)
    check_finite(model)
    with torch.no_grad():
        model.bias[1] = value
    with pytest.raises(SidstreamError, match="SIDSTREAM_TRAINER__LR"):
        check_finite(model)
