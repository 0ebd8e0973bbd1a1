"""Pretraining and the SFT after it share one budget, and a broken run goes on in its stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_shop import shop
from trainer.tuning.pretrain import pretrain_and_tune, pretraining_settings, tuning_after_pretraining
from trainer.tuning.sft import train

STAGES = {"epochs": 4, "pretrain": {"share": 0.5, "recent_share": 0.25, "sft_lr": 1e-3}}


def test_sft_after_pretraining_reads_the_newest_events_and_a_share_of_older_ones() -> None:
    tiny = shop(**STAGES, replay=0.2, validation_users=0)
    tiny.log.ts[:] = np.arange(len(tiny.log))  # the last users of the log are the newest
    recent, _ = tuning_after_pretraining(tiny.rows, tiny.settings, 0.0)
    assert recent.log.fresh.sum() == round(0.25 * len(tiny.log))
    assert recent.log.fresh[-1]
    assert tiny.rows.log.fresh.all()
    cuts = recent.crops(np.random.default_rng(0))
    new = [cut for cut in cuts if recent.log.fresh[cut[0] : cut[1]].any()]
    assert sum(high - low for low, high in new) >= recent.log.fresh.sum()
    assert len(cuts) - len(new) == round(len(new) / 4)


def test_a_log_without_times_is_new_as_a_whole() -> None:
    tiny = shop(**STAGES)
    tiny.log.ts[:] = 0
    recent, after = tuning_after_pretraining(tiny.rows, tiny.settings, 0.0)
    assert recent.log.fresh.all()
    assert after.epochs == 2


def test_both_stages_share_one_budget() -> None:
    tiny = shop(**STAGES | {"max_seconds": 10.0, "replay": 0.0}, validation_users=0)
    tiny.log.ts[:] = np.arange(len(tiny.log))
    first = pretraining_settings(tiny.settings)
    assert (first.epochs, first.max_seconds, first.lr) == (2, 5.0, tiny.settings.lr)
    _, after = tuning_after_pretraining(tiny.rows, tiny.settings, spent_s=4.0)
    # A quarter of the events: four passes over them are as long as one over all.
    assert (after.epochs, after.max_seconds, after.lr) == (8, 6.0, 1e-3)
    _, after = tuning_after_pretraining(tiny.rows, tiny.settings, spent_s=9.0)
    assert after.max_seconds == 5.0


@pytest.mark.parametrize("part", [0.2, 0.8])
def test_a_run_that_is_broken_in_either_stage_ends_in_the_weights_of_an_unbroken_one(
    part: float, tmp_path: Path
) -> None:
    tiny = shop(**STAGES | {"dropout": 0.2})
    whole, broken, anew = (tiny.model(dropout=0.2) for _ in range(3))
    unbroken = pretrain_and_tune(whole, tiny.rows, tiny.sids, tiny.settings, folder=tmp_path / "whole")
    assert unbroken.pretraining is not None
    steps = unbroken.pretraining.steps + unbroken.steps
    calls = iter(range(1000))
    cut = pretrain_and_tune(
        broken, tiny.rows, tiny.sids, tiny.settings, folder=tmp_path / "broken",
        stop=lambda: next(calls) == round(part * steps),
    )  # fmt: skip
    assert cut.stopped == "interrupted"
    assert (cut.pretraining is None) == (part < 0.5)
    resumed = pretrain_and_tune(anew, tiny.rows, tiny.sids, tiny.settings, folder=tmp_path / "broken")
    assert resumed.pretraining is not None
    assert [point["step"] for point in resumed.pretraining.curve] == [
        point["step"] for point in unbroken.pretraining.curve
    ]
    assert [point["step"] for point in resumed.curve] == [point["step"] for point in unbroken.curve]
    for (name, expected), actual in zip(whole.named_parameters(), anew.parameters(), strict=True):
        assert torch.equal(expected, actual), name


def test_a_stage_that_stopped_early_does_not_go_on_when_it_is_found_again(tmp_path: Path) -> None:
    # Nothing is learned at such a rate: the first validation stays the best.
    tiny = shop(epochs=9, patience=1, lr=1e-12)
    first = train(tiny.model(), tiny.rows, tiny.sids, tiny.settings, folder=tmp_path)
    assert "no better NDCG@10" in first.stopped
    second = train(tiny.model(), tiny.rows, tiny.sids, tiny.settings, folder=tmp_path)
    assert (second.steps, second.epochs, second.stopped) == (first.steps, first.epochs, first.stopped)
    assert len(second.curve) == len(first.curve) == 2


def test_without_a_share_there_is_one_stage() -> None:
    tiny = shop(epochs=1)
    one = pretrain_and_tune(tiny.model(), tiny.rows, tiny.sids, tiny.settings)
    assert one.pretraining is None
    assert one.epochs == 1.0
