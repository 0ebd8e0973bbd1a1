"""The agents on real Kafka and Redis: every event ends in a history, a pair, a sum or dead letters."""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import redis
from kafka import KafkaProducer

from agents.app import check_prerequisites
from harness.agents_worker import worker, write_codebook
from harness.servers import wait_until
from streams.errors import SidstreamError
from streams.events import (
    CatalogItem,
    Click,
    Event,
    Impression,
    PreferencePair,
    Purchase,
    RankedItem,
    Recommendation,
    SidAssignment,
    encode,
)
from streams.settings import KafkaSettings, RedisSettings
from streams.state import history, keys
from streams.wire.admin import consumer_group_lag, create_topics, delete_topics, end_offsets
from streams.wire.bulk_writer import publish_all
from streams.wire.connect import client_options
from streams.wire.records import partition_of
from streams.wire.topic_reader import read_newest_events, read_records
from tests.conftest import FreshStack
from tests.reference_pairs import reference

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

T0 = 1_700_000_000_000
WAIT_S = 120.0


def item(number: int, title: str = "") -> CatalogItem:
    return CatalogItem.new(item_id=f"i{number}", title=title or f"thing {number} of kind {number % 5}", ts=T0)


def click(user: str, number: int, at: int, request: str | None = None) -> Click:
    return Click.new(
        user_id=user, item_id=f"i{number}", ts=T0 + at, request_id=request, event_id=f"c-{user}-{number}-{at}"
    )


def buy(user: str, number: int, at: int, request: str | None = None) -> Purchase:
    return Purchase.new(
        user_id=user, item_id=f"i{number}", ts=T0 + at, price=1.0, request_id=request,
        event_id=f"p-{user}-{number}-{at}",
    )  # fmt: skip


def read(kafka: KafkaSettings, topic: str) -> list[dict[str, Any]]:
    """Every record of a topic."""
    return [json.loads(record.value) for record in read_records(kafka, topic)]


def count(kafka: KafkaSettings, topic: str) -> int:
    return sum(end_offsets(kafka, topic).values())


def entries(store: redis.Redis, user: str) -> list[history.HistoryEntry]:
    return history.decode_history(store.get(keys.history(user))).entries


def total(store: redis.Redis) -> int:
    return sum(len(history.decode_history(store.get(key)).entries) for key in store.scan_iter(match="h:*"))


def test_what_cannot_be_applied_ends_in_dead_letters_and_its_neighbours_are_applied(
    fresh_stack: FreshStack, tmp_path: Path
) -> None:
    kafka, url = fresh_stack()
    write_codebook(tmp_path / "codebook")
    publish_all(kafka, [item(n) for n in range(10)])
    good = json.loads(encode(buy("u", 0, 0)))

    def with_fields(**fields: Any) -> bytes:
        return json.dumps({**good, "event_id": json.dumps(fields), **fields}).encode()

    refused_values = {
        "malformed_json": b'{"schema_version": 1, ',
        "unknown_schema_version": with_fields(schema_version=7),
        "invalid_field": with_fields(price=-1.0),
        "not_utf8": b'{"user_id": "\xff\xfe"}',
        "timestamp_in_future": with_fields(ts=32_503_680_000_000),
        "empty": b"",
        "unknown_item": with_fields(item_id="never-listed"),
    }
    producer = KafkaProducer(**client_options(kafka))
    for n, value in enumerate(refused_values.values()):
        producer.send("purchases", key=b"u", value=encode(buy("u", n, n)))
        producer.send("purchases", key=b"u", value=value)
    producer.send("purchases", key=b"u", value=encode(buy("u", 9, 9)))
    producer.send("catalog", key=b"x", value=b'{"schema_version": 1}')
    producer.flush()
    producer.close()
    with (
        redis.Redis.from_url(url) as store,
        worker(kafka, url, tmp_path / "codebook", tmp_path / "log", park_seconds=1, codebook_check_s=0.5),
    ):
        wait_until(lambda: count(kafka, "dead-letters") >= len(refused_values) + 1, WAIT_S, "dead letters")
        wait_until(lambda: total(store) == len(refused_values) + 1, WAIT_S, "the neighbours' history")
        wait_until(lambda: not list(store.scan_iter(match="parked*")), WAIT_S, "no event still parked")
        letters = [letter for letter in read(kafka, "dead-letters") if letter["source"] == "purchases"]
        assert {
            letter["reason"]: base64.b64decode(letter["value_base64"]) for letter in letters
        } == refused_values
        assert {base64.b64decode(letter["key_base64"]) for letter in letters} == {b"u"}
        assert sorted(letter["offset"] for letter in letters) == list(range(1, 2 * len(refused_values), 2))
        assert {letter["stage"] for letter in letters if letter["reason"] == "unknown_item"} == {"histories"}
        assert count(kafka, "dead-letters") == len(refused_values) + 1


def test_events_before_their_items_and_items_before_the_codebook_wait_and_are_applied(
    fresh_stack: FreshStack, tmp_path: Path
) -> None:
    kafka, url = fresh_stack()
    publish_all(kafka, [click("u", n, n) for n in range(6)] + [click("v", 1, 1)])
    publish_all(kafka, [item(n) for n in range(3)])
    with (
        redis.Redis.from_url(url) as store,
        worker(kafka, url, tmp_path / "codebook", tmp_path / "log", park_seconds=60, codebook_check_s=0.5),
    ):
        wait_until(lambda: len(list(store.scan_iter(match="parked:*"))) == 6, WAIT_S, "parked events")
        assert total(store) == 0
        codebook = write_codebook(tmp_path / "codebook")
        wait_until(lambda: total(store) == 4, WAIT_S, "events of the items that are listed")
        publish_all(kafka, [item(n) for n in range(3, 6)])
        wait_until(lambda: total(store) == 7, WAIT_S, "events of the items that came later")
        assert not list(store.scan_iter(match="parked*"))
        assert not count(kafka, "dead-letters")
        # SIDs in Redis, in the histories and on the topic are the same ones, and no two items share one.
        published_sids = {a.item_id: tuple(a.sid) for a in read_newest_events(kafka, SidAssignment).values()}
        redis_sids = store.hgetall(keys.sids(codebook.id))
        assert {i.decode(): history.unpack_sid(sid) for i, sid in redis_sids.items()} == published_sids
        assert len(set(published_sids.values())) == len(published_sids) == 6
        assert [entry.sid for entry in entries(store, "u")] == [published_sids[f"i{n}"] for n in range(6)]

        published = count(kafka, "sids")
        publish_all(kafka, [item(1, "another title altogether"), item(6)])
        wait_until(lambda: count(kafka, "sids") > published, WAIT_S, "the SID of the new item")
        assert read_newest_events(kafka, SidAssignment)[f"{codebook.id}/i1"].sid == list(published_sids["i1"])
        assert count(kafka, "sids") == published + 1


def test_pairs_equal_the_reference_whatever_the_order_of_arrival(
    fresh_stack: FreshStack, tmp_path: Path
) -> None:
    kafka, url = fresh_stack()
    write_codebook(tmp_path / "codebook")
    publish_all(kafka, [item(n) for n in range(12)])
    window, lateness = 600, 60
    rng = random.Random(5)
    log: list[Event] = []
    for n in range(600):
        user, at = f"u{rng.randrange(40)}", rng.randrange(0, 7_200_000, 1000)
        if rng.random() < 0.3:
            request = f"r{n}"
            shown_items = rng.sample(range(12), 6)
            log.append(
                Impression.new(
                    user_id=user, item_ids=[f"i{s}" for s in shown_items], ts=T0 + at, request_id=request,
                    event_id=f"i-{request}",
                )
            )  # fmt: skip
            for s in shown_items[: rng.randrange(4)]:
                log.append(click(user, s, at + rng.randrange(1000, 900_000), request))
                if rng.random() < 0.5:
                    log.append(buy(user, s, at + rng.randrange(1000, 900_000), request))
        else:
            log.append(click(user, rng.randrange(12), at))
            if rng.random() < 0.3:
                log.append(buy(user, rng.randrange(12), at + rng.randrange(0, 900_000)))
    expected = reference(log, window * 1000, 8)
    assert len(expected) > 100
    arrival = sorted(log, key=lambda event: event.ts + rng.randrange(0, lateness * 1000))
    # Half an hour after the last event every window is closed.
    end = max(event.ts for event in log) - T0 + 3_600_000
    for kind in (Click, Purchase, Impression):
        publish_all(kafka, [event for event in arrival if isinstance(event, kind)])
    horizon = [click(f"w{n}", 0, end) for n in range(32)] + [buy(f"w{n}", 0, end) for n in range(32)]
    publish_all(kafka, horizon)
    with worker(
        kafka, url, tmp_path / "codebook", tmp_path / "log", attribution_window_s=window,
        allowed_lateness_s=lateness, idle_s=5, batch_size=97,
    ):  # fmt: skip
        wait_until(lambda: count(kafka, "preferences") >= len(expected), WAIT_S, "the pairs")
    records = read(kafka, "preferences")
    assert len({pair["event_id"] for pair in records}) == len(expected)
    decided = {
        (p["user_id"], p["scheme"], p["request_id"] or p["ts"], p["chosen_item"], tuple(p["rejected_items"]))
        for p in records
    }
    assert decided == expected
    with redis.Redis.from_url(url) as store:
        for record in records:
            pair = PreferencePair.new(**record)
            history_entries = entries(store, pair.user_id)
            earlier_sids = [list(e.sid) for e in history_entries if e.ts < pair.ts]
            assert pair.history == earlier_sids[: len(pair.history)]
            assert len(pair.rejected) == len(pair.rejected_items)


def test_sums_by_arm_survive_a_second_reading_of_the_whole_log(
    fresh_stack: FreshStack, tmp_path: Path
) -> None:
    kafka, url = fresh_stack()
    write_codebook(tmp_path / "codebook")
    publish_all(kafka, [item(n) for n in range(6)])
    rng = random.Random(3)
    log: list[Event] = []
    expected: dict[str, Counter[str]] = {}
    for n in range(200):
        user, request = f"u{n % 20}", f"r{n}"
        ranked = [RankedItem(f"i{s}", [1, 2, 3], -1.0) for s in range(4)]
        log.append(
            Recommendation.new(
                request_id=request,
                user_id=user,
                ts=T0 + n,
                items=ranked,
                bundle="b",
                arm="champion",
                trial="t",
            )
        )
        log.append(
            Impression.new(user_id=user, item_ids=["i0", "i1", "i5"], ts=T0 + n + 1, request_id=request)
        )
        tally = expected.setdefault(user, Counter(impressions=0, clicks=0, orders=0))
        tally["impressions"] += 2
        if rng.random() < 0.6:
            log += [click(user, 0, n + 5, request), click(user, 0, n + 6, request)]
            tally["clicks"] += 1
            if rng.random() < 0.5:
                log.append(buy(user, 0, n + 9, request))
                tally["orders"] += 1
    publish_all(kafka, log)

    def sums(store: redis.Redis) -> dict[str, Counter[str]]:
        sums_by_user = {}
        for key in store.scan_iter(match=keys.sums_pattern("t")):
            row = {k.decode(): v.decode() for k, v in store.hgetall(key).items()}
            assert (row["arm"], row["bundle"]) == ("champion", "b")
            user, cohort = key.decode().split("{")[1].rstrip("}"), T0 // 3_600_000
            kinds = {"i": "impressions", "c": "clicks", "o": "orders"}
            sums_by_user[user] = Counter(
                {name: int(row.get(f"{cohort}:{kind}", 0)) for kind, name in kinds.items()}
            )
        return sums_by_user

    with redis.Redis.from_url(url) as store:
        for group in ("first", "second"):
            with worker(kafka, url, tmp_path / "codebook", tmp_path / group, group=group, idle_s=600):
                wait_until(lambda: sums(store) == expected, WAIT_S, "the sums")
                done = f"{group} has read everything"
                wait_until(lambda: caught_up(kafka, group), WAIT_S, done)  # noqa: B023
                assert sums(store) == expected


def caught_up(kafka: KafkaSettings, group: str) -> bool:
    """True when the group has committed every record."""
    try:
        return consumer_group_lag(kafka, group) == 0
    except SidstreamError:  # the group has not begun
        return False


def test_an_event_in_a_partition_that_is_not_its_users_is_sent_where_it_belongs(
    fresh_stack: FreshStack, tmp_path: Path
) -> None:
    kafka, url = fresh_stack()
    write_codebook(tmp_path / "codebook")
    publish_all(kafka, [item(n) for n in range(3)])
    right = partition_of(b"u", kafka.partitions)
    producer = KafkaProducer(**client_options(kafka))
    for n in range(3):
        # As kcat does without a key: anywhere.
        producer.send("clicks", value=encode(click("u", n, n)), partition=(right + 1 + n) % kafka.partitions)
    producer.flush()
    producer.close()
    with (
        redis.Redis.from_url(url) as store,
        worker(kafka, url, tmp_path / "codebook", tmp_path / "log", codebook_check_s=0.5),
    ):
        wait_until(lambda: total(store) == 3, WAIT_S, "the history")
        assert end_offsets(kafka, "clicks")[right] == 3
        assert not count(kafka, "dead-letters")


def test_without_the_topics_the_worker_says_so_in_one_sentence(kafka: KafkaSettings, redis_url: str) -> None:
    delete_topics(kafka)
    store = RedisSettings.model_validate({"url": redis_url})
    with pytest.raises(SidstreamError, match="topics create"):
        check_prerequisites(kafka, store)
    create_topics(kafka)
    check_prerequisites(kafka, store)
    with pytest.raises(SidstreamError, match="SIDSTREAM_REDIS__URL"):
        check_prerequisites(kafka, RedisSettings.model_validate({"url": "redis://127.0.0.1:1/0"}))
