"""A second codebook comes into use while events and triggers go on: nothing is lost, also on the way back."""

from __future__ import annotations

import itertools
import random
import signal
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
import redis

from harness.agents_worker import start_worker, worker
from harness.pure_histories import replayed_histories
from harness.servers import wait_until
from registry.bundles.bundle import Bundle
from registry.bundles.codebook import Codebook
from registry.releases.rollout import arm_of
from streams.events import (
    Arm,
    CatalogItem,
    Click,
    Event,
    Purchase,
    Recommendation,
    Rollout,
    SidAssignment,
    Trigger,
)
from streams.settings import KafkaSettings
from streams.state import history, keys
from streams.wire.admin import end_offsets
from streams.wire.bulk_writer import publish_all
from streams.wire.client import Client
from tests.conftest import FreshStack
from tests.serving_support import PATIENCE_S, BundlesByVersion, running
from tests.tiny_bundle import tiny_codebook, write_tiny_bundle

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

T0 = 1_700_000_000_000
WAIT_S = 120.0
ITEMS = [f"i{n:02d}" for n in range(16)]
OLD_SIZES, NEW_SIZES = (4, 4, 4), (8, 8)
OLD, NEW = tiny_codebook(OLD_SIZES), tiny_codebook(NEW_SIZES, 1)
# Another length, other codes and another order of items under the new one.
SIDS = {
    OLD.id: dict(zip(ITEMS, itertools.product(range(4), repeat=3), strict=False)),
    NEW.id: dict(zip(reversed(ITEMS), itertools.product(range(8), repeat=2), strict=False)),
}


def assigned(codebook: Codebook, items: Iterable[str]) -> list[SidAssignment]:
    """What `codebook fit` publishes."""
    sids = SIDS[codebook.id]
    return [SidAssignment.new(item_id=i, sid=list(sids[i]), codebook=codebook.id) for i in items]


def random_events(
    rng: random.Random, users: int, count: int, name: str, items: list[str] = ITEMS
) -> list[Event]:
    """Clicks and purchases in any order of time."""
    events: list[Event] = []
    for n in range(count):
        fields = {
            "user_id": f"u{n % users}", "item_id": rng.choice(items), "ts": T0 + rng.randrange(10**8),
            "event_id": f"{name}-{n}",
        }  # fmt: skip
        events.append(Click.new(**fields) if rng.random() < 0.7 else Purchase.new(**fields, price=1.0))
    return events


def expected_histories(kafka: KafkaSettings, codebook: Codebook) -> dict[str, bytes]:
    """{user: history} of all events on the topics under one codebook, by the pure function."""
    packed = {item: history.pack_sid(sid) for item, sid in SIDS[codebook.id].items()}
    return replayed_histories(kafka, packed, codebook.id, len(codebook.sizes))


def stored(store: redis.Redis) -> dict[str, bytes]:
    names = list(store.scan_iter(match="h:*"))
    return {keys.user_of_history(name): value for name, value in zip(names, store.mget(names), strict=True)}


def tags(store: redis.Redis) -> list[str]:
    return [value[2:6].hex() for value in stored(store).values()]


def has_recoded_history(store: redis.Redis, codebook: Codebook, users: Iterable[int]) -> bool:
    """Whether one of these users has a history under a codebook: fast, as `tags` is not."""
    with store.pipeline(transaction=False) as pipeline:
        for user in users:
            pipeline.getrange(keys.history(f"u{user}"), 2, 5)
        return bytes.fromhex(codebook.id[:8]) in pipeline.execute()


def count_entries(store: redis.Redis) -> int:
    """The number of entries in all histories, waiting ones included."""
    histories = [history.decode_history(value) for value in stored(store).values()]
    return sum(len(decoded.entries) + len(decoded.waiting) for decoded in histories)


def all_recoded(store: redis.Redis, codebook: Codebook, users: int) -> bool:
    return tags(store) == [codebook.id[:8]] * users


def release(action: str, trial: str, **arms: tuple[str, Bundle]) -> Rollout:
    rollout_arms = [
        Arm(name=name.replace("_", "-"), bundle=bundle.id, weight=1 / len(arms), version=version)
        for name, (version, bundle) in arms.items()
    ]
    return Rollout.new(name="sidstream", action=action, trial=trial, arms=rollout_arms)


def ranking(answer: Recommendation) -> list[tuple[str, list[int], float]]:
    return [(ranked.item_id, ranked.sid, pytest.approx(ranked.score)) for ranked in answer.items]


def test_histories_move_to_a_new_codebook_while_bundles_of_both_answer_and_a_rollback_finds_its_own(
    fresh_stack: FreshStack, tmp_path: Path
) -> None:
    kafka, url = fresh_stack()
    rng = random.Random(4)
    users, late = 30, ITEMS[14:]
    first, second = random_events(rng, users, 300, "a"), random_events(rng, users // 2, 60, "b", ITEMS[:14])
    bundles = BundlesByVersion(
        v1=write_tiny_bundle(tmp_path / "v1", OLD_SIZES, 1),
        v2=write_tiny_bundle(tmp_path / "v2", NEW_SIZES, 2, codebook_seed=1),
    )
    v1, v2 = ("v1", bundles.bundles["v1"]), ("v2", bundles.bundles["v2"])
    requests = itertools.count()
    OLD.save(tmp_path / "codebook")
    publish_all(kafka, [CatalogItem.new(item_id=i, title=i) for i in ITEMS])
    publish_all(kafka, assigned(OLD, ITEMS))
    publish_all(kafka, first)
    with (
        redis.Redis.from_url(url) as store,
        Client(kafka) as client,
        worker(kafka, url, tmp_path / "codebook", tmp_path / "log"),
    ):

        def ask(user: str) -> Recommendation:
            trigger = Trigger.new(request_id=f"r{next(requests)}", user_id=user, item_id=ITEMS[0], k=5)
            return client.ask(trigger, PATIENCE_S)

        client.publish(release("start", "t1", champion=v1))
        wait_until(lambda: stored(store) == expected_histories(kafka, OLD), WAIT_S, "the old histories")
        with running(kafka, url, bundles) as agent:
            agent.wait_ready()
            before = {user: ranking(ask(user)) for user in ("u0", "u29")}

            # The new codebook comes, at first without the SIDs of two items; then more events.
            publish_all(kafka, assigned(NEW, ITEMS[:14]))
            wait_until(lambda: all_recoded(store, NEW, users), WAIT_S, "histories under the new codebook")
            waiting = [history.decode_history(value).waiting for value in stored(store).values()]
            expected = [event for event in first if event.item_id in late]  # type: ignore[attr-defined]
            assert sum(map(len, waiting)) == len(expected) > 0
            assert {e.sid for entries in waiting for _, e in entries} == {SIDS[OLD.id][item] for item in late}
            # The champion knows its users as well as before: what waits is told as well.
            assert {user: ranking(ask(user)) for user in before} == before

            publish_all(kafka, second)
            count = len(first) + len(second)
            wait_until(lambda: count_entries(store) == count, WAIT_S, "the events of both times")
            # Champion and challenger of two codebooks answer from the same histories.
            trial = release("trial", "t2", champion=v1, challenger_sft=v2)
            client.publish(trial)
            wait_until(lambda: ask("u1").trial == "t2", PATIENCE_S, "the trial")
            answered = defaultdict(list)
            for user in (f"u{n}" for n in range(12)):
                answer = ask(user)
                assert (answer.arm, answer.fallback) == (arm_of(trial, user).name, None)
                codebook = {v1[1].id: OLD.id, v2[1].id: NEW.id}[str(answer.bundle)]
                assert [tuple(one.sid) for one in answer.items] == [
                    SIDS[codebook][one.item_id] for one in answer.items
                ]
                answered[codebook].append(user)
            assert set(answered) == {OLD.id, NEW.id}

            # The two items get their SIDs: every entry stands in its place, as if it had always done.
            publish_all(kafka, assigned(NEW, late))
            wait_until(lambda: stored(store) == expected_histories(kafka, NEW), WAIT_S, "the new histories")

            # Back: the old bundle answers from histories under the new codebook as from its own.
            client.publish(release("rollback", "t3", champion=v1))
            wait_until(lambda: ask("u1").trial == "t3", PATIENCE_S, "the rollback")
            for user in ("u0", "u29"):
                store.set(keys.history(f"twin-{user}"), expected_histories(kafka, OLD)[user])
                back, twin = ask(user), ask(f"twin-{user}")
                assert (back.bundle, back.fallback) == (v1[1].id, None)
                assert ranking(back) == ranking(twin)
            assert ranking(ask("u29")) == before["u29"], "no event came for this user"
    assert sum(end_offsets(kafka, "dead-letters").values()) == 0


def test_a_worker_killed_while_it_brings_histories_over_loses_and_doubles_nothing(
    fresh_stack: FreshStack, tmp_path: Path
) -> None:
    kafka, url = fresh_stack()
    rng = random.Random(5)
    users = 3000  # some looks of the scan
    OLD.save(tmp_path / "codebook")
    publish_all(kafka, [CatalogItem.new(item_id=i, title=i) for i in ITEMS])
    publish_all(kafka, assigned(OLD, ITEMS))
    publish_all(kafka, random_events(rng, users, users, "a"))
    process = start_worker(kafka, url, tmp_path / "codebook", tmp_path / "log")
    with redis.Redis.from_url(url) as store:
        try:
            wait_until(lambda: count_entries(store) == users, WAIT_S, "the old histories")
            publish_all(kafka, assigned(NEW, ITEMS))
            sampled_users = range(0, users, 40)
            wait_until(
                lambda: has_recoded_history(store, NEW, sampled_users),
                WAIT_S,
                "the first of the new ones",
                pause=0,
            )
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = tags(store).count(NEW.id[:8])
        assert 0 < done < users, "killed in the middle"
        # Events for some of those that the dead worker left behind.
        publish_all(kafka, random_events(rng, users, users // 2, "b"))
        with worker(kafka, url, tmp_path / "codebook", tmp_path / "log"):
            wait_until(lambda: count_entries(store) == users + users // 2, WAIT_S, "all events")
            wait_until(lambda: all_recoded(store, NEW, users), WAIT_S, "histories under the new codebook")
            assert stored(store) == expected_histories(kafka, NEW)
    assert sum(end_offsets(kafka, "dead-letters").values()) == 0
