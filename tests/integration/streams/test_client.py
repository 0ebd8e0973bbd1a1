"""The client against a real broker: a confirmed record is there, and every request ends."""

from __future__ import annotations

import threading
import uuid
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from streams.errors import SidstreamError
from streams.events import Click, Purchase, Recommendation, Trigger, UserProfile, decode
from streams.settings import KafkaSettings
from streams.wire.admin import create_topics, end_offsets
from streams.wire.client import Client
from streams.wire.records import BATCH_OVERHEAD, kafka_record, partition_of
from streams.wire.replies import RecommendationReader
from tests.responder import Responder, read_new

pytestmark = pytest.mark.integration


@pytest.fixture
def topics(kafka: KafkaSettings) -> KafkaSettings:
    """A broker that has the topics."""
    create_topics(kafka)
    return kafka


@pytest.fixture
def client(topics: KafkaSettings) -> Iterator[Client]:
    with Client(topics) as opened_client:
        yield opened_client


def trigger(user_id: str = "u", **fields: object) -> Trigger:
    return Trigger.new(request_id=uuid.uuid4().hex, user_id=user_id, **fields)


def test_a_published_event_stands_where_the_client_says(topics: KafkaSettings, client: Client) -> None:
    before = end_offsets(topics, "purchases")
    event = Purchase.new(user_id="käufer-7", item_id="85123A", price=2.55)
    placed = client.publish(event)
    (record,) = read_new(topics, "purchases", 1, before)
    assert (record.topic, record.partition, record.offset) == placed
    assert record.partition == partition_of(event.key, len(before))
    assert decode(Purchase, record.value) == event


def test_many_events_arrive_once_each_in_order_within_a_user_and_are_counted(
    topics: KafkaSettings, client: Client
) -> None:
    before = end_offsets(topics, "clicks")
    sent = [Click.new(user_id=f"user-{n % 97}", item_id=str(n)) for n in range(20_000)]
    progress: list[int] = []
    assert client.publish_all(iter(sent), progress.append) == len(sent) == sum(progress)
    assert len(progress) > 1
    records = read_new(topics, "clicks", len(sent), before)
    assert len(records) == len(sent)
    by_user: dict[str, list[int]] = defaultdict(list)
    for record in sorted(records, key=lambda record: (record.partition, record.offset)):
        event = decode(Click, record.value)
        by_user[event.user_id].append(int(event.item_id))
        assert record.partition == partition_of(event.key, len(before))
    assert sorted(item for items in by_user.values() for item in items) == list(range(20_000))
    assert all(items == sorted(items) for items in by_user.values())


def test_an_event_above_the_limit_is_refused_and_nothing_is_sent(
    topics: KafkaSettings, client: Client
) -> None:
    before = end_offsets(topics, "users")
    huge = UserProfile.new(user_id="u", attributes={"about": "x" * topics.max_event_bytes})
    with pytest.raises(SidstreamError, match=r"UserProfile weighs 262,.* take 262,144"):
        client.publish(huge)
    with pytest.raises(SidstreamError, match="UserProfile weighs 262,"):
        client.publish_all([huge])
    assert end_offsets(topics, "users") == before


def test_the_largest_event_that_the_client_takes_the_broker_takes_too(
    topics: KafkaSettings, client: Client
) -> None:
    def event(length: int) -> UserProfile:
        return UserProfile.new(
            user_id="u", event_id="e", ts=1_767_225_600_000, attributes={"a": "x" * length}
        )

    empty_record = kafka_record(event(0), topics.max_event_bytes)
    length = topics.max_event_bytes - BATCH_OVERHEAD - len(empty_record.key) - len(empty_record.value)
    with pytest.raises(SidstreamError, match="weighs 262,145"):
        client.publish(event(length + 1))
    assert client.publish(event(length)).topic == "users"
    assert client.publish_all([event(length)]) == 1


def test_a_topic_that_is_not_there_is_named(client: Client) -> None:
    with pytest.raises(SidstreamError, match="topic nowhere does not exist"):
        client.publish_raw("nowhere", b"k", b"v")


def test_bytes_that_are_no_event_can_be_sent_on_purpose(topics: KafkaSettings, client: Client) -> None:
    before = end_offsets(topics, "clicks")
    client.publish_raw("clicks", b"k", b"\xff")
    (record,) = read_new(topics, "clicks", 1, before)
    assert (record.key, record.value) == (b"k", b"\xff")


def test_a_question_gets_its_own_answer(topics: KafkaSettings, client: Client) -> None:
    with Responder(topics):
        request = trigger("17850", item_id="85123A")
        answer = client.ask(request, timeout=30)
    assert (answer.request_id, answer.user_id, answer.trigger_item_id) == (
        request.request_id,
        "17850",
        "85123A",
    )


def test_a_question_nobody_answers_ends_in_time_and_says_what_to_check(client: Client) -> None:
    request = trigger()
    with pytest.raises(
        SidstreamError, match=f"no answer to request {request.request_id} within 0.2 s.*sidstream status"
    ):
        client.ask(request, timeout=0.2)
    with pytest.raises(SidstreamError, match="no answer to request"):
        client.submit(trigger(), timeout=0.2).result(30)


def test_many_questions_from_many_threads_are_under_way_at_once(
    topics: KafkaSettings, client: Client
) -> None:
    def shop(number: int) -> list[tuple[Trigger, Recommendation]]:
        futures = []
        for n in range(50):
            request = trigger(f"user-{number}-{n}")
            futures.append((request, client.submit(request, timeout=60)))
        return [(request, future.result(60)) for request, future in futures]

    with Responder(topics), ThreadPoolExecutor(8) as pool:
        pairs = [pair for answers in pool.map(shop, range(8)) for pair in answers]
    assert len({answer.request_id for _, answer in pairs}) == 400
    assert all((a.request_id, a.user_id) == (t.request_id, t.user_id) for t, a in pairs)


def test_when_reading_answers_dies_questions_under_way_are_told_why(topics: KafkaSettings) -> None:
    cut = threading.Event()

    class Cut:
        """A reader whose connection breaks when the test says."""

        def poll(self, timeout_ms: int) -> dict[object, list[object]]:
            if cut.wait(timeout_ms / 1000):
                raise ConnectionError("cut")
            return {}

        def close(self) -> None:
            """Nothing is held."""

    def reader() -> RecommendationReader:
        return Cut()

    with Client(topics, open_reader=reader) as client:
        futures = [client.submit(trigger(), timeout=600) for _ in range(3)]
        cut.set()
        for future in futures:
            with pytest.raises(
                SidstreamError, match=r"reading answers from Kafka ended .*ConnectionError: cut"
            ):
                future.result(30)


def test_closing_leaves_no_thread_and_questions_under_way_end(topics: KafkaSettings) -> None:
    before = set(threading.enumerate())
    client = Client(topics)
    waiting = client.submit(trigger(), timeout=600)
    client.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(SidstreamError, match="closed before the answer came"):
        waiting.result(1)


def test_a_client_without_a_broker_says_so() -> None:
    with pytest.raises(SidstreamError, match=r"Kafka at 127\.0\.0\.1:9 does not answer"):
        Client(KafkaSettings(bootstrap="127.0.0.1:9"))
