"""Held-out figures of new and of old events, and what a reader is told of those who judge."""

from __future__ import annotations

import numpy as np
import pytest

from registry.bundles.ranking import Ranking
from trainer.offline_checks.quality import HeldOutQuality
from trainer.offline_checks.quality_report import (
    FEW_USERS,
    describe_ages,
    describe_validation,
    forgetting,
    quality_metrics,
)


def quality(hits: str, fresh: str) -> HeldOutQuality:
    """One digit a user: whether its item is among the ten best, and whether it is of the new window."""
    hit, new = (np.array([digit == "1" for digit in digits], dtype=bool) for digits in (hits, fresh))
    return HeldOutQuality(
        len(hit), float(hit.mean()), 0.1, 1.0, Ranking(), hits=hit, paid=np.zeros_like(hit), fresh=new
    )


def test_new_and_old_events_are_reported_apart() -> None:
    figures = quality_metrics("sft", quality("11011000", "11110000"))
    assert (figures["sft/hr10"], figures["sft/new_hr10"], figures["sft/old_hr10"]) == (0.5, 0.75, 0.25)
    assert (figures["sft/users"], figures["sft/new_users"], figures["sft/old_users"]) == (8, 4, 4)
    assert describe_ages(quality("11011000", "11110000")) == "new 0.750 of 4, old 0.250 of 4"


def test_where_all_is_new_there_is_no_figure_of_old_events() -> None:
    figures = quality_metrics("sft", quality("1100", "1111"))
    assert "sft/old_hr10" not in figures
    assert (figures["sft/old_users"], figures["sft/new_hr10"]) == (0, 0.5)
    assert describe_ages(quality("1100", "1111")) == ""
    assert forgetting(quality("1100", "1111"), quality("0000", "1111")) is None


def test_forgetting_is_the_change_on_old_events_alone() -> None:
    fresh = "111100000"
    lost = forgetting(quality("000011110", fresh), quality("111111100", fresh))
    assert lost is not None
    assert (lost.users, lost.before, lost.now) == (5, 0.8, 0.6)
    assert lost.change == pytest.approx(-0.25)
    assert lost.low <= lost.change <= lost.high
    figures = lost.metrics("dpo")
    assert figures["dpo/forgetting"] == lost.change
    assert figures["dpo/forgetting_users"] == 5
    assert all(np.isfinite(value) for value in figures.values())
    assert lost.summary() == "0.800 -> 0.600 on 5 old events (-25.0%)"


def test_a_reader_is_told_that_nobody_judges_or_only_a_few() -> None:
    enough = quality("1" * FEW_USERS, "1" * FEW_USERS)
    assert describe_validation(enough, 500) == ""
    few = describe_validation(quality("10", "11"), 500)
    assert "of 2 users only" in few
    assert "SIDSTREAM_TRAINER__VALIDATION_SHARE" in few
    assert "of 3 validation users nobody is scored" in describe_validation(None, 3)
