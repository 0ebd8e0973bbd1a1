"""Pairs that late purchases and clicks contradict are withdrawn, and no others."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.events import PreferencePair, Scheme
from tests.tiny_explorations import T0
from trainer.log.interaction_log import INTERACTIONS
from trainer.log.pair_filter import FilteredPairs, newest_of_each_scheme, withdraw_contradicted

W = 100
SIDS = {"a": [0, 0], "b": [0, 1], "c": [1, 0], "d": [1, 1], "e": [1, 1]}


def pair(
    rejected: str, ts: int = 0, chosen: str = "a", user: str = "u",
    scheme: Scheme = "purchased_over_clicked", request: str | None = None, name: str | None = None,
) -> PreferencePair:  # fmt: skip
    return PreferencePair.new(
        event_id=name or f"{chosen}{rejected}{ts}{user}{scheme}{request}", ts=T0 + ts, user_id=user,
        scheme=scheme, codebook="book", chosen_item=chosen, chosen=SIDS[chosen], history=[],
        rejected_items=list(rejected), rejected=[SIDS[item] for item in rejected], request_id=request,
    )  # fmt: skip


def table(*events: tuple[str | None, str, str, int]) -> pa.Table:
    """(request_id, user_id, item_id, milliseconds after T0) each."""
    rows = [(0, at, f"e{at}", u, i, T0 + ts, "click", r, None) for at, (r, u, i, ts) in enumerate(events)]
    columns = zip(*rows, strict=True) if rows else [[] for _ in INTERACTIONS]
    arrays = [pa.array(list(c), kind.type) for c, kind in zip(columns, INTERACTIONS, strict=True)]
    return pa.table(arrays, schema=INTERACTIONS)


def left(actual: FilteredPairs) -> list[str]:
    return ["".join(one.rejected_items) for one in actual.pairs]


SCHEMES: tuple[Scheme, ...] = ("purchased_over_clicked", "purchased_over_shown", "clicked_over_shown")


@given(
    st.lists(st.tuples(st.sampled_from(SCHEMES), st.integers(0, 9)), max_size=30),
    st.integers(1, 20), st.randoms(use_true_random=False),
)  # fmt: skip
def test_schemes_share_what_is_learned_and_each_gives_its_newest(
    scheme_times: list[tuple[Scheme, int]], most: int, random: Any
) -> None:
    pairs = [pair("b", ts, scheme=scheme, name=f"{at:02}") for at, (scheme, ts) in enumerate(scheme_times)]
    random.shuffle(pairs)
    newest = newest_of_each_scheme(pairs, most)
    assert len(newest) == min(most, len(pairs))
    assert newest == sorted(newest, key=lambda one: (one.ts, one.event_id))
    count = {scheme: sum(one.scheme == scheme for one in newest) for scheme in SCHEMES}
    for scheme in SCHEMES:
        there = sorted((one for one in pairs if one.scheme == scheme), key=lambda one: (one.ts, one.event_id))
        assert [one for one in newest if one.scheme == scheme] == there[len(there) - count[scheme] :]
        # Who has fewer than another by more than the one that is left over has nothing more to give.
        assert count[scheme] == len(there) or count[scheme] >= max(count.values()) - 1


def test_an_item_that_the_user_bought_near_the_decision_is_no_longer_rejected() -> None:
    bought = table((None, "u", "b", W), (None, "u", "c", W + 1), (None, "v", "d", 0))
    actual = withdraw_contradicted([pair("bcd")], bought, table(), W)
    (one,) = actual.pairs
    assert (one.rejected_items, one.rejected) == (["c", "d"], [SIDS["c"], SIDS["d"]])
    assert one.event_id == pair("bcd").event_id
    assert (actual.bought, actual.clicked, actual.without_rejected) == (1, 0, 0)
    assert left(withdraw_contradicted([pair("b", ts=-W)], table((None, "u", "b", 0)), table(), W)) == []
    assert left(withdraw_contradicted([pair("b", ts=W + 1)], table((None, "u", "b", 0)), table(), W)) == ["b"]


def test_a_pair_without_rejected_items_is_gone() -> None:
    actual = withdraw_contradicted([pair("b"), pair("c", ts=5000)], table((None, "u", "b", 3)), table(), W)
    assert (left(actual), actual.without_rejected) == (["c"], 1)
    assert actual.summary() == "withdrawn: 1 rejected items (1 bought, 0 clicked), 1 whole pairs"
    assert withdraw_contradicted([pair("c")], table(), table(), W).summary() == ""


def test_a_late_click_withdraws_only_under_the_request_of_a_pair_about_clicks() -> None:
    clicks = table(("r", "u", "b", 5), (None, "u", "c", 5), ("q", "u", "c", 5), ("r", "v", "c", 5))
    about_clicks = pair("bcd", scheme="clicked_over_shown", request="r")
    actual = withdraw_contradicted([about_clicks], table(), clicks, W)
    assert (left(actual), actual.clicked) == (["cd"], 1)
    for scheme in ("purchased_over_clicked", "purchased_over_shown"):
        assert left(withdraw_contradicted([pair("bcd", scheme=scheme, request="r")], table(), clicks, W)) == [
            "bcd"
        ]
    assert left(withdraw_contradicted([pair("bc", scheme="clicked_over_shown")], table(), clicks, W)) == [
        "bc"
    ]


def test_a_pair_counts_once_and_its_chosen_item_and_sid_are_never_rejected() -> None:
    # d and e have one SID.
    actual = withdraw_contradicted([pair("dbe", chosen="e"), pair("dbe", chosen="e")], table(), table(), W)
    assert (left(actual), actual.repeats, actual.equal_to_chosen) == (["b"], 1, 2)


def test_a_pair_whose_items_and_sids_are_not_as_many_is_left_out() -> None:
    broken = PreferencePair.new(
        user_id="u", scheme="clicked_over_shown", codebook="book", chosen_item="a", chosen=[0, 0],
        rejected_items=["b", "c"], rejected=[[0, 1]], history=[],
    )  # fmt: skip
    actual = withdraw_contradicted([broken, pair("b")], table(), table(), W)
    assert (left(actual), actual.without_rejected) == (["b"], 1)


items = st.sampled_from("abcde")
moments = st.integers(-3 * W, 3 * W)
users = st.sampled_from("uv")
requests = st.sampled_from([None, "q", "r"])
schemes = st.sampled_from(["purchased_over_clicked", "purchased_over_shown", "clicked_over_shown"])
rejections = st.lists(items, min_size=1, max_size=4, unique=True).map("".join)
pairs = st.lists(st.builds(pair, rejections, moments, items, users, schemes, requests), max_size=8)
happened = st.lists(st.tuples(requests, users, items, moments), max_size=12)


@given(made=pairs, bought=happened, clicked=happened)
@settings(max_examples=300, deadline=None)
def test_what_is_left_is_what_a_plain_search_leaves(made: Any, bought: Any, clicked: Any) -> None:
    def contradicted(one: PreferencePair, item: str) -> bool:
        near = lambda at: abs(T0 + at - one.ts) <= W  # noqa: E731
        if SIDS[item] == one.chosen or item == one.chosen_item:
            return True
        if any((u, i) == (one.user_id, item) and near(at) for _, u, i, at in bought):
            return True
        return one.scheme == "clicked_over_shown" and any(
            r is not None and (r, u, i) == (one.request_id, one.user_id, item) and near(at)
            for r, u, i, at in clicked
        )

    once = {one.event_id: one for one in made}
    expected = {
        name: kept
        for name, one in once.items()
        if (kept := [item for item in one.rejected_items if not contradicted(one, item)])
    }
    actual = withdraw_contradicted(made, table(*bought), table(*clicked), W)
    assert {one.event_id: one.rejected_items for one in actual.pairs} == expected
    assert all(one.rejected == [SIDS[item] for item in one.rejected_items] for one in actual.pairs)
    assert len(actual.pairs) == len(expected)
    out = sum(len(one.rejected) for one in once.values()) - sum(map(len, expected.values()))
    assert (actual.bought + actual.clicked + actual.equal_to_chosen, actual.without_rejected) == (
        out,
        len(once) - len(expected),
    )
    # What was withdrawn once is withdrawn again, and nothing more.
    assert withdraw_contradicted(actual.pairs, table(*bought), table(*clicked), W).pairs == actual.pairs
