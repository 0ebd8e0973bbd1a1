"""Preference pairs: windows close in event time, and neither order nor repetition of the input matters."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.attribution.pairs import MAX_SLATES, OpenPairWindows, PairDecision, PairRules, pair_id
from agents.attribution.window_stage import Fences, WindowRules, unapplied_events
from streams.events import Click, Event, Impression, Purchase, RankedItem, Recommendation
from streams.wire.batch_stage import ReceivedEvent
from tests.reference_pairs import Pair, reference

T0 = 1_600_000_000_000
W, L = 1000, 100
RULES = WindowRules(W, L)


def click(item: str, at: int, request: str | None = None, kind: str = "click") -> Click:
    return Click.new(
        user_id="u", item_id=item, ts=T0 + at, request_id=request, kind=kind,
        event_id=f"c{item}{at}{request}{kind}",
    )  # fmt: skip


def buy(item: str, at: int, request: str | None = None) -> Purchase:
    return Purchase.new(
        user_id="u", item_id=item, ts=T0 + at, request_id=request, price=1.0, event_id=f"p{item}{at}{request}"
    )


def show(items: str, at: int, request: str | None = "r") -> Impression:
    return Impression.new(
        user_id="u", item_ids=list(items), ts=T0 + at, request_id=request, event_id=f"i{items}{at}{request}"
    )


class User:
    """One user's state as the stage keeps it: encoded between steps, deleted when empty."""

    def __init__(self, most: int = 8) -> None:
        self.rules = PairRules(RULES, most, lambda item: item != "unknown")
        self.stored: bytes | None = None
        self.closed_until: int | None = None
        self.decisions: list[PairDecision] = []

    def add(self, *events: Event) -> None:
        state = self._state()
        changed = [state.add_event(event, RULES, self.closed_until) for event in events]
        if any(changed) or self.stored is not None:
            self.stored = msgspec.msgpack.encode(state)

    def close_windows(self, at: int) -> None:
        watermark = T0 + at
        if self.closed_until is not None and watermark <= self.closed_until:
            return
        self.closed_until = watermark
        if self.stored is None:
            return
        state = self._state()
        due = state.next_due(RULES)
        decisions = state.close_due(watermark, self.rules)
        if decisions:
            assert due is not None
            assert due <= watermark, "the index would not have found this user"
        self.decisions += decisions
        after = state.next_due(RULES, watermark)
        assert after is None or after > watermark
        self.stored = None if state.is_finished(watermark, RULES) else msgspec.msgpack.encode(state)

    def pairs(self) -> set[Pair]:
        return {("u", d.scheme, d.request_id or d.moment, d.chosen, d.rejected) for d in self.decisions}

    def _state(self) -> OpenPairWindows:
        return (
            OpenPairWindows()
            if self.stored is None
            else msgspec.msgpack.decode(self.stored, type=OpenPairWindows)
        )


def decided(*events: Event, most: int = 8) -> list[PairDecision]:
    user = User(most)
    user.add(*events)
    user.close_windows(100_000)
    return user.decisions


def test_a_purchase_is_preferred_to_what_was_clicked_and_not_bought() -> None:
    (decision,) = decided(click("a", 0), click("b", 10), click("x", 20), buy("x", 30))
    assert (decision.scheme, decision.chosen, decision.rejected) == (
        "purchased_over_clicked",
        "x",
        ("b", "a"),
    )
    assert decision.ts == T0 + 30
    assert decision.before == T0  # nothing of the decision is in its own history


def test_nothing_is_decided_before_every_click_in_reach_has_matured() -> None:
    user = User()
    user.add(click("a", 0), buy("x", 30))
    user.close_windows(30 + W + L - 1)
    assert not user.decisions
    user.close_windows(30 + W + L)
    assert len(user.decisions) == 1


def test_a_clicked_item_that_is_bought_later_in_its_window_is_never_rejected() -> None:
    assert not decided(click("a", 0), buy("x", 30), buy("a", W))
    (decision,) = decided(click("a", 0), buy("x", 30), buy("a", W + 1))
    assert decision.rejected == ("a",)


def test_what_was_bought_before_the_click_is_not_rejected_while_it_is_near() -> None:
    assert not decided(buy("a", 0), click("a", 10), buy("x", 20))


def test_only_the_most_recent_rejected_items_are_kept() -> None:
    (decision,) = decided(*[click(item, n) for n, item in enumerate("abcdef")], buy("x", 50), most=3)
    assert decision.rejected == ("f", "e", "d")


def test_a_cart_counts_as_a_click() -> None:
    (decision,) = decided(click("a", 0, kind="cart"), buy("x", 30))
    assert decision.rejected == ("a",)


def test_items_without_a_sid_are_left_out() -> None:
    assert not decided(click("unknown", 0), buy("x", 30))
    assert not decided(click("a", 0), buy("unknown", 30))


def test_a_pair_has_the_scene_of_its_request_and_a_state_from_before_scenes_is_read() -> None:
    answer = Recommendation.new(request_id="r", user_id="u", ts=T0, items=[], scene="cart")
    user = User()
    user.add(show("ab", 1), answer, buy("b", 9, "r"))
    assert user.stored is not None
    body = msgspec.msgpack.decode(user.stored)
    user.close_windows(100_000)
    assert [decision.scene for decision in user.decisions] == ["cart"]
    assert [decision.scene for decision in decided(click("a", 0), buy("x", 30))] == [None]
    # Slates are arrays, and the scene their last place.
    (slate,) = body[3].values()
    assert slate.pop() == "cart"
    old = User()
    old.stored = msgspec.msgpack.encode(body)
    old.close_windows(100_000)
    assert [(decision.scene, decision.chosen) for decision in old.decisions] == [(None, "b")]


def test_a_slate_gives_the_three_schemes() -> None:
    answer = Recommendation.new(
        request_id="r", user_id="u", ts=T0, items=[RankedItem("a", [1], -1.0)], trigger_item_id="t"
    )
    decisions = decided(answer, show("abcdef", 1), click("e", 5, "r"), click("b", 6, "r"), buy("b", 9, "r"))
    rejected_by_choice = {(d.scheme, d.chosen): set(d.rejected) for d in decisions}
    assert rejected_by_choice == {
        ("purchased_over_clicked", "b"): {"e"},
        ("purchased_over_shown", "b"): {"a", "c", "d"},
        ("clicked_over_shown", "b"): {"a", "c", "d"},
        ("clicked_over_shown", "e"): {"a", "c", "d"},
    }
    assert {d.trigger for d in decisions} == {"t"}
    assert {d.before for d in decisions} == {T0 + 1}


SHOWN = "abcdefgh"


@settings(max_examples=200, deadline=None)
@given(st.sets(st.sampled_from(SHOWN)), st.sets(st.sampled_from(SHOWN)))
def test_nothing_below_the_lowest_click_or_purchase_is_rejected(clicked: set[str], bought: set[str]) -> None:
    decisions = decided(
        show(SHOWN, 0), *(click(item, 1, "r") for item in clicked), *(buy(item, 2, "r") for item in bought)
    )
    lowest = max((SHOWN.index(item) for item in clicked | bought), default=-1)
    passed_over = set(SHOWN[: lowest + 1]) - clicked - bought
    for decision in decisions:
        if decision.scheme == "purchased_over_clicked":
            assert set(decision.rejected) == clicked - bought
        else:
            assert set(decision.rejected) == passed_over
    chosen = {(d.scheme, d.chosen) for d in decisions if d.scheme != "purchased_over_clicked"}
    assert chosen == (
        {("purchased_over_shown", item) for item in bought}
        | {("clicked_over_shown", item) for item in clicked}
        if passed_over
        else set()
    )


def test_a_low_purchase_without_a_sid_still_says_how_far_the_user_looked() -> None:
    items = ["a", "b", "unknown", "c"]
    slate = Impression.new(user_id="u", item_ids=items, ts=T0, request_id="r", event_id="i")
    decisions = decided(slate, click("a", 1, "r"), buy("unknown", 2, "r"))
    assert [(d.scheme, d.chosen, d.rejected) for d in decisions] == [("clicked_over_shown", "a", ("b",))]


def test_the_rejected_that_are_kept_are_a_sample_of_all_places_alike_and_the_same_each_time() -> None:
    places: Counter[str] = Counter()
    for n in range(300):
        log = [show(SHOWN, 0, f"r{n}"), click("h", 1, f"r{n}")]
        (decision,) = decided(*log, most=2)
        assert decided(*log, most=2)[0].rejected == decision.rejected
        places.update(decision.rejected)
    # 600 draws from seven places, 85.7 each: five standard deviations of 7.8 are 39.
    assert set(places) == set("abcdefg")
    assert all(47 < count < 125 for count in places.values()), places


def test_events_of_a_request_do_not_count_as_organic() -> None:
    decisions = decided(show("ab", 0), click("b", 1, "r"), buy("x", 30))
    assert {d.scheme for d in decisions} == {"clicked_over_shown"}


def test_a_recommendation_that_was_never_shown_gives_nothing_and_is_forgotten() -> None:
    user = User()
    user.add(Recommendation.new(request_id="r", user_id="u", ts=T0, items=[]))
    user.close_windows(2 * W + L + 1)
    assert not user.decisions
    assert user.stored is None


def test_slates_that_are_never_shown_do_not_pile_up() -> None:
    user = User()
    for n in range(MAX_SLATES + 50):
        user.add(Recommendation.new(request_id=f"r{n}", user_id="u", ts=T0 + 10**9 + n, items=[]))
    user.add(show("ab", 1), click("b", 2, "r"))
    user.close_windows(W + L + 1)
    assert len(user.decisions) == 1
    assert user.stored is not None
    assert len(msgspec.msgpack.decode(user.stored, type=OpenPairWindows).slates) <= MAX_SLATES


def test_a_state_is_deleted_once_nothing_can_ask_for_it() -> None:
    user = User()
    user.add(click("a", 0), buy("x", 30), show("ab", 5), click("a", 6, "r"))
    user.close_windows(30 + 2 * W + L - 1)
    assert user.stored is not None
    user.close_windows(30 + 2 * W + L)
    assert user.stored is None


def test_a_pair_id_depends_on_the_decision_and_not_on_the_order_of_the_rejected() -> None:
    first = PairDecision("purchased_over_clicked", T0, T0, "x", ("a", "b"), moment=T0)
    second = PairDecision("purchased_over_clicked", T0, T0 - 5, "x", ("b", "a"), moment=T0)
    assert pair_id("u", first, "book") == pair_id("u", second, "book")
    assert pair_id("u", first, "book") != pair_id("v", first, "book")
    assert pair_id("u", first, "book") != pair_id("u", first, "other")


def test_a_closed_slate_that_is_seen_again_decides_nothing_anew() -> None:
    log = [show("abc", 0), click("a", 5, "r"), click("b", 6, "r"), buy("a", 9, "r")]
    user = User()
    user.add(*log)
    user.close_windows(W + L)
    decision_count = len(user.decisions)
    assert decision_count
    for at in (W + L + 1, 2 * W + L + 3, 3 * W + L):
        user.add(*log)
        user.close_windows(at)
    assert len(user.decisions) == decision_count


def test_the_fences_let_an_event_pass_once_and_start_anew_with_a_new_topic() -> None:
    def received(offset: int) -> ReceivedEvent:
        return ReceivedEvent(SimpleNamespace(topic="clicks", offset=offset), offset)

    fences: Fences = {}
    assert [e for _, e in unapplied_events(fences, [received(3), received(4)], {"clicks": 7})] == [3, 4]
    assert [
        e for _, e in unapplied_events(fences, [received(3), received(4), received(5)], {"clicks": 7})
    ] == [5]
    assert [e for _, e in unapplied_events(fences, [received(0), received(1)], {"clicks": 8})] == [0, 1]
    assert fences == {"clicks": (8, 2)}


items = st.sampled_from("abcd")
requests = st.sampled_from([None, None, "q", "r"])


def events(moments: st.SearchStrategy[int]) -> st.SearchStrategy[Event]:
    return st.one_of(
        st.builds(click, items, moments, requests, st.sampled_from(["click", "cart"])),
        st.builds(buy, items, moments, requests),
        st.builds(
            show, st.permutations("abcd").map(lambda p: "".join(p[:3])), moments, st.sampled_from("qr")
        ),
    )


event = events(st.integers(0, 4000))
# Moments that meet the ends of windows more often than by chance.
crowded = events(st.integers(0, 50).map(lambda at: at * L // 2))


@pytest.mark.parametrize("repeat", [False, True])
@given(log=st.lists(event, max_size=25), data=st.data(), most=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_any_order_within_the_lateness_gives_the_pairs_of_the_whole_log(repeat, log, data, most) -> None:
    # A slate whose impressions lie further apart than its window is judged by the first alone; requests that
    # are used again after that are another matter, which a shop's unique request ids rule out.
    late = [data.draw(st.integers(0, L)) for _ in log]
    arrival = [
        e
        for _, _, e in sorted(
            zip([e.ts + d for e, d in zip(log, late, strict=True)], range(len(log)), log, strict=True)
        )
    ]
    user, newest_ts = User(most), T0
    for place, incoming in enumerate(arrival):
        user.add(incoming)
        if repeat:
            user.add(data.draw(st.sampled_from(arrival[: place + 1])))
        newest_ts = max(newest_ts, incoming.ts)
        if data.draw(st.booleans()):
            user.close_windows(newest_ts - T0)
    user.close_windows(100_000)
    spread = _spread(log)
    assert {p for p in user.pairs() if p[2] not in spread} == {
        p for p in reference(log, W, most) if p[2] not in spread
    }
    assert len(user.decisions) == len(
        {(d.scheme, d.request_id or d.moment, d.chosen) for d in user.decisions}
    )


@given(log=st.lists(crowded, min_size=8, max_size=25), data=st.data(), most=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_nothing_is_rejected_before_its_window_closed_nor_what_was_bought_in_it(log, data, most) -> None:
    # A decision's window: before and after its purchase, or after the first impression of its request.
    arrival = sorted(log, key=lambda e: e.ts + data.draw(st.integers(0, L)))
    user, newest_ts, checked = User(most), T0, 0
    for incoming in arrival:
        user.add(incoming)
        newest_ts = max(newest_ts, incoming.ts)
        user.close_windows(newest_ts - T0)
        for decision in user.decisions[checked:]:
            assert decision.moment + W + L <= newest_ts
        checked = len(user.decisions)
    user.close_windows(100_000)
    bought = [(e.item_id, e.ts) for e in log if isinstance(e, Purchase)]
    spread = _spread(log)
    for decision in user.decisions:
        if decision.request_id in spread:
            continue
        opened = decision.moment
        clicks = [
            (e.item_id, e.ts) for e in log
            if isinstance(e, Click) and e.request_id is None and opened - W <= e.ts <= opened
        ]  # fmt: skip
        for item in decision.rejected:
            if decision.request_id is not None:
                window_starts = [opened]
            else:
                window_starts = [opened - W, *(ts for clicked, ts in clicks if clicked == item)]
            assert item != decision.chosen
            assert not any(i == item and ts <= at <= ts + W for ts in window_starts for i, at in bought)


def _spread(log: list[Event]) -> set[str]:
    """Requests whose events reach further than the window from the first impression, or begin before it."""
    requests = set()
    for request in "qr":
        times = [e.ts for e in log if getattr(e, "request_id", None) == request]
        looks = [e.ts for e in log if isinstance(e, Impression) and e.request_id == request]
        if times and (not looks or min(times) < min(looks) - W or max(times) > min(looks) + 2 * W):
            requests.add(request)
    return requests
