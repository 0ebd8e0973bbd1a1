"""A log of the past on a real broker: every event once, in event time, at the requested speed."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from streams.errors import SidstreamError
from streams.events import CatalogItem, Click, Event, Purchase, UserProfile, decode, encode
from streams.replay import JsonLines, OnlineRetail
from streams.replay.engine import replay, replay_raw
from streams.replay.source import in_time_range
from streams.wire.admin import end_offsets
from tests.conftest import FreshStack
from tests.responder import read_new

pytestmark = pytest.mark.integration
DECEMBER_8 = 1_323_302_400_000
T = 1_767_225_600_000


class Few:
    """A log of one item and three clicks, 300 ms apart."""

    def catalogue(self) -> Iterator[CatalogItem]:
        yield CatalogItem.new(event_id="c", ts=T, item_id="i", title="a thing")

    def profiles(self) -> Iterator[UserProfile]:
        yield UserProfile.new(event_id="p", ts=T, user_id="u", attributes={"country": "Peru"})

    def events(self, start: int | None = None, end: int | None = None) -> Iterator[Event]:
        for n in range(3):
            if in_time_range(T + 300 * n, start, end):
                yield Click.new(event_id=f"e{n}", ts=T + 300 * n, user_id="u", item_id="i")

    def count(self, start: int | None = None, end: int | None = None) -> int:
        return len(list(self.events(start, end)))


def test_a_window_of_the_year_arrives_once_with_each_user_in_event_time(fresh_stack: FreshStack) -> None:
    kafka, _ = fresh_stack()
    shop = OnlineRetail()
    progress: list[int] = []
    done = replay(kafka, shop, start=DECEMBER_8, on_progress=progress.append)
    expected = list(shop.events(DECEMBER_8))
    assert done.topics == {"catalog": 3_659, "users": 4_334, "purchases": len(expected)}
    assert done.record_count == sum(progress) == sum(done.topics.values())
    assert (done.first_ts, done.last_ts) == (expected[0].ts, expected[-1].ts)

    records = read_new(kafka, "purchases", len(expected), dict.fromkeys(end_offsets(kafka, "purchases"), 0))
    arrived: dict[str, list[Purchase]] = defaultdict(list)
    for record in sorted(records, key=lambda record: (record.partition, record.offset)):
        event = decode(Purchase, record.value)
        arrived[event.user_id].append(event)
    expected_by_user: dict[str, list[Purchase]] = defaultdict(list)
    for event in expected:
        expected_by_user[event.user_id].append(event)
    assert arrived == expected_by_user


def test_each_part_can_be_left_out(fresh_stack: FreshStack) -> None:
    kafka, _ = fresh_stack()
    assert replay(kafka, Few(), catalog=False).topics == {"clicks": 3}
    assert replay(kafka, Few(), events=False).topics == {"catalog": 1, "users": 1}
    assert replay(kafka, Few(), catalog=False, start=T + 300, end=T + 600).topics == {"clicks": 1}


def test_speed_is_a_multiple_of_the_time_it_took(fresh_stack: FreshStack) -> None:
    kafka, _ = fresh_stack()
    started_at = time.monotonic()
    replay(kafka, Few(), catalog=False, speed=1.0)
    # A lower bound, not a speed: 600 ms of the past take at least that long at speed 1.
    assert time.monotonic() - started_at >= 0.6
    stamps = [
        r.timestamp for r in read_new(kafka, "clicks", 3, dict.fromkeys(end_offsets(kafka, "clicks"), 0))
    ]
    assert stamps == sorted(stamps)
    assert stamps[-1] - stamps[0] >= 400


def test_an_event_that_breaks_the_contract_ends_the_replay_by_name(fresh_stack: FreshStack) -> None:
    kafka, _ = fresh_stack()

    class Broken(Few):
        def events(self, start: int | None = None, end: int | None = None) -> Iterator[Event]:
            yield from super().events(start, end)
            yield Purchase(schema_version=1, event_id="bad", ts=T, user_id="u", item_id="i", price=-1.0)

    with pytest.raises(SidstreamError, match="Purchase bad was not sent: invalid_field: price"):
        replay(kafka, Broken())


def test_raw_lines_reach_the_topic_byte_for_byte(fresh_stack: FreshStack, tmp_path: Path) -> None:
    kafka, _ = fresh_stack()
    path = tmp_path / "bad.jsonl"
    good = encode(Click.new(user_id="u", item_id="i"))
    path.write_bytes(b"\n".join([good, b"\xff\xfe not utf-8", b'{"price": -1}']))
    assert replay_raw(kafka, JsonLines(path, "clicks").records()).topics == {"clicks": 3}
    records = read_new(kafka, "clicks", 3, dict.fromkeys(end_offsets(kafka, "clicks"), 0))
    assert {record.value for record in records} == {good, b"\xff\xfe not utf-8", b'{"price": -1}'}


def test_a_file_of_lines_is_replayed_with_its_catalogue_first(
    fresh_stack: FreshStack, tmp_path: Path
) -> None:
    kafka, _ = fresh_stack()
    path = tmp_path / "events.jsonl"
    events = [*Few().events(), *Few().catalogue()]
    path.write_text(
        "".join(json.dumps({"topic": e.topic, "value": json.loads(encode(e))}) + "\n" for e in events)
    )
    assert list(replay(kafka, JsonLines(path)).topics.items()) == [("catalog", 1), ("clicks", 3)]


def test_without_topics_the_remedy_is_named(fresh_stack: FreshStack) -> None:
    from streams.wire.admin import create_topics, delete_topics

    kafka, _ = fresh_stack()
    delete_topics(kafka)
    try:
        with pytest.raises(SidstreamError, match=r"topic catalog does not exist.*sidstream topics create"):
            replay(kafka, Few())
    finally:
        create_topics(kafka)
