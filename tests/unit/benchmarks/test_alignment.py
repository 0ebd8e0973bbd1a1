"""The pairs that the benchmark of alignment makes over what would have been shown."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.alignment_pairs import WINDOWS_MS, shown_pairs
from tests.tiny_sequences import sequences
from trainer.evaluation.splits import split_by_time

WINDOW = WINDOWS_MS["rees46"]


def pairs_of_scheme(scheme: Any, max_pairs: int = 4000) -> list[Any]:
    """Pairs where items 0 to 4 are shown to everybody: user 0 touches 9, 1, 2, user 1 9, 7, 3."""
    far = 10 * WINDOW
    ts = [np.array([0, far, far + 1]), np.array([0, far, 2 * far]), np.array([100 * far] * 20)]
    data = sequences([9, 1, 2], [9, 7, 3], [8] * 20, ts=ts, items=10)
    bought = [np.array([False, True, False]), np.array([False, True, True]), np.zeros(20, bool)]
    data = replace(data, name="rees46", bought=bought)
    slate = np.tile(np.arange(5), (9, 1))
    trained: Any = SimpleNamespace(
        rank=lambda histories, k, mask, head: slate[: len(histories)],
        catalogue=SimpleNamespace(sids=[(item, 0) for item in range(10)]),
        settings=SimpleNamespace(max_items=20),
    )  # fmt: skip
    split = replace(split_by_time(data), part_starts=(50 * far, 60 * far))
    return sorted(shown_pairs(split, trained, scheme, 1, max_pairs), key=lambda pair: (pair.user_id, pair.ts))


def test_only_what_would_have_been_shown_is_chosen_over_what_the_user_left_alone() -> None:
    pairs = pairs_of_scheme("clicked_over_shown")
    # Item 7 was not on the slate; 1 and 2 were touched within one window: neither is held against the other.
    summary = [(pair.chosen_item, pair.rejected_items, [sid[0] for sid in pair.history]) for pair in pairs]
    assert summary == [
        ("1", ["0", "3", "4"], [9]), ("2", ["0", "3", "4"], [9, 1]), ("3", ["0", "1", "2", "4"], [9, 7]),
    ]  # fmt: skip


def test_pairs_of_purchases_choose_what_was_bought_and_no_more_than_asked_for() -> None:
    assert [pair.chosen_item for pair in pairs_of_scheme("purchased_over_shown")] == ["1", "3"]
    assert len(pairs_of_scheme("clicked_over_shown", max_pairs=2)) == 2
