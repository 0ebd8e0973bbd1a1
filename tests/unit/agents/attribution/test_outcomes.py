"""Outcomes: what a request counts, and for which cohort, does not depend on order or repetition."""

from __future__ import annotations

from collections import Counter

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.attribution.outcomes import VERSION, OpenOutcomes, OutcomeRules
from agents.attribution.window_states import SumChange
from streams.events import Click, Event, Impression, Purchase, RankedItem, Recommendation
from tests.reference_outcomes import Owner, reference

T0 = 1_600_000_000_000
W, L, C = 1000, 100, 700
RULES = OutcomeRules(W, L, C)


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


Cohorts = dict[int, list[int]]


def by_cohort(*events: Event) -> dict[Owner, Cohorts]:
    """What the sums of user u hold after the events, each in a step of its own, through storage."""
    sums_by_owner: dict[Owner, Cohorts] = {}
    stored = msgspec.msgpack.encode(OpenOutcomes())
    for event in events:
        state = msgspec.msgpack.decode(stored, type=OpenOutcomes)
        state.add_event(event, RULES, None)
        for change in state.take_sum_changes(RULES):
            cohorts = sums_by_owner.setdefault((change.trial, "u", change.arm, change.bundle), {})
            total = cohorts.setdefault(change.cohort, [0, 0, 0])
            for place, number in enumerate((change.impressions, change.clicks, change.orders)):
                total[place] += number
                assert total[place] >= 0
            if not any(total):
                del cohorts[change.cohort]
        stored = msgspec.msgpack.encode(state)
    return {owner: cohorts for owner, cohorts in sums_by_owner.items() if cohorts}


def sums(*events: Event) -> Counter[str]:
    """Impressions, clicks and orders after the events, over all cohorts of the one arm."""
    (cohorts,) = by_cohort(*events).values()
    totals = map(sum, zip(*cohorts.values(), strict=True))
    return +Counter(dict(zip(("impressions", "clicks", "orders"), totals, strict=True)))


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
    state = OpenOutcomes()
    for event in (show("ab", 1), click("a", 5), click("b", 6)):
        state.add_event(event, RULES, None)
    assert state.forget_finished(T0 + 6 + 2 * W + L - 1, RULES) == 0
    assert state.forget_finished(T0 + 6 + 2 * W + L, RULES) == 3
    assert not state.requests


def money(*events: Event) -> tuple[int, int]:
    """(revenue, commission) of the one arm after the events, each in a step of its own, through storage."""
    revenue = commission = 0
    stored = msgspec.msgpack.encode(OpenOutcomes())
    for event in events:
        state = msgspec.msgpack.decode(stored, type=OpenOutcomes)
        state.add_event(event, RULES, None)
        for change in state.take_sum_changes(RULES):
            revenue, commission = revenue + change.revenue, commission + change.commission
        stored = msgspec.msgpack.encode(state)
    return revenue, commission


def paid(item: str, at: int, price: float, quantity: int = 1, commission: float | None = None) -> Purchase:
    return Purchase.new(
        user_id="u", item_id=item, ts=T0 + at, request_id="r", price=price, quantity=quantity,
        commission=commission,
    )  # fmt: skip


@given(st.permutations(range(7)))
def test_an_order_is_worth_its_first_purchase_in_any_order_of_events(order: list[int]) -> None:
    log = [
        answer(), show("ab", 1), paid("a", 20, 3.0, 2, 0.33), paid("a", 30, 9.0), paid("b", 40, 1.25),
        paid("b", 40, 0.75), paid("x", 50, 100.0, 1, 7.0),
    ]  # fmt: skip
    assert money(*(log[n] for n in order)) == (600 + 125, 33)


def test_requests_of_the_layout_without_money_are_read_and_count_on() -> None:
    # In flight while the agents are replaced: one order that is summed, without its worth.
    before = ["t", "champion", "b1", ["a", "b"], T0 + 1, ["a", "b"], {}, {"a": T0 + 5}]
    request = [T0, *before, [FIRST, 2, 0, 1], T0 + 5]
    stored = msgspec.msgpack.encode([VERSION, {"r": request}, {}, T0 + 5])
    state = msgspec.msgpack.decode(stored, type=OpenOutcomes)
    assert state.take_sum_changes(RULES) == []
    state.add_event(paid("b", 9, 2.5), RULES, None)
    assert state.take_sum_changes(RULES) == [SumChange("t", "champion", "b1", FIRST, 0, 0, 1, 250, 0)]


def test_an_event_older_than_what_was_forgotten_changes_nothing() -> None:
    state = OpenOutcomes()
    assert not state.add_event(click("a", 0), RULES, T0 + 2 * W + L)
    assert state == OpenOutcomes()


def test_two_trials_of_a_user_are_summed_apart() -> None:
    state = OpenOutcomes()
    for event in (answer(trial="t1"), answer(request="q", trial="t2"), show("a", 1), show("ab", 1, "q")):
        state.add_event(event, RULES, None)
    assert {s.trial: s.impressions for s in state.take_sum_changes(RULES)} == {"t1": 1, "t2": 2}


FIRST = T0 // C


def at(cohort: int, offset: int = 0) -> int:
    """A time of that cohort, counted from the first, after T0."""
    return (FIRST + cohort) * C + offset - T0


def test_clicks_and_orders_count_for_the_cohort_of_their_impression() -> None:
    log = [answer(), show("ab", at(1)), click("a", at(2, 1)), buy("a", at(2, 2)), click("b", at(1, 3))]
    assert by_cohort(*log) == {("t", "u", "champion", "b1"): {FIRST + 1: [2, 2, 1]}}


def test_an_earlier_impression_that_comes_late_takes_all_numbers_to_its_cohort() -> None:
    log = [answer(), show("a", at(2)), click("a", at(2, 5)), buy("a", at(2, 6))]
    owner = ("t", "u", "champion", "b1")
    assert by_cohort(*log) == {owner: {FIRST + 2: [1, 1, 1]}}
    assert by_cohort(*log, show("b", at(2, -1))) == {owner: {FIRST + 1: [2, 1, 1]}}


def test_without_an_impression_the_answer_gives_the_cohort() -> None:
    owner = ("t", "u", "champion", "b1")
    assert by_cohort(answer(at(3)), click("a", at(4))) == {owner: {FIRST + 3: [0, 1, 0]}}


def test_requests_that_change_places_between_two_cohorts_move_nothing() -> None:
    state = OpenOutcomes()
    for event in (answer(), answer(request="q"), show("a", at(2)), show("a", at(1), "q")):
        state.add_event(event, RULES, None)
    assert len(state.take_sum_changes(RULES)) == 2
    state.add_event(show("a", at(1)), RULES, None)
    state.requests["q"].first_shown_at = T0 + at(2)
    assert state.take_sum_changes(RULES) == []


requests = st.sampled_from("rq")
events = st.lists(
    st.one_of(
        st.builds(show, st.sampled_from(["ab", "bc", "cx"]), st.integers(0, 3500), requests),
        st.builds(click, st.sampled_from("abcx"), st.integers(0, 4500), requests),
        st.builds(buy, st.sampled_from("abcx"), st.integers(0, 4500), requests),
    ),
    max_size=16,
)


@given(events, st.sampled_from(["t", "s"]), st.integers(0, 2500), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_sums_equal_a_recomputation_of_the_whole_log_in_any_order_and_with_repeats(
    log, other_trial, answered, random
) -> None:
    once = [answer(), answer(answered, "bcx", "q", other_trial), *log]
    with_repeats = once + random.sample(once, random.randint(0, len(once)))
    random.shuffle(with_repeats)
    assert by_cohort(*with_repeats) == reference(once, W, C)
