"""Profiles on real Kafka and Redis: the newest counts in any order, and serving reads them with histories."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kafka import KafkaProducer

from harness.agents_worker import worker, write_codebook
from harness.servers import wait_until
from serving.history_reader import HistoryReader, StoredUser
from streams.errors import SidstreamError
from streams.events import UserProfile, encode
from streams.settings import KafkaSettings, RedisSettings
from streams.state import keys, profile
from streams.wire.admin import consumer_group_lag, end_offsets
from streams.wire.bulk_writer import publish_all
from streams.wire.connect import client_options

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

T0 = 1_700_000_000_000
WAIT_S = 120.0


def about(user: str, at: int, event: str = "e", **attributes: str) -> UserProfile:
    return UserProfile.new(user_id=user, ts=T0 + at, event_id=event, attributes=attributes)


@pytest.fixture(scope="module")
def store(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


# Few times, and far apart ones, so that ties and bytes above 127 happen.
profiles = st.builds(
    lambda at, event, value: about("u", at, event, value=value),
    st.sampled_from([0, 1, 127, 128, 255, 256, 2**40]), st.sampled_from("abc"), st.sampled_from("xyz"),
)  # fmt: skip


@given(st.lists(profiles, min_size=1, max_size=8, unique_by=lambda one: (one.ts, one.event_id)), st.randoms())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_and_any_repetition_leaves_the_newest(store, events, random) -> None:
    script = store.register_script(profile.STORE_IF_NEWER.source)
    key = keys.profile("u")
    store.delete(key)
    arrivals = [*events, *random.choices(events, k=4)]
    random.shuffle(arrivals)
    for event in arrivals:
        script(keys=[key], args=[profile.pack_profile(event)])
    newest = max(events, key=profile.newest_order_key)
    assert newest.ts == max(event.ts for event in events)
    assert store.get(key) == profile.pack_profile(newest)
    assert profile.unpack_profile(store.get(key)) == newest.attributes
    assert script(keys=[key], args=[b""]) == 1
    assert store.get(key) is None
    assert script(keys=[key], args=[b""]) == 0


def test_another_layout_is_named_and_not_written_over(store) -> None:
    key = keys.profile("later")
    store.set(key, b"\x02" + bytes(20))
    with pytest.raises(redis.ResponseError, match="profile of layout 2"):
        store.register_script(profile.STORE_IF_NEWER.source)(
            keys=[key], args=[profile.pack_profile(about("later", 0))]
        )
    store.delete(key)
    for value in (b"\x02" + bytes(20), b"", profile.pack_profile(about("u", 0))[:15] + b"[]"):
        with pytest.raises(SidstreamError, match="replay the topic users"):
            profile.unpack_profile(value)


def test_the_newest_profile_stands_in_redis_and_a_replay_changes_nothing(
    fresh_stack: Callable[[], tuple[KafkaSettings, str]], tmp_path: Path
) -> None:
    kafka, url = fresh_stack()
    write_codebook(tmp_path / "codebook")
    events = [
        about("u", 5, "new", country="Peru"), about("u", 3, "old", country="Mars"),
        about("käufer 7", 1, country="Japan"), about("gone", 1, country="France"),
    ]  # fmt: skip
    publish_all(kafka, events)
    producer = KafkaProducer(**client_options(kafka))
    producer.send("users", key=b"gone", value=None)
    producer.send("users", key=b"u", value=b'{"schema_version": 1, "attributes": {"country": 3}}')
    # In a partition that is not its user's: sent again to the right one.
    astray = about("astray", 1, country="Peru")
    right = producer.partitions_for("users")
    for partition in sorted(right):
        producer.send("users", key=astray.key, value=encode(astray), partition=partition)
    producer.flush()
    producer.close()

    with redis.Redis.from_url(url) as store:
        names = {b"u:{u}", "u:{käufer 7}".encode(), b"u:{astray}"}
        with worker(kafka, url, tmp_path / "codebook", tmp_path / "log"):
            wait_until(lambda: set(store.keys("u:*")) == names, WAIT_S, "profiles")
            wait_until(lambda: sum(end_offsets(kafka, "dead-letters").values()) == 1, WAIT_S, "a dead letter")
            wait_until(
                lambda: profile.unpack_profile(store.get("u:{u}")) == {"country": "Peru"},
                WAIT_S,
                "the newest",
            )
            before = {name: store.get(name) for name in names}
            publish_all(kafka, [events[1], events[0], events[2], events[1]])
            publish_all(kafka, [about("last", 1)])
            wait_until(lambda: store.get("u:{last}") is not None, WAIT_S, "what was sent last")
            wait_until(
                lambda: consumer_group_lag(kafka, "sidstream-agents-users") == 0,
                WAIT_S,
                "the end of the topic",
            )
            assert {name: store.get(name) for name in names} == before
            # As long as a history: there is no expiry.
            assert store.ttl("u:{u}") == -1


def test_serving_reads_a_users_history_and_profile_together(store, redis_url: str) -> None:
    packed = profile.pack_profile(about("both", 1, country="Peru"))
    store.mset({keys.history("both"): b"h", keys.profile("both"): packed, keys.profile("new"): packed})

    async def read() -> list[StoredUser] | None:
        histories = HistoryReader(RedisSettings.model_validate({"url": redis_url}), 5.0, 5.0)
        try:
            return await histories.read(["nobody", "both", "new"])
        finally:
            await histories.close()

    assert asyncio.run(read()) == [StoredUser(None, None), StoredUser(b"h", packed), StoredUser(None, packed)]
