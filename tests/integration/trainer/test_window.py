"""The trainer's window on a real Kafka: what is read, what is new, and what is kept."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from registry.bundles.prompt import Prompt
from streams.errors import SidstreamError
from streams.events import CatalogItem, Click, Event, PreferencePair, Purchase, SidAssignment
from streams.settings import KafkaSettings
from streams.wire.admin import create_topics, delete_topics
from streams.wire.client import Client
from tests.conftest import FreshStack
from tests.tiny_explorations import exploration
from tests.tiny_log import NOBODY
from trainer.log.interaction_log import InteractionLog
from trainer.log.window import TOPICS, Window, read_window
from trainer.sequences.interactions import training_catalogue

pytestmark = pytest.mark.integration

T0 = 1_600_000_000_000
CODEBOOK = "0" * 16


def publish(kafka: KafkaSettings, events: Iterable[Event]) -> None:
    with Client(kafka) as client:
        client.publish_all(events)


def sequences(window: Window) -> dict[str, list[str]]:
    prompt = Prompt((4, 4), 10)
    catalogue = training_catalogue(window.sids(CODEBOOK), {}, prompt)
    log = window.user_sequences(catalogue)
    return {
        user: [catalogue.item_ids[item] for item in log.items[log.starts[at] : log.starts[at + 1]]]
        for at, user in enumerate(log.users)
    }


def shop_events() -> list[Event]:
    events: list[Event] = []
    for number in range(4):
        item = f"i{number}"
        events.append(CatalogItem.new(item_id=item, title=f"old title {number}", ts=T0))
        events.append(CatalogItem.new(item_id=item, title=f"title {number}", ts=T0 + 1))
        events.append(
            SidAssignment.new(item_id=item, sid=[number, 0], codebook=CODEBOOK, event_id=f"s{number}", ts=T0)
        )
    return events


def pairs_of(window: Window) -> list[PreferencePair]:
    return window.preference_pairs(9, CODEBOOK, ("purchased_over_clicked",), 10, NOBODY)[0].pairs


def test_a_window_has_each_event_once_and_the_next_one_only_what_came_since(
    fresh_stack: FreshStack, tmp_path: Path
) -> None:
    kafka, _ = fresh_stack()
    buy = Purchase.new(user_id="u1", item_id="i2", price=1.0, ts=T0 + 30, event_id="b1")
    click = Click.new(user_id="u1", item_id="i1", ts=T0 + 20, event_id="c1")
    cart = Click.new(user_id="u1", item_id="i2", kind="cart", ts=T0 + 25, event_id="c2")
    # Repeated, out of order, and of an item without a SID.
    unknown = Click.new(user_id="u2", item_id="nowhere", ts=T0)
    publish(kafka, [*shop_events(), buy, cart, click, click, buy, unknown])
    log = InteractionLog.open(tmp_path)
    window = read_window(kafka, log)
    assert sequences(window) == {"u1": ["i1", "i2", "i2"]}
    assert {name: one.title for name, one in window.catalogue_records().items()} == {
        f"i{n}": f"title {n}" for n in range(4)
    }
    assert window.count_new() == 6
    assert set(window.ranges) == set(TOPICS)
    assert all(begin == 0 for parts in window.ranges.values() for begin, _ in parts.values())

    pair = PreferencePair.new(
        event_id="p1", ts=T0 + 40, user_id="u1", scheme="purchased_over_clicked", codebook=CODEBOOK,
        chosen_item="i2", chosen=[2, 0], rejected_items=["i1"], rejected=[[1, 0]], history=[[1, 0]],
    )  # fmt: skip
    later = Click.new(user_id="u1", item_id="i3", ts=T0 + 50, event_id="c3")
    publish(kafka, [pair, pair, later])
    second = read_window(kafka, InteractionLog.open(tmp_path), parent=window.ranges)
    assert second.count_new() == 1
    assert [one.event_id for one in pairs_of(second)] == ["p1"]
    assert sequences(second) == {"u1": ["i1", "i2", "i2", "i3"]}
    prompt = Prompt((4, 4), 10)
    events_of_users = second.user_sequences(training_catalogue(second.sids(CODEBOOK), {}, prompt))
    assert events_of_users.fresh.tolist() == [False, False, False, True]
    # From where no model was made yet, all of it is new; and nothing was read twice.
    whole = read_window(kafka, InteractionLog.open(tmp_path))
    assert whole.count_new() == 7
    assert sum(file.rows for file in whole.log.files if file.topic == "clicks") == 5
    # Also where none is new: alignment starts anew in each cycle.
    assert len(pairs_of(read_window(kafka, InteractionLog.open(tmp_path), parent=whole.ranges))) == 1


def test_records_that_break_the_contract_are_counted_and_left_out(
    fresh_stack: FreshStack, tmp_path: Path
) -> None:
    from kafka import KafkaProducer

    kafka, _ = fresh_stack()
    publish(kafka, [*shop_events(), Click.new(user_id="u1", item_id="i1", ts=T0)])
    producer = KafkaProducer(bootstrap_servers=kafka.bootstrap)
    for value in (b"\xff\xfe", b"{}", b"not json"):
        producer.send("clicks", key=b"u1", value=value).get(timeout=30)
    # Only where the newest record of a key counts does one without a value say something.
    for topic in ("preferences", "explorations", "catalog"):
        producer.send(topic, key=b"i3", value=None).get(timeout=30)
    producer.close()
    publish(kafka, [Click.new(user_id="u1", item_id="i2", ts=T0 + 1)])
    window = read_window(kafka, InteractionLog.open(tmp_path))
    assert sequences(window) == {"u1": ["i1", "i2"]}
    assert sum(file.refused for file in window.log.files) == 5
    assert pairs_of(window) == []
    assert window.explorations(0, NOBODY) == []
    assert window.catalogue_records().keys() == {"i0", "i1", "i2"}


def test_explored_answers_and_the_clicks_on_them_are_read(fresh_stack: FreshStack, tmp_path: Path) -> None:
    kafka, _ = fresh_stack()
    one, other = exploration(1, ts=T0, user_id="u1"), exploration(2, ts=T0 + 1, user_id="u2")
    click = Click.new(user_id="u1", item_id=one.item_id, ts=T0 + 9, request_id=one.request_id)
    last = Click.new(user_id="u3", item_id="i1", ts=T0 + 1001)
    publish(kafka, [*shop_events(), one, other, one, click, click, last])
    window = read_window(kafka, InteractionLog.open(tmp_path))
    actual = sorted(window.explorations(1000, NOBODY), key=lambda pair: pair[0].ts)
    assert actual == [(one, True), (other, False)]
    assert (
        read_window(kafka, InteractionLog.open(tmp_path), parent=window.ranges).explorations(1000, NOBODY)
        == []
    )


def test_topics_made_again_begin_anew_and_the_old_events_are_kept(
    fresh_stack: FreshStack, tmp_path: Path
) -> None:
    kafka, _ = fresh_stack()
    first = [Click.new(user_id="u1", item_id="i1", ts=T0 + n, event_id=f"a{n}") for n in range(5)]
    publish(kafka, [*shop_events(), *first])
    before = read_window(kafka, InteractionLog.open(tmp_path))
    delete_topics(kafka)
    create_topics(kafka)
    publish(kafka, [*shop_events(), Click.new(user_id="u1", item_id="i2", ts=T0 + 9, event_id="b0")])
    after = read_window(kafka, InteractionLog.open(tmp_path), parent=before.ranges)
    assert after.count_new() == 1
    assert sequences(after) == {"u1": ["i1"] * 5 + ["i2"]}
    log = after.user_sequences(training_catalogue(after.sids(CODEBOOK), {}, Prompt((4, 4), 10)))
    assert log.fresh.tolist() == [False] * 5 + [True]


def test_a_changed_log_file_is_named(fresh_stack: FreshStack, tmp_path: Path) -> None:
    kafka, _ = fresh_stack()
    publish(kafka, [*shop_events(), Click.new(user_id="u1", item_id="i1", ts=T0)])
    window = read_window(kafka, InteractionLog.open(tmp_path))
    file = next(file for file in window.log.files if file.topic == "clicks")
    (tmp_path / file.path).write_bytes(b"something else")
    with pytest.raises(SidstreamError, match=r"clicks/.*was changed"):
        sequences(window)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(SidstreamError, match="damaged"):
        InteractionLog.open(tmp_path)


def test_a_missing_topic_is_named(fresh_stack: FreshStack, tmp_path: Path) -> None:
    kafka, _ = fresh_stack()
    delete_topics(kafka)
    with pytest.raises(SidstreamError, match="does not exist"):
        read_window(kafka, InteractionLog.open(tmp_path))
    create_topics(kafka)
