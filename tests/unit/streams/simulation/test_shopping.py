"""The shopping loop against a recommender that answers at once: what is published, and what is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import pytest

from streams.errors import SidstreamError
from streams.events import (
    CatalogItem,
    Click,
    Event,
    Impression,
    Purchase,
    RankedItem,
    Recommendation,
    Trigger,
)
from streams.settings import ShoppersSettings
from streams.simulation.shoppers import Truth, population
from streams.simulation.shopping import Shopping, ShoppingTrip

START = 1_700_000_000_000
ITEMS = [CatalogItem.new(item_id=f"i{n}", title=f"word{chr(97 + n)} thing") for n in range(8)]


class Desk:
    """Answers each trigger with the same items; remembers what was published. `mute` users get no answer."""

    def __init__(self, mute: frozenset[str] = frozenset()) -> None:
        self.mute = mute
        self.published: list[Event] = []

    def submit(self, trigger: Trigger, timeout: float = 0) -> Future[Recommendation]:
        future: Future[Recommendation] = Future()
        if trigger.user_id in self.mute:
            future.set_exception(SidstreamError("no answer"))
        else:
            future.set_result(
                Recommendation.new(
                    request_id=trigger.request_id, user_id=trigger.user_id, arm="champion", bundle="b",
                    items=[RankedItem(item_id=f"i{n}", sid=[n], score=0.0) for n in range(trigger.k)],
                )
            )  # fmt: skip
        return future

    def publish_all(self, events: Iterable[Event], on_progress: Callable[[int], Any] | None = None) -> int:
        more = list(events)
        self.published += more
        return len(more)


def shop(desk: Desk, sessions: int = 200, **changed: Any) -> Shopping:
    settings = ShoppersSettings(**changed)
    truth = Truth(ITEMS, settings)
    shoppers = population(truth, {f"u{n}": ["i0", "i1"] for n in range(50)})
    return ShoppingTrip(desk, truth, shoppers, settings, START).run(sessions, {"i0": 2.5})


def test_the_tally_counts_what_was_published() -> None:
    desk = Desk()
    result = shop(desk)
    (tally,) = result.arms.values()
    shown = [event for event in desk.published if isinstance(event, Impression)]
    clicks = [event for event in desk.published if isinstance(event, Click)]
    purchases = [event for event in desk.published if isinstance(event, Purchase)]
    assert tally.sessions == len(shown) == 200
    assert tally.shown == sum(len(event.item_ids) for event in shown)
    assert (tally.clicks, tally.purchases) == (len(clicks), len(purchases))
    assert 0 < tally.purchases < tally.clicks < tally.shown
    assert result.unanswered == 0


def test_a_purchase_follows_its_click_which_follows_its_impression() -> None:
    desk = Desk()
    shop(desk)
    seen = {event.request_id: event for event in desk.published if isinstance(event, Impression)}
    clicked = {(e.request_id, e.item_id): e for e in desk.published if isinstance(e, Click)}
    for click in clicked.values():
        impression = seen[click.request_id]
        assert click.item_id in impression.item_ids
        assert impression.ts < click.ts
    for event in desk.published:
        if isinstance(event, Purchase):
            assert clicked[event.request_id, event.item_id].ts < event.ts


def test_the_same_seed_and_start_are_the_same_events() -> None:
    first, second, other = Desk(), Desk(), Desk()
    shop(first)
    shop(second)
    shop(other, seed=99)
    key = [(type(event), event.event_id, event.ts) for event in first.published]
    assert key == [(type(event), event.event_id, event.ts) for event in second.published]
    assert key != [(type(event), event.event_id, event.ts) for event in other.published]


def test_clicks_come_as_often_as_the_truth_says() -> None:
    desk = Desk()
    (tally,) = shop(desk, sessions=3000).arms.values()
    # Four standard errors of a sum of that many draws.
    assert tally.clicks == pytest.approx(tally.expected_clicks, abs=4 * tally.expected_clicks**0.5)
    assert tally.purchases == pytest.approx(tally.expected_purchases, abs=4 * tally.expected_purchases**0.5)


def test_who_gets_no_answer_is_counted_and_does_nothing() -> None:
    desk = Desk(frozenset({"u7"}))
    result = shop(desk)
    assert result.unanswered > 0
    assert all(event.user_id != "u7" for event in desk.published if isinstance(event, (Click, Impression)))


def test_a_shopper_who_stops_early_clicks_nothing_below() -> None:
    desk = Desk()
    # Everything that is looked at is clicked: the lowest click is where the look ended.
    shop(desk, sessions=300, click_position=0.5, click_base=50.0, k=8)
    clicks_of: dict[str, set[str]] = {}
    for event in desk.published:
        if isinstance(event, Click):
            assert event.request_id is not None
            clicks_of.setdefault(event.request_id, set()).add(event.item_id)
    for items in clicks_of.values():
        assert items == {f"i{n}" for n in range(len(items))}
    assert len({len(items) for items in clicks_of.values()}) > 3
