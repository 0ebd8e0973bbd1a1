"""The sums that agents keep equal a recomputation of the topics, whatever happened on the way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import redis

from harness.agents_worker import start_worker, worker, write_codebook
from harness.servers import wait_until
from registry.experiment.outcomes import mature_until, read_outcomes
from registry.releases.rollout import assign
from streams.events import (
    Arm,
    CatalogItem,
    Click,
    Event,
    Impression,
    Purchase,
    RankedItem,
    Recommendation,
    decode,
)
from streams.settings import KafkaSettings
from streams.state import keys
from streams.wire.admin import consumer_group_lag
from streams.wire.bulk_writer import publish_all
from streams.wire.topic_reader import read_records
from tests.conftest import FreshStack
from tests.reference_outcomes import Owner, reference

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

WAIT_S = 120.0
T0 = 1_700_000_000_000
MINUTE = 60_000
WINDOW_S, LATENESS_S, COHORT_S = 600, 60, 120
ITEMS = [f"i{n}" for n in range(12)]
USERS = [f"u{n}" for n in range(24)]
KINDS: tuple[type[Event], ...] = (Recommendation, Impression, Click, Purchase)
ARMS = [Arm(name, f"bundle-{name}", 1 / 3, name) for name in ("champion", "challenger-sft", "challenger-dpo")]


def shoppers(rng: random.Random) -> list[Event]:
    """Three hours of answers and of what followed: some never seen, some bought too late to count."""
    log: list[Event] = []
    for n in range(500):
        user, request, at = rng.choice(USERS), f"r{n}", T0 + rng.randrange(0, 180 * MINUTE)
        trial = "t1" if at < T0 + 90 * MINUTE else "t2"
        arm = assign(trial, user, ARMS)
        offered = rng.sample(ITEMS, 5)
        log.append(
            Recommendation.new(
                request_id=request, user_id=user, ts=at,
                items=[RankedItem(item, [1, 2, 3], -1.0) for item in offered],
                **({"bundle": arm.bundle, "arm": arm.name, "trial": trial} if n % 20 else {}),
            )
        )  # fmt: skip
        first_look = at + rng.randrange(0, 5 * MINUTE)
        items = rng.sample(offered, 3) + rng.sample(ITEMS, 1)
        for _ in range(rng.randrange(4)):
            if rng.random() < 0.4:
                items = rng.sample(offered, 3) + rng.sample(ITEMS, 1)
            looked_at = first_look + rng.randrange(0, MINUTE)
            log.append(Impression.new(user_id=user, item_ids=items, ts=looked_at, request_id=request))
            for item in items[: rng.randrange(4)]:
                clicked = looked_at + rng.randrange(0, 11 * MINUTE)
                log.append(Click.new(user_id=user, item_id=item, ts=clicked, request_id=request))
                if rng.random() < 0.6:
                    bought = clicked + rng.randrange(0, 8 * MINUTE)
                    log.append(
                        Purchase.new(user_id=user, item_id=item, ts=bought, request_id=request, price=1.0)
                    )
    return log


def arrivals(log: Sequence[Event], rng: random.Random) -> list[Event]:
    """In disorder within the lateness, and many once more: at once, or hours later."""
    due = [(event.ts + rng.randrange(0, LATENESS_S * 1000), n, event) for n, event in enumerate(log)]
    due += [
        (at + rng.choice((0, 5 * MINUTE, 150 * MINUTE)), n + len(log), event)
        for at, n, event in rng.sample(due, len(due) // 4)
    ]
    return [event for *_, event in sorted(due, key=lambda row: row[:2])]


def late_events(at: int) -> list[Event]:
    """Events outside of any trial on every topic and partition, so that event time reaches `at`."""
    events: list[Event] = []
    for n in range(32):
        user = f"w{n}"
        events += [
            Click.new(user_id=user, item_id="i0", ts=at),
            Purchase.new(user_id=user, item_id="i0", ts=at, price=1.0),
            Impression.new(user_id=user, item_ids=["i0"], ts=at),
            Recommendation.new(request_id=f"w{n}", user_id=user, ts=at, items=[]),
        ]
    return events


def user_events_on_topics(kafka: KafkaSettings) -> list[Event]:
    """Every user event on the topics, a partition of a topic after the other."""
    kinds = {kind.topic: kind for kind in KINDS}
    return [decode(kinds[record.topic], record.value) for record in read_records(kafka, *kinds)]


def stored_sums(store: redis.Redis) -> dict[Owner, dict[int, list[int]]]:
    """The sums in Redis, in the reference's form, which has no money."""
    sums: dict[Owner, dict[int, list[int]]] = {}
    for trial in ("t1", "t2"):
        for key in store.scan_iter(match=keys.sums_pattern(trial)):
            row = {name.decode(): value.decode() for name, value in store.hgetall(key).items()}
            user = key.decode().split("{")[1].rstrip("}")
            cohorts = sums.setdefault((trial, user, row.pop("arm"), row.pop("bundle")), {})
            for field, number in row.items():
                cohort, _, kind = field.partition(":")
                if kind in "ico":
                    cohorts.setdefault(int(cohort), [0, 0, 0])["ico".index(kind)] = int(number)
    return sums


def test_sums_by_cohort_equal_a_recomputation_of_the_topics_after_kills_disorder_and_repeats(
    fresh_stack: FreshStack, tmp_path: Path
) -> None:
    kafka, url = fresh_stack()
    codebook, log = tmp_path / "codebook", tmp_path / "log"
    write_codebook(codebook)
    publish_all(kafka, [CatalogItem.new(item_id=i, title=f"thing {i}", ts=T0) for i in ITEMS])
    rng = random.Random(11)
    arriving_events = arrivals(shoppers(rng), rng)
    # One part before the kill, one before the stop, one after it: neither comes when all is done.
    third = len(arriving_events) // 3
    options = {
        "attribution_window_s": WINDOW_S, "allowed_lateness_s": LATENESS_S, "cohort_s": COHORT_S,
        "session_timeout_s": 6, "batch_size": 5, "group": "restarted",
    }  # fmt: skip
    publish_all(kafka, arriving_events[:third])
    with redis.Redis.from_url(url) as store:
        killed = start_worker(kafka, url, codebook, log, **options)
        try:
            wait_until(lambda: stored_sums(store), WAIT_S, "first sums")
            assert killed.poll() is None, log.read_text()[-3000:]
        finally:
            killed.kill()
            killed.wait()
        assert consumer_group_lag(kafka, "restarted") > 0, (
            "all was done before the kill: the test did not bite"
        )
        sums_at_kill = stored_sums(store)
        publish_all(kafka, arriving_events[third : 2 * third])
        with worker(kafka, url, codebook, log, **options):
            wait_until(lambda: stored_sums(store) != sums_at_kill, WAIT_S, "more sums")
        sums_after_stop = stored_sums(store)
        publish_all(kafka, arriving_events[2 * third :])
        end = max(event.ts for event in arriving_events) + (3 * WINDOW_S + LATENESS_S + COHORT_S) * 1000
        publish_all(kafka, late_events(end))
        expected = reference(user_events_on_topics(kafka), WINDOW_S * 1000, COHORT_S * 1000)
        assert sums_after_stop != expected
        with worker(kafka, url, codebook, log, **options):
            last = max(cohort for cohorts in expected.values() for cohort in cohorts)
            wait_until(lambda: (mature_until(store) or 0) > last, WAIT_S, "the end of the last cohort")
        assert stored_sums(store) == expected
        assert not list(store.scan_iter(match=keys.outcomes("*"))), "requests are still open"
        for trial in ("t1", "t2"):
            outcomes = read_outcomes(store, trial)
            for arm in ARMS:
                users = [c for (t, _, name, _), c in expected.items() if (t, name) == (trial, arm.name)]
                rows = sorted([sum(n) for n in zip(*cohorts.values(), strict=True)] for cohorts in users)
                assert sorted(outcomes[arm.name].total().tolist()) == [row for row in rows if row[0]]
    assert len(expected) > 40
