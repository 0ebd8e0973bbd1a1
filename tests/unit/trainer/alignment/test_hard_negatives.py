"""Hard negatives: those that were shown first, then the nearest in codes, the same for the same pair."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.bundles.prompt import Sid
from streams.errors import SidstreamError
from streams.events import PreferencePair
from tests.tiny_shop import shop
from trainer.alignment.cycle_stage import hard_negative_filler
from trainer.alignment.hard_negatives import SiblingSids
from trainer.settings import DpoSettings

ALL: list[Sid] = list(itertools.product(range(3), range(3), range(4)))


def shared(first: Sid, second: Sid) -> int:
    return next((at for at, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))


def test_what_was_shown_comes_first_then_siblings_then_cousins() -> None:
    filled = SiblingSids(ALL).add_negatives([(2, 2, 2), (2, 2, 1)], (0, 0, 0), [], "pair", 8)
    assert filled[:2] == [(2, 2, 2), (2, 2, 1)]
    assert {sid[:2] for sid in filled[2:5]} == {(0, 0)}
    assert {sid[0] for sid in filled[5:]} == {0}
    assert {sid[1] for sid in filled[5:]} <= {1, 2}


sid = st.sampled_from(ALL)
sid_lists = st.lists(sid, max_size=6)


@given(
    catalogue=st.lists(sid, min_size=1, max_size=36), rejected=sid_lists, chosen=sid, history=sid_lists,
    seed=st.text(), k=st.integers(0, 40),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_negatives_exist_are_nearest_first_and_never_chosen_nor_known_to_the_user(
    catalogue: list[Sid], rejected: list[Sid], chosen: Sid, history: list[Sid], seed: str, k: int
) -> None:
    filled = SiblingSids(catalogue).add_negatives(rejected, chosen, history, seed, k)
    existing_rejected = [sid for sid in dict.fromkeys(rejected) if sid in catalogue and sid != chosen]
    assert filled[: len(existing_rejected)] == existing_rejected[:k]
    hard = filled[len(existing_rejected) :]
    allowed = set(catalogue) - {chosen, *rejected, *history}
    assert set(hard) <= allowed
    assert len(filled) == len(set(filled)) == min(k, len(existing_rejected) + len(allowed))
    near = [shared(sid, chosen) for sid in hard]
    assert near == sorted(near, reverse=True)
    # Nothing that is left is nearer than what was taken.
    rest = [shared(sid, chosen) for sid in allowed - set(hard)]
    assert not hard or max(rest, default=0) <= near[-1]
    reordered = SiblingSids(np.array(catalogue[::-1] * 2))
    assert reordered.add_negatives(rejected, chosen, history, seed, k) == filled


def test_what_a_user_touched_before_or_since_is_no_hard_negative() -> None:
    tiny_shop = shop(users=10, length=20)
    fill = hard_negative_filler(
        tiny_shop.catalogue, tiny_shop.log, DpoSettings(hard_negatives=9, max_rejected=9)
    )
    assert fill is not None
    for at, user in enumerate(tiny_shop.log.users):
        interacted = {
            tiny_shop.catalogue.sids[item] for item in tiny_shop.log.items[tiny_shop.log.starts[at] :][:20]
        }
        left = set(tiny_shop.catalogue.sids) - interacted
        assert 0 < len(left) < 9
        trigger = min(left)
        pair = PreferencePair.new(
            event_id=user, ts=1_600_000_000_000, user_id=user, codebook="c" * 16,
            scheme="purchased_over_shown", chosen_item="i", chosen=list(tiny_shop.catalogue.sids[0]),
            rejected_items=["j"], rejected=[[1, 1, 0]],
            history=[], trigger=list(trigger),
        )  # fmt: skip
        assert set(fill(pair, [])) == left - {trigger, tiny_shop.catalogue.sids[0]}


def test_every_item_of_a_level_is_drawn_equally_often() -> None:
    siblings = SiblingSids(ALL)
    counts: dict[Sid, int] = {}
    for pair in range(1200):
        (negative,) = siblings.add_negatives([], (1, 1, 1), [(1, 1, 0)], f"pair {pair}", 1)
        counts[negative] = counts.get(negative, 0) + 1
    assert set(counts) == {(1, 1, 2), (1, 1, 3)}
    # 600 are expected; five standard deviations are 87.
    assert all(abs(count - 600) < 87 for count in counts.values())


def test_a_large_level_is_drawn_from_without_listing_it() -> None:
    many = np.stack([np.repeat(np.arange(200), 200), np.tile(np.arange(200), 200)], axis=1)
    filled = SiblingSids(many).add_negatives([], (7, 300), [(7, at) for at in range(200)], "pair", 5)
    assert len(set(filled)) == 5
    assert all(first != 7 for first, _ in filled)


@pytest.mark.parametrize(
    ("sids", "arguments", "message"),
    [
        ([], {}, "at least one SID"),
        ([(1, 2), (1, 2, 3)], {}, "one common number of codes"),
        ([(1, 2)], {"chosen": (1,)}, r"chosen is \(1,\)"),
        ([(1, 2)], {"count": -1}, "count is -1"),
    ],
)
def test_what_cannot_be_filled_is_named(sids: list[Sid], arguments: dict[str, Any], message: str) -> None:
    fill_arguments: dict[str, Any] = {
        "rejected": [],
        "chosen": (1, 2),
        "interacted": [],
        "seed": "",
        "count": 1,
    }
    fill_arguments |= arguments
    with pytest.raises(SidstreamError, match=message):
        SiblingSids(sids).add_negatives(**fill_arguments)
