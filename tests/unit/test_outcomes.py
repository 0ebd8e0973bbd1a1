"""Outcomes: what a request counts does not depend on order or repetition."""

from __future__ import annotations

from collections import Counter

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import outcomes
from agents.windows import Rules
from streams.events import Click, Event, Impression, Purchase, RankedItem, Recommendation

T0 = 1_600_000_000_000
W, L = 1000, 100
RULES = Rules(W, L)


def answer(at: int = 0, items: str = "abc", request: str = "r", trial: str = "t") -> Recommendation:
    return Recommendation.new(
        request_id=request, user_id="u", ts=T0 + at, bundle="b1", arm="champion", trial=trial,
        items=[RankedItem(item, [1], -1.0) for item in items],
    )  # fmt: skip


def show(items: str, at: int, request: str = "r") -> Impression:
    return Impression.new(user_id="u", item_ids=list(items), ts=T0 + at, request_id=request)


def click(item: str, at: int, request: str = "r") -> Click:
    return Click.new(user_id="u", item_id=item, ts=T0 + at, request_id=request)


def buy(item: str, at: int, request: str = "r") -> Purchase:
    return Purchase.new(user_id="u", item_id=item, ts=T0 + at, request_id=request, price=1.0)


def sums(*events: Event) -> Counter[str]:
    """Impressions, clicks and orders after the events, each in a step of its own, through storage."""
    total: Counter[str] = Counter()
    stored = msgspec.msgpack.encode(outcomes.Open())
    for event in events:
        state = msgspec.msgpack.decode(stored, type=outcomes.Open)
        outcomes.add(state, event, RULES, None)
        for moved in outcomes.recount(state, RULES):
            assert (moved.trial, moved.arm, moved.bundle) == ("t", "champion", "b1")
            total += Counter(
                {"impressions": moved.impressions, "clicks": moved.clicks, "orders": moved.orders}
            )
        stored = msgspec.msgpack.encode(state)
    return total


def test_what_was_shown_clicked_and_bought_of_an_answer_is_counted_once() -> None:
    log = [answer(), show("ab", 1), click("a", 5), click("a", 9), buy("a", 20), buy("a", 30), show("bc", 40)]
    assert sums(*log) == {"impressions": 3, "clicks": 1, "orders": 1}


def test_only_items_of_the_answer_count() -> None:
    assert sums(answer(), show("xa", 1), click("x", 2), buy("y", 3)) == {"impressions": 1}


def test_an_event_after_the_window_does_not_count() -> None:
    assert sums(answer(), show("a", 10), click("a", 10 + W), buy("a", 11 + W)) == {
        "impressions": 1,
        "clicks": 1,
    }


def test_events_that_come_before_their_answer_are_joined_when_it_comes() -> None:
    assert sums(click("a", 5), show("ab", 1), answer()) == {"impressions": 2, "clicks": 1}


def test_a_request_that_never_got_an_answer_is_counted_as_unattributed_and_forgotten() -> None:
    state = outcomes.Open()
    for event in (show("ab", 1), click("a", 5), click("b", 6)):
        outcomes.add(state, event, RULES, None)
    assert outcomes.close(state, T0 + 6 + 2 * W + L - 1, RULES) == 0
    assert outcomes.close(state, T0 + 6 + 2 * W + L, RULES) == 3
    assert not state.requests


def test_an_event_older_than_what_was_forgotten_changes_nothing() -> None:
    state = outcomes.Open()
    assert not outcomes.add(state, click("a", 0), RULES, T0 + 2 * W + L)
    assert state == outcomes.Open()


def test_two_trials_of_a_user_are_summed_apart() -> None:
    state = outcomes.Open()
    for event in (answer(trial="t1"), answer(request="q", trial="t2"), show("a", 1), show("ab", 1, "q")):
        outcomes.add(state, event, RULES, None)
    assert {s.trial: s.impressions for s in outcomes.recount(state, RULES)} == {"t1": 1, "t2": 2}


events = st.lists(
    st.one_of(
        st.builds(show, st.sampled_from(["ab", "bc", "cx"]), st.integers(0, 1500)),
        st.builds(click, st.sampled_from("abcx"), st.integers(0, 2500)),
        st.builds(buy, st.sampled_from("abcx"), st.integers(0, 2500)),
    ),
    max_size=12,
)


@given(events, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_order_and_repetition_change_nothing(log, random) -> None:
    once = [answer(), *log]
    again = once + random.sample(once, random.randint(0, len(once)))
    random.shuffle(again)
    assert sums(*once) == sums(*again)
