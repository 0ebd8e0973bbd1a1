"""The benchmark of position bias: its rules see what was shown, passed over and truly looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from benchmarks.position_bias import SteepShop, TrueRates, examination_rules, table
from streams.events import CatalogItem, Click, Event, Impression, Purchase
from trainer.settings import TrainerSettings

ITEMS, USERS, START_MS = 30, 12, 1_700_000_000_000
WORDS = ("red", "blue", "lantern", "mug", "bag", "wooden", "heart", "clock", "tin", "garden")
SETTINGS = TrainerSettings.model_validate({"width": 16, "layers": 1, "heads": 2, "max_items": 8})


class Year:
    """A log of purchases of a few items by a few users."""

    def catalogue(self) -> Iterator[CatalogItem]:
        for n in range(ITEMS):
            title = f"{WORDS[n % 10]} {WORDS[(n // 10 + 3 * n) % 10]} {WORDS[n // 3]}"
            yield CatalogItem.new(item_id=f"i{n:02}", title=title, price=1.0)

    def events(self, start: int | None = None, end: int | None = None) -> Iterator[Event]:
        random = np.random.default_rng(0)
        for n in range(USERS * 20):
            yield Purchase.new(
                event_id=f"e{n}", ts=START_MS + 1000 * n, user_id=f"u{n % USERS}",
                item_id=f"i{random.integers(ITEMS):02}", price=1.0,
            )  # fmt: skip

    def profiles(self) -> Iterator[Any]:
        return iter(())

    def count(self, start: int | None = None, end: int | None = None) -> int:
        return USERS * 20


class ShopOfOneList(SteepShop):
    """Shows every visit the same ten items."""

    def lists(self, model: object, visits: Sequence[tuple[str, str]]) -> list[list[str]]:
        return [list(self.catalogue.item_ids[:10]) for _ in visits]


@pytest.fixture(scope="module")
def visited() -> tuple[SteepShop, list[Event], dict[str, int]]:
    shop = ShopOfOneList(1, Year(), ITEMS, 0.6, SETTINGS)
    events, examined = shop.visits(None, 300)  # type: ignore[arg-type]
    return shop, events, examined


def test_nobody_clicks_below_the_places_that_are_kept_as_looked_at(visited: Any) -> None:
    _, events, examined = visited
    shown = {e.request_id: e.item_ids for e in events if isinstance(e, Impression)}
    clicks = [e for e in events if isinstance(e, Click)]
    assert set(examined) == set(shown)
    assert len(clicks) > 30
    places = [(shown[e.request_id].index(e.item_id), examined[e.request_id or ""]) for e in clicks]
    assert all(place < looked for place, looked in places)
    assert len(set(examined.values())) > 3


def test_each_rule_rejects_no_further_down_than_its_shoppers_looked(visited: Any) -> None:
    shop, events, examined = visited
    shown = shop.catalogue.item_ids[:10]
    deepest = {}
    for name, rule in examination_rules(examined).items():
        pairs = [p for p in shop.pairs(events, rule) if p.scheme != "purchased_over_clicked"]
        deepest[name] = {(p.event_id, item) for p in pairs for item in p.rejected_items}
        assert pairs
    everything, passed_over, looked_at = deepest.values()
    # What is above the lowest click was looked at, and what was looked at was shown.
    assert passed_over < looked_at < everything
    for event_id, item in looked_at:
        request = event_id.partition("-clicked")[0].partition("-purchased")[0]
        assert shown.index(item) < examined[request]


def test_the_table_has_a_mean_and_an_interval_for_each_rule() -> None:
    before, after = TrueRates(0.2, 0.1, 0.2), [TrueRates(0.22, 0.1, 0.22), TrueRates(0.24, 0.1, 0.24)]
    lines = [
        {"model": "rule", "rate": rate, "value": change}
        for rates in after
        for rate, change in rates.relative_to(before).items()
    ]
    # Two seeds: the mean +- 12.706 times the standard error of .05.
    assert table(lines)[2] == (
        "| rule | +15.0% (-48.5% to +78.5%) | +0.0% (+0.0% to +0.0%) | +15.0% (-48.5% to +78.5%) |"
    )
