"""Triggers in, recommendations out, on real Kafka and Redis."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import threading
import time
from collections.abc import Callable

import pytest
import redis

from harness.servers import free_port, local_redis, wait_until
from registry.bundles.rewards import Rewards
from registry.experiment.health import Health, read_health
from serving.agent import ServingAgent
from serving.settings import ServingSettings
from streams.errors import SidstreamError
from streams.events import (
    Arm,
    CatalogItem,
    Click,
    DeadLetter,
    Exploration,
    Recommendation,
    Rollout,
    SidAssignment,
    Trigger,
    UserProfile,
    decode,
)
from streams.settings import HistorySettings, KafkaSettings, RedisSettings
from streams.state import history, keys, profile
from streams.wire.admin import admin_client, end_offsets
from streams.wire.client import Client
from streams.wire.topic_reader import read_records
from tests.serving_support import PATIENCE_S, BundlesByVersion, running
from tests.tiny_bundle import tiny_codebook, write_tiny_bundle

pytestmark = pytest.mark.integration

SIZES = (4, 4, 4)
SIDS = list(itertools.product(range(4), repeat=3))


def item(row: int) -> str:
    return f"i{row:02d}"


def catalogue(rows, codebook=None) -> list:
    book = (codebook or tiny_codebook(SIZES)).id
    return [CatalogItem.new(item_id=item(row), title=f"Item {row}") for row in rows] + [
        SidAssignment.new(item_id=item(row), sid=list(SIDS[row]), codebook=book) for row in rows
    ]


def rollout(**arms) -> Rollout:
    listed_arms = [
        Arm(name=name.replace("_", "-"), bundle=bundle.id, weight=1 / len(arms), version=version)
        for name, (version, bundle) in arms.items()
    ]
    return Rollout.new(name="sidstream", action="start", trial="t1", arms=listed_arms)


def trigger(number: int | str, **fields) -> Trigger:
    return Trigger.new(**{"request_id": f"r{number}", "user_id": "u1", "item_id": item(0), **fields})


def dead_letters(kafka: KafkaSettings, count: int) -> list[DeadLetter]:
    wait_until(lambda: sum(end_offsets(kafka, "dead-letters").values()) >= count, PATIENCE_S, "dead letters")
    return [decode(DeadLetter, record.value) for record in read_records(kafka, "dead-letters")]


@pytest.fixture
def stack(fresh_stack: Callable, tmp_path):
    """Fresh Kafka and Redis, half of the catalogue listed, bundle `v1` in service."""
    kafka, redis_url = fresh_stack()
    popular = [item(7), item(3)]
    source = BundlesByVersion(v1=write_tiny_bundle(tmp_path / "v1", SIZES, 1, popular))
    with Client(kafka) as client:
        client.publish_all(catalogue(range(32)))
        client.publish(rollout(champion=("v1", source.bundles["v1"])))
        yield kafka, redis_url, source, client


def test_a_trigger_is_answered_from_history_and_trigger_with_bundle_and_arm_named(stack):
    kafka, redis_url, source, client = stack
    value, _, _ = history.apply_changes(
        None, [history.HistoryChange(None, 0, history.pack_entry(10**12, 1, "e", history.pack_sid(SIDS[5])))],
        codebook=tiny_codebook(SIZES).id, levels=3, incarnations={"clicks": 1, "purchases": 1},
        bounds=HistorySettings(),
    )  # fmt: skip
    with redis.Redis.from_url(redis_url) as connection:
        connection.set(keys.history("u1"), value)
    with running(kafka, redis_url, source) as agent:
        answer = client.ask(trigger(1, exclude=[item(9)], scene="home"), PATIENCE_S)
        stranger = client.ask(trigger(2, user_id="u2"), PATIENCE_S)
        unknown = client.ask(trigger(3, user_id="u3", item_id="unheard-of"), PATIENCE_S)
        assert json.loads(agent.get("/health/ready")) == {"status": "ready"}
        assert agent.metric('sidstream_fallback_total{reason="popular"}') == 1
        assert agent.metric('sidstream_request_seconds_count{stage="model"}') == 3
        info = f'bundle="{source.bundles["v1"].id}",trial="t1",version="v1"'
        assert agent.metric(f'sidstream_model_info{{arm="champion",{info}}}') == 1
        assert agent.metric('sidstream_invalid_mass_count{level="2"}') == 2
    assert (answer.fallback, stranger.fallback, unknown.fallback) == (None, "trigger_only", "popular")
    assert len({ranked.item_id for ranked in answer.items}) == 10
    assert not {item(0), item(9)} & {ranked.item_id for ranked in answer.items}
    assert (answer.bundle, answer.arm, answer.trial) == (source.bundles["v1"].id, "champion", "t1")
    assert (answer.scene, answer.trigger_item_id, answer.user_id) == ("home", item(0), "u1")
    assert [ranked.item_id for ranked in unknown.items][:2] == [item(7), item(3)]


def test_scene_profile_and_preferences_reach_the_model_of_an_answer(stack, tmp_path):
    kafka, redis_url, source, client = stack
    fields = {"scene": ["home"], "profile.country": ["peru"], "reward.commission": ["0", "1"]}
    source.bundles["v2"] = write_tiny_bundle(
        tmp_path / "v2", SIZES, 2, fields=fields,
        rewards=Rewards({"commission": {"": [0.5]}}, {"commission": {"0": 0.4, "1": 0.6}}),
    )  # fmt: skip
    client.publish(rollout(champion=("v2", source.bundles["v2"])))
    with redis.Redis.from_url(redis_url) as connection:
        connection.set(
            keys.profile("u4"),
            profile.pack_profile(UserProfile.new(user_id="u4", attributes={"country": "peru"})),
        )
    number = itertools.count(100)

    def ask_with(user="u1", **fields) -> Recommendation:
        return client.ask(trigger(next(number), user_id=user, k=32, **fields), PATIENCE_S)

    def order(answer: Recommendation) -> list[str]:
        return [ranked.item_id for ranked in answer.items]

    with running(kafka, redis_url, source) as agent:
        agent.wait_ready()
        plain, repeated, home = ask_with(), ask_with(), ask_with(scene="home")
        preferred, profiled = ask_with(preferences={"commission": 2.0}), ask_with("u4")
        unheard = ask_with(scene="attic", preferences={"price": 1})
    assert order(plain) == order(repeated) == order(unheard)
    assert (plain.conditions, preferred.conditions, unheard.conditions) == (None, {"commission": 1}, None)
    orders = [order(answer) for answer in (plain, home, preferred, profiled)]
    assert all(set(each) == set(orders[0]) for each in orders)
    assert len(set(map(tuple, orders))) == 4


def test_an_item_listed_later_is_recommended_and_one_withdrawn_is_not_without_a_restart(stack):
    kafka, redis_url, source, client = stack
    number = itertools.count()

    def answered() -> set[str]:
        return {ranked.item_id for ranked in client.ask(trigger(next(number), k=100), PATIENCE_S).items}

    with running(kafka, redis_url, source) as agent:
        agent.wait_ready()
        before = answered()
        client.publish_all(catalogue([40]))
        wait_until(lambda: item(40) in answered(), PATIENCE_S, "the new item")
        client.publish(CatalogItem.new(item_id=item(5), title="Item 5", active=False))
        wait_until(lambda: item(5) not in answered(), PATIENCE_S, "the end of the withdrawn item")
    assert before == {item(row) for row in range(1, 32)}


def test_a_new_rollout_swaps_the_bundle_under_steady_requests_without_an_error(stack, tmp_path):
    kafka, redis_url, source, client = stack
    source.bundles["v2"] = write_tiny_bundle(tmp_path / "v2", SIZES, 2)
    old, new = source.bundles["v1"].id, source.bundles["v2"].id
    bundles_of_answers: list[str | None] = []
    failures: list[BaseException] = []
    enough = threading.Event()

    def ask_on() -> None:
        for number in itertools.count():
            if enough.is_set():
                return
            try:
                answer = client.ask(trigger(number), PATIENCE_S)
                assert len(answer.items) == 10
                assert answer.fallback == "trigger_only"
                bundles_of_answers.append(answer.bundle)
            except BaseException as error:
                failures.append(error)
                return

    with running(kafka, redis_url, source) as agent:
        agent.wait_ready()
        asking = threading.Thread(target=ask_on)
        asking.start()
        try:
            wait_until(lambda: bundles_of_answers or failures, PATIENCE_S, "an answer of the old bundle")
            client.publish(
                rollout(champion=("missing", source.bundles["v1"]), anchor=("v2", source.bundles["v2"]))
            )
            client.publish(rollout(champion=("v2", source.bundles["v2"])))
            wait_until(
                lambda: bundles_of_answers.count(new) > 5 or failures, PATIENCE_S, "answers of the new bundle"
            )
        finally:
            enough.set()
            asking.join(PATIENCE_S)
    assert failures == []
    swap = bundles_of_answers.index(new)
    assert (set(bundles_of_answers[:swap]), set(bundles_of_answers[swap:])) == ({old}, {new})


def test_a_bad_trigger_becomes_a_dead_letter_as_it_came_and_the_next_is_answered(stack):
    kafka, redis_url, source, client = stack
    bad = [
        (b"{not json", "malformed_json"),
        (b'{"schema_version": 9}', "unknown_schema_version"),
        (b"\xff\xfe", "not_utf8"),
        (b"", "empty"),
    ]
    with running(kafka, redis_url, source) as agent:
        agent.wait_ready()
        for value, _ in bad:
            client.publish_raw("triggers", b"u1", value)
        assert len(client.ask(trigger("after"), PATIENCE_S).items) == 10
        letters = dead_letters(kafka, len(bad))
    triggers = {(record.partition, record.offset): record.value for record in read_records(kafka, "triggers")}
    assert {letter.reason for letter in letters} == {reason for _, reason in bad}
    for letter in letters:
        assert base64.b64decode(letter.value_base64 or "") == triggers[letter.partition, letter.offset]
        assert (letter.source, letter.stage) == ("triggers", "serving")
        assert base64.b64decode(letter.key_base64) == b"u1"


def test_an_answer_goes_to_reply_to_as_well_and_a_wrong_name_costs_nobody_an_answer(stack):
    kafka, redis_url, source, client = stack
    topic = f"replies-{time.time_ns()}"
    with admin_client(kafka) as connection:
        connection.create_topics({topic: {"num_partitions": 1, "replication_factor": 1}})
    with running(kafka, redis_url, source) as agent:
        agent.wait_ready()
        answers = [
            client.ask(trigger(number, reply_to=name), PATIENCE_S)
            for number, name in enumerate([topic, "no-such-topic", "purchases", "recommendations"])
        ]
        letters = dead_letters(kafka, 2)
    assert [len(answer.items) for answer in answers] == [10] * 4
    assert [json.loads(record.value)["request_id"] for record in read_records(kafka, topic)] == ["r0"]
    assert {letter.reason for letter in letters} == {"reply_topic"}
    assert any("no-such-topic" in letter.detail for letter in letters)
    assert len(letters) == 2
    assert sum(end_offsets(kafka, "purchases").values()) == 0
    assert sum(end_offsets(kafka, "recommendations").values()) == 4


def test_without_redis_requests_are_answered_without_histories_and_with_them_when_it_is_back(stack, tmp_path):
    kafka, _, source, client = stack
    port = free_port()
    with running(kafka, f"redis://127.0.0.1:{port}/0", source, redis_wait_s=0.2, redis_timeout_s=5) as agent:
        agent.wait_ready()
        alone = client.ask(trigger(1), PATIENCE_S)
        assert agent.metric('sidstream_degraded_total{cause="redis"}') == 1
        (tmp_path / "redis").mkdir()
        with local_redis(tmp_path / "redis", port) as url:
            with redis.Redis.from_url(url) as connection:
                value, _, _ = history.apply_changes(
                    None,
                    [
                        history.HistoryChange(
                            None, 0, history.pack_entry(10**12, 1, "e", history.pack_sid(SIDS[5]))
                        )
                    ],
                    codebook=tiny_codebook(SIZES).id, levels=3,
                    incarnations={"clicks": 1, "purchases": 1}, bounds=HistorySettings(),
                )  # fmt: skip
                connection.set(keys.history("u1"), value)
            repeated = client.ask(trigger(2), PATIENCE_S)
    assert (alone.fallback, repeated.fallback) == ("trigger_only", None)


def test_an_agent_without_any_rollout_answers_and_names_no_bundle(fresh_stack):
    kafka, redis_url = fresh_stack()
    with Client(kafka) as client, running(kafka, redis_url, BundlesByVersion()) as agent:
        empty = client.ask(trigger(1), PATIENCE_S)
        client.publish_all(catalogue(range(4)))
        number = itertools.count(2)
        wait_until(
            lambda: client.ask(trigger(next(number)), PATIENCE_S).items, PATIENCE_S, "items without a bundle"
        )
        answer = client.ask(trigger("last"), PATIENCE_S)
        assert agent.agent.waiting_for is None
    assert (empty.fallback, empty.items) == ("no_catalog", [])
    assert (answer.fallback, answer.bundle, answer.arm) == ("popular", None, None)
    assert [ranked.item_id for ranked in answer.items] == [item(1), item(2), item(3)]


def test_triggers_sent_while_no_agent_ran_are_answered_when_one_comes(stack):
    kafka, redis_url, source, client = stack
    waiting = [client.submit(trigger(number, user_id=f"u{number}"), 2 * PATIENCE_S) for number in range(40)]
    client.publish(Click.new(user_id="u1", item_id=item(1)))  # another topic is none of the agent's business
    with running(kafka, redis_url, source, max_batch=8) as agent:
        answers = [future.result(PATIENCE_S) for future in waiting]
        assert agent.metric("sidstream_batch_requests_sum") == 40
    assert [answer.user_id for answer in answers] == [f"u{number}" for number in range(40)]


def health(redis_url: str, trial: str = "t1") -> dict[str, Health]:
    """What is kept of the models of a trial's arms; empty where Redis is away."""
    try:
        with redis.Redis.from_url(redis_url) as connection:
            return read_health(connection, trial)
    except redis.ConnectionError:
        return {}


def test_an_explored_answer_comes_with_the_draw_that_its_first_item_is_from(stack):
    kafka, redis_url, source, client = stack
    with running(kafka, redis_url, source, explore=0.5, explore_candidates=5) as agent:
        agent.wait_ready()
        triggers = [trigger(number, user_id=f"u{number}") for number in range(40)]
        answers = {
            answer.request_id: answer for answer in (client.ask(each, PATIENCE_S) for each in triggers)
        }
        unknown = client.ask(trigger("unknown", item_id=None), PATIENCE_S)
    events = {
        event.request_id: event
        for event in (decode(Exploration, r.value) for r in read_records(kafka, "explorations"))
    }
    assert unknown.fallback == "popular"
    assert 5 < len(events) < 35
    for name, event in events.items():
        answer = answers[name]
        assert (event.bundle, event.arm, event.trial) == (answer.bundle, answer.arm, answer.trial)
        assert (event.user_id, event.ts) == (answer.user_id, answer.ts)
        assert answer.items[0].item_id == event.item_id
        assert (answer.items[0].sid, answer.items[0].score) == (
            event.candidates[event.chosen], event.scores[event.chosen],
        )  # fmt: skip
        rest = [ranked.sid for place, ranked in enumerate(answer.items) if place > 0]
        assert rest[:4] == [sid for sid in event.candidates if sid != answer.items[0].sid]
    for name in answers.keys() - events.keys():
        scores = [ranked.score for ranked in answers[name].items]
        assert scores == sorted(scores, reverse=True)


def test_a_draw_that_topics_are_too_small_for_costs_nobody_an_answer(stack):
    kafka, redis_url, source, client = stack
    small = kafka.model_copy(update={"max_event_bytes": 1024})
    with running(small, redis_url, source, explore=1, explore_candidates=50) as agent:
        agent.wait_ready()
        assert len(client.ask(trigger(1), PATIENCE_S).items) == 10
        assert len(client.ask(trigger(2, exclude=[item(row) for row in range(4, 32)]), PATIENCE_S).items) == 3
    assert [
        decode(Exploration, record.value).request_id for record in read_records(kafka, "explorations")
    ] == ["r2"]


def test_exploring_without_the_topic_for_it_is_refused_at_the_start(stack):
    kafka, redis_url, source, _ = stack
    with admin_client(kafka) as connection:
        connection.delete_topics(["explorations"])

    async def start() -> None:
        redis_settings = RedisSettings.model_validate({"url": redis_url})
        agent = ServingAgent(kafka, redis_settings, ServingSettings(explore=0.1), source, "sidstream")
        try:
            await agent.start()
        finally:
            await agent.stop()

    with pytest.raises(SidstreamError, match="explorations does not exist"):
        asyncio.run(start())


def test_what_every_arms_model_did_is_in_redis_when_the_agent_has_stopped(stack, tmp_path):
    kafka, redis_url, source, client = stack
    source.bundles["v2"] = write_tiny_bundle(tmp_path / "v2", SIZES, 2)
    client.publish(
        rollout(champion=("v1", source.bundles["v1"]), challenger_sft=("v2", source.bundles["v2"]))
    )
    with running(kafka, redis_url, source) as agent:
        agent.wait_ready()
        answers = [client.ask(trigger(number, user_id=f"u{number}"), PATIENCE_S) for number in range(30)]
        client.ask(trigger("unknown", user_id="u0", item_id=None), PATIENCE_S)
    health_by_arm = health(redis_url)
    assert set(health_by_arm) == {"champion", "challenger-sft"}
    for arm, health_of_arm in health_by_arm.items():
        count = sum(answer.arm == arm for answer in answers)
        assert (health_of_arm.requests, health_of_arm.failed, sum(health_of_arm.times.values())) == (
            count,
            0,
            count,
        )
        assert 0 < health_of_arm.invalid <= count
    with redis.Redis.from_url(redis_url) as connection:
        assert 29 * 86_400 < connection.ttl(keys.health("t1")) <= 30 * 86_400


def test_what_models_did_while_redis_was_away_is_written_when_it_is_back(stack, tmp_path, caplog):
    kafka, _, source, client = stack
    port = free_port()
    with running(kafka, f"redis://127.0.0.1:{port}/0", source, redis_wait_s=0) as agent:
        agent.wait_ready()
        for number in range(3):
            client.ask(trigger(number), PATIENCE_S)
        wait_until(lambda: "kept until Redis takes it" in caplog.text, PATIENCE_S, "a write that fails")
        (tmp_path / "redis").mkdir()
        with local_redis(tmp_path / "redis", port) as url:
            wait_until(lambda: health(url), PATIENCE_S, "the health of models")
            assert health(url)["champion"].requests == 3
            client.ask(trigger("later"), PATIENCE_S)
            wait_until(lambda: health(url)["champion"].requests == 4, PATIENCE_S, "the last answer's")


def test_an_arm_without_users_answers_nobody_and_its_model_is_watched(stack, tmp_path):
    kafka, redis_url, source, client = stack
    source.bundles["v2"] = write_tiny_bundle(tmp_path / "v2", SIZES, 2)
    arms = [
        Arm(name="champion", bundle=source.bundles["v1"].id, weight=1, version="v1"),
        Arm(name="challenger-sft", bundle=source.bundles["v2"].id, weight=0, version="v2"),
    ]
    client.publish(Rollout.new(name="sidstream", action="trial", trial="t2", salt="t", step=0.0, arms=arms))
    with running(kafka, redis_url, source, shadow=1.0) as agent:
        agent.wait_ready()
        for number in range(10):
            client.ask(trigger(number, user_id=f"u{number}"), PATIENCE_S)
    health_by_arm = health(redis_url, "t2")
    recommendations = [
        decode(Recommendation, record.value) for record in read_records(kafka, "recommendations")
    ]
    assert [(answer.arm, answer.bundle) for answer in recommendations] == [
        ("champion", source.bundles["v1"].id)
    ] * 10
    assert health_by_arm["champion"].requests == 10
    shadow = health_by_arm["challenger-sft"]
    assert 1 <= shadow.requests == sum(shadow.times.values()) <= 10
