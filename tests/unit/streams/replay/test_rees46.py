"""REES46's rows become clicks, carts and purchases; items without a title get one by the stated rule."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from streams.errors import SidstreamError
from streams.events import CatalogItem, Click, Purchase, decode, encode
from streams.replay import Rees46, source_of
from streams.replay.rees46 import find_rees46_file

HEADER = "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session\n"
ROWS = (
    "2019-10-01 00:00:02 UTC,purchase,1,77,electronics.smartphone,samsung,130.5,u1,s\n"
    "2019-10-01 00:00:00 UTC,view,1,77,electronics.smartphone,samsung,131.5,u1,s\n"
    "2019-10-01 00:00:01 UTC,cart,2,78,,,0.00,u2,s\n"
    "2019-10-01 00:00:01 UTC,view,3,79,,shiseido,,u2,s\n"
    "2019-10-01 00:00:01 UTC,view,3,79,,shiseido,,u2,s\n"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rees46" / "events.csv"
    path.parent.mkdir()
    path.write_text(HEADER + ROWS)
    return path


def test_views_carts_and_purchases_come_in_event_time_with_ties_as_in_the_file(file: Path) -> None:
    events = list(Rees46(file).events())
    first = 1_569_888_000_000
    assert [(type(e).__name__, getattr(e, "kind", None), e.item_id, e.ts - first) for e in events] == [
        ("Click", "click", "1", 0),
        ("Click", "cart", "2", 1000),
        ("Click", "click", "3", 1000),
        ("Click", "click", "3", 1000),
        ("Purchase", None, "1", 2000),
    ]
    assert events[-1].price == 130.5  # type: ignore[union-attr]


def test_every_row_is_an_event_of_its_own_with_a_stable_id(file: Path) -> None:
    ids = [event.event_id for event in Rees46(file).events()]
    assert len(set(ids)) == 5
    assert ids == [event.event_id for event in Rees46(file).events()]


def test_brand_and_category_path_stand_for_a_title(file: Path) -> None:
    items = {item.item_id: item for item in Rees46(file).catalogue()}
    assert items["1"].title == "samsung electronics smartphone"
    assert (items["1"].category, items["1"].brand, items["1"].price) == (
        "electronics > smartphone",
        "samsung",
        131.0,
    )
    assert items["3"].title == "shiseido"
    assert (items["2"].title, items["2"].price) == ("category 78", None)
    assert all(decode(CatalogItem, encode(item)) == item for item in items.values())


def test_a_window_and_its_count_agree(file: Path) -> None:
    log = Rees46(file)
    assert log.count(1_569_888_001_000, 1_569_888_002_000) == 3
    assert len(list(log.events(1_569_888_001_000, 1_569_888_002_000))) == 3


def test_the_file_is_found_by_name_by_folder_or_the_error_says_how(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_rees46_file(tmp_path) == find_rees46_file(file.parent) == find_rees46_file(file) == file
    monkeypatch.delenv("SIDSTREAM_DATA", raising=False)
    with pytest.raises(SidstreamError, match="--data or SIDSTREAM_DATA"):
        source_of("rees46")
    with pytest.raises(SidstreamError, match=f"REES46 is not in {tmp_path / 'none'}"):
        source_of("rees46", tmp_path / "none")
    monkeypatch.setenv("SIDSTREAM_DATA", str(tmp_path))
    assert source_of("rees46").count() == 5


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a,b\n1,2\n", "lacks the column"),
        (HEADER + "yesterday,view,1,77,,,1,u,s\n", "line 2"),
        (HEADER + "2019-10-01 00:00:00 UTC,wish,1,77,,,1,u,s\n", "event_type is 'wish'"),
    ],
)
def test_another_kind_of_file_is_refused_with_the_line(file: Path, text: str, named: str) -> None:
    file.write_text(text)
    with pytest.raises(SidstreamError, match=named):
        list(Rees46(file).events())


@pytest.mark.skipif(
    "SIDSTREAM_DATA" not in os.environ, reason="SIDSTREAM_DATA does not name a folder with rees46"
)
def test_the_real_log_gives_its_known_numbers() -> None:
    log = source_of("rees46")
    events = list(log.events())
    kinds = Counter(
        "purchase" if isinstance(e, Purchase) else e.kind for e in events if isinstance(e, Click | Purchase)
    )
    assert kinds == {"click": 17_055, "cart": 165, "purchase": 214}
    assert len({event.event_id for event in events}) == len(events) == 17_434
    assert len({item.item_id for item in log.catalogue()}) == 6_493
