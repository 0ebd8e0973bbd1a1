"""Which models the offline check turns away, and that the remedy is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from registry.ranking import Ranking
from streams.errors import SidstreamError
from trainer.offline_check import check_finite, failing, failing_first
from trainer.quality import Quality
from trainer.settings import TrainerSettings

SETTINGS = TrainerSettings.model_validate({"min_validity": 0.9, "max_fall": 0.1})


def quality(hr10: float = 0.2, validity: float = 1.0) -> Quality:
    return Quality(100, hr10, hr10 / 2, validity, Ranking())


def test_a_model_that_spells_too_few_sids_is_turned_away_first_or_not() -> None:
    for reason in (
        failing(quality(validity=0.89), None, SETTINGS),
        failing_first(quality(validity=0.89), 0.0, SETTINGS),
    ):
        assert reason is not None
        assert "SIDSTREAM_TRAINER__MIN_VALIDITY" in reason
    assert failing(quality(validity=0.9), None, SETTINGS) is None


def test_a_model_may_fall_below_its_parent_by_the_margin_and_no_more() -> None:
    assert failing(quality(0.181), 0.2, SETTINGS) is None
    reason = failing(quality(0.179), 0.2, SETTINGS)
    assert reason is not None
    assert "SIDSTREAM_TRAINER__MAX_FALL" in reason


def test_a_first_model_must_reach_popularity_unless_that_is_allowed() -> None:
    assert failing_first(quality(0.2), 0.2, SETTINGS) is None
    reason = failing_first(quality(0.19), 0.2, SETTINGS)
    assert reason is not None
    assert "SIDSTREAM_TRAINER__BEAT_POPULARITY=false" in reason
    allowed = SETTINGS.model_copy(update={"beat_popularity": False})
    assert failing_first(quality(0.19), 0.2, allowed) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_diverged_is_named_with_the_setting_to_change(value: float) -> None:
    model = nn.Linear(2, 2)
    check_finite(model)
    with torch.no_grad():
        model.bias[1] = value
    with pytest.raises(SidstreamError, match="SIDSTREAM_TRAINER__LR"):
        check_finite(model)
