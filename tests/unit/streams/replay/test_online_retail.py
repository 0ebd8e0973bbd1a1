"""The year that ships: every row is there, the cleaning rule gives the published size, and ids are stable."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pyarrow.parquet as pq
import pytest

from streams.errors import SidstreamError
from streams.events import CatalogItem, Purchase, UserProfile, decode, encode
from streams.replay import OnlineRetail, source_of, user_item_sequences
from streams.replay.online_retail import FILE

DECEMBER_2011 = 1_322_697_600_000


@pytest.fixture(scope="module")
def shop() -> OnlineRetail:
    return OnlineRetail()


@pytest.fixture(scope="module")
def purchases(shop: OnlineRetail) -> list[Purchase]:
    return list(shop.events())


@pytest.fixture(scope="module")
def items(shop: OnlineRetail) -> dict[str, CatalogItem]:
    return {item.item_id: item for item in shop.catalogue()}


def test_the_file_holds_every_row_of_the_original_in_five_megabytes() -> None:
    assert pq.read_metadata(FILE).num_rows == 541_909
    assert FILE.stat().st_size < 5_000_000


def test_the_cleaning_rule_gives_the_known_numbers(shop: OnlineRetail, purchases: list[Purchase]) -> None:
    assert len(purchases) == shop.count() == 396_337
    assert len({event.user_id for event in purchases}) == 4_334
    assert len({event.item_id for event in purchases}) == 3_659


def test_no_cancellation_fee_or_gift_is_a_purchase(purchases: list[Purchase]) -> None:
    assert all(re.fullmatch(r"[0-9]{5}[A-Za-z]*", event.item_id) for event in purchases)
    assert all(re.fullmatch(r"[0-9]{6}", event.order_id or "") for event in purchases)
    assert all(event.quantity > 0 and event.price > 0 and event.user_id.isdigit() for event in purchases)


def test_each_line_of_an_invoice_is_an_event_of_its_own_in_event_time(purchases: list[Purchase]) -> None:
    assert len({event.event_id for event in purchases}) == len(purchases)
    assert all(event.ts <= next_event.ts for event, next_event in itertools.pairwise(purchases))


def test_the_first_row_is_what_the_file_says(purchases: list[Purchase]) -> None:
    assert purchases[0] == Purchase(
        schema_version=1, event_id="online-retail-536365-1", ts=1_291_191_960_000, user_id="17850",
        item_id="85123A", price=2.55, quantity=6, order_id="536365",
    )  # fmt: skip


def test_reading_twice_gives_the_same_events(items: dict[str, CatalogItem]) -> None:
    second_reading = OnlineRetail()
    assert {item.item_id: item for item in second_reading.catalogue()} == items


def test_every_item_bought_is_in_the_catalogue_and_both_follow_the_contract(
    purchases: list[Purchase], items: dict[str, CatalogItem]
) -> None:
    assert set(items) == {event.item_id for event in purchases}
    assert all(decode(CatalogItem, encode(item)) == item for item in items.values())
    assert all(decode(Purchase, encode(event)) == event for event in purchases[::997])


def test_title_and_price_are_the_usual_ones(items: dict[str, CatalogItem]) -> None:
    heart = items["85123A"]
    assert heart.title == "White Hanging Heart T-light Holder"
    assert heart.price == 2.95
    assert heart.ts == 1_291_191_960_000
    assert all(item.title.strip() and "  " not in item.title for item in items.values())


def test_a_window_holds_its_start_and_not_its_end(shop: OnlineRetail, purchases: list[Purchase]) -> None:
    edge = purchases[200_000].ts
    before, after = list(shop.events(end=edge)), list(shop.events(start=edge))
    assert before + after == purchases
    assert after[0].ts == edge
    assert shop.count(DECEMBER_2011) == sum(event.ts >= DECEMBER_2011 for event in purchases) > 0


def test_a_users_past_is_their_items_oldest_first(shop: OnlineRetail, purchases: list[Purchase]) -> None:
    past = user_item_sequences(shop)
    assert len(past) == 4_334
    assert past["17850"] == [event.item_id for event in purchases if event.user_id == "17850"]


def test_every_user_has_the_country_of_the_first_purchase(
    shop: OnlineRetail, purchases: list[Purchase]
) -> None:
    first: dict[str, int] = {}
    for event in purchases:
        first.setdefault(event.user_id, event.ts)
    profiles = list(shop.profiles())
    assert {profile_event.user_id: profile_event.ts for profile_event in profiles} == first
    assert len(profiles) == len({profile_event.event_id for profile_event in profiles}) == 4_334
    assert all(decode(UserProfile, encode(profile_event)) == profile_event for profile_event in profiles)
    assert list(OnlineRetail().profiles()) == profiles
    counts = Counter(profile_event.attributes["country"] for profile_event in profiles)
    assert counts.most_common(2) == [("United Kingdom", 3_916), ("Germany", 94)]
    assert [profile_event.attributes for profile_event in profiles if profile_event.user_id == "12583"] == [
        {"country": "France"}
    ]


def test_an_unknown_log_is_named() -> None:
    with pytest.raises(SidstreamError, match="no log 'online_retail'"):
        source_of("online_retail")
