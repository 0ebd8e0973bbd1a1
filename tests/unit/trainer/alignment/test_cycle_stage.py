"""A window's pairs are held against the whole log, and the stage tells what was withdrawn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from registry.bundles.context import Context
from registry.bundles.prompt import Prompt
from registry.hold_out import HoldOut
from tests.tiny_log import NOBODY, Logged
from tests.unit.trainer.log.test_pair_filter import W, pair
from trainer.alignment.cycle_stage import align_to_window
from trainer.settings import TrainerSettings

BOTH = ("purchased_over_clicked", "clicked_over_shown")


def test_a_window_withdraws_pairs_by_the_whole_log_and_keeps_the_newest(tmp_path: Path) -> None:
    logged = Logged(tmp_path)
    logged.purchases(("u", "b", 5))
    logged.clicks(("r", "u", "c", 7))
    logged.events(pair("b", name="old"))
    logged.window()
    logged.events(pair("bd", name="new"), pair("c", scheme="clicked_over_shown", request="r", name="gone"))
    window = logged.window()
    filtered, _ = window.preference_pairs(W, "book", BOTH, 9, NOBODY)
    assert {pair.event_id: pair.rejected_items for pair in filtered.pairs} == {"new": ["d"]}
    assert (filtered.bought, filtered.clicked, filtered.without_rejected) == (2, 1, 2)
    assert window.preference_pairs(W, "another", BOTH, 9, NOBODY)[0].pairs == []
    assert filtered.of_other_schemes == 0
    other, _ = window.preference_pairs(W, "book", ("purchased_over_shown",), 9, NOBODY)
    assert (other.pairs, other.of_other_schemes) == ([], 3)
    nothing, _ = window.preference_pairs(W, "another", ("purchased_over_shown",), 9, NOBODY)
    assert nothing.of_other_schemes == 0


def test_the_newest_pairs_are_taken_from_all_windows(tmp_path: Path) -> None:
    logged = Logged(tmp_path)
    logged.events(*(pair("d", name=f"p{n}", ts=n) for n in range(4)))
    logged.window()
    logged.events(pair("d", name="p4", ts=4))
    filtered, _ = logged.window().preference_pairs(W, "book", BOTH, 3, NOBODY)
    assert sorted(pair.event_id for pair in filtered.pairs) == ["p2", "p3", "p4"]


def test_pairs_of_validation_users_judge_and_leave_no_gap_in_what_is_learned(tmp_path: Path) -> None:
    half = HoldOut(share=0.5)
    users = [f"u{n}" for n in range(40)]
    judging = [user for user in users if half.has(user)]
    logged = Logged(tmp_path)
    logged.events(*(pair("d", name=user, ts=at, user=user) for at, user in enumerate(users)))
    learned, validation = logged.window().preference_pairs(W, "book", BOTH, 12, half, 5)
    assert [pair.user_id for pair in learned.pairs] == [u for u in users if u not in judging][-12:]
    assert [pair.user_id for pair in validation.pairs] == judging[-5:]


def test_the_stage_tells_what_was_withdrawn_and_does_not_count_it(tmp_path: Path) -> None:
    logged = Logged(tmp_path)
    logged.purchases(("u", "b", 5))
    logged.events(pair("b", name="gone"), pair("d", name="kept"))
    material: Any = SimpleNamespace(
        window=logged.window(), hold_out=NOBODY, codebook=SimpleNamespace(id="book"),
        prompt=Prompt((2, 2), 4), context=Context(), profiles={}, log=SimpleNamespace(users=[]),
        catalogue=SimpleNamespace(sids=[(0, 0), (0, 1), (1, 0)]),
    )  # fmt: skip
    none: Any = None
    both = {"min_pairs": 2, "schemes": BOTH}
    trainer = TrainerSettings.model_validate({"dpo": both})
    alignment = align_to_window(
        material, trainer, W, none, None, tmp_path, sequences=none, report_progress=lambda _: None
    )
    assert (alignment.model, alignment.pairs, alignment.withdrawn) == (None, 1, 1)
    assert alignment.refused == "1 preference pairs, at least 2 are needed"
    assert "withdrawn: 1 rejected items (1 bought, 0 clicked), 1 whole pairs" in alignment.summary

    # Pairs that are there, and are not asked for, are the first thing to know.
    single_scheme = TrainerSettings.model_validate({"dpo": both | {"schemes": ["clicked_over_shown"]}})
    alignment = align_to_window(
        material, single_scheme, W, none, None, tmp_path, sequences=none, report_progress=lambda _: None
    )
    assert alignment.refused == (
        "0 preference pairs, at least 2 are needed "
        "(2 are of schemes that SIDSTREAM_TRAINER__DPO__SCHEMES leaves out)"
    )
