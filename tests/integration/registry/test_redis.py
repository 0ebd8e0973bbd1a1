"""The sums of a trial and the promoter's lease on a real Redis."""

import asyncio
import threading

import numpy as np
import pytest
import redis

from agents.attribution.outcome_stage import store_rules
from agents.attribution.outcomes import OutcomeRules
from harness.servers import wait_until
from registry.experiment.outcomes import mature_until, read_all_outcomes, read_outcomes
from registry.experiment.statistics import arm_sums
from registry.releases.lease import lease_key, promotion_lease
from streams.errors import SidstreamError
from streams.settings import RedisSettings
from streams.state import keys, redisdb

pytestmark = pytest.mark.integration


WINDOW, LATENESS, COHORT, PARTITIONS = 1800_000, 60_000, 3_600_000, 4
RULES = {"window_ms": WINDOW, "lateness_ms": LATENESS, "cohort_ms": COHORT, "partitions": PARTITIONS}


@pytest.fixture
def store(redis_url):
    """An empty Redis, as agents leave it that have taken every partition and seen nothing."""
    with redis.Redis.from_url(redis_url) as connection:
        connection.flushall()
        connection.hset(keys.outcomes_rules(), mapping=RULES)
        for partition in range(PARTITIONS):
            connection.hset(keys.clock(partition), "incarnations", "1 2 3")
        yield connection


def reach(store, watermark, partition=0):
    store.hset(keys.clock(partition), "outcomes", watermark)


def test_a_cohort_is_mature_once_its_windows_are_closed_and_lateness_is_over(store):
    assert mature_until(store) is None
    end_of_7 = 8 * COHORT + WINDOW + LATENESS
    for partition in range(PARTITIONS):
        reach(store, end_of_7 + 10 * COHORT, partition)
    reach(store, end_of_7, 2)
    assert mature_until(store) == 8
    reach(store, end_of_7 - 1, 2)
    assert mature_until(store) == 7
    reach(store, 5, 2)
    assert mature_until(store) == 0


def test_a_partition_without_event_time_holds_back_unless_it_was_taken_and_nothing_is_open(store):
    reach(store, 9 * COHORT)
    assert mature_until(store) == 8
    store.zadd(keys.due("outcomes", 3), {"u": 1})
    assert mature_until(store) is None
    store.delete(keys.due("outcomes", 3))
    store.delete(keys.clock(3))
    assert mature_until(store) is None


def test_nothing_is_mature_before_agents_have_told_their_rules(store):
    reach(store, 9 * COHORT)
    store.hset(keys.sums("t", "u"), mapping={"arm": "champion", "bundle": "b", "1:i": 3})
    assert list(read_outcomes(store, "t")) == ["champion"]
    store.delete(keys.outcomes_rules())
    assert mature_until(store) is None
    assert read_outcomes(store, "t") == {}


def test_one_reading_gives_the_mature_cohorts_as_their_own_does_and_the_open_ones_beside_them(store):
    for partition in range(PARTITIONS):
        reach(store, 4 * COHORT + WINDOW + LATENESS, partition)  # cohorts 0 to 3
    for user, arm, fields in (
        ("a", "champion", {"1:i": 5, "1:c": 2, "7:i": 3}), ("b", "champion", {"7:i": 4}),
        ("c", "challenger-sft", {"3:i": 6, "3:c": 1, "3:o": 1}), ("d", "challenger-dpo", {"4:i": 2}),
    ):  # fmt: skip
        store.hset(keys.sums("t", user), mapping={"arm": arm, "bundle": "b"} | fields)
    alone = read_outcomes(store, "t")
    mature, of_all = read_all_outcomes(store, "t")
    assert list(alone) == list(mature) == ["challenger-sft", "champion"]
    for arm, outcomes in alone.items():
        assert mature[arm].cohorts == outcomes.cohorts == (1, 3)
        assert mature[arm].total().tolist() == outcomes.total().tolist()
    assert {arm: outcomes.total().tolist() for arm, outcomes in of_all.items()} == {
        "challenger-dpo": [[2, 0, 0]], "challenger-sft": [[6, 1, 1]], "champion": [[8, 2, 0], [4, 0, 0]],
    }  # fmt: skip
    store.delete(keys.outcomes_rules())
    assert read_all_outcomes(store, "t")[0] == {}


def test_the_value_that_a_gate_asks_for_is_a_column_and_no_other_money_is_read(store):
    reach(store, 9 * COHORT)
    fields = {"1:i": 9, "1:c": 2, "1:o": 1, "1:r": 1999, "1:m": 60, "2:i": 4}
    store.hset(keys.sums("t", "u"), mapping={"arm": "champion", "bundle": "b"} | fields)
    for value, rows in (
        ("none", [[9, 2, 1], [4, 0, 0]]),
        ("revenue", [[9, 2, 1, 1999], [4, 0, 0, 0]]),
        ("commission", [[9, 2, 1, 60], [4, 0, 0, 0]]),
    ):
        outcomes = read_outcomes(store, "t", value)["champion"]
        assert outcomes.counts.tolist() == [rows]
        assert arm_sums(outcomes.total()).value == sum(row[3] for row in rows if len(row) > 3)


@pytest.mark.parametrize("decode", [False, True])
def test_the_sums_of_a_trial_become_arrays_by_arm_and_mature_cohort(store, redis_url, decode):
    reach(store, 9 * COHORT)
    rows = {"champion": {}, "challenger-sft": {}}
    for n in range(2500):
        arm, user = "champion" if n % 2 else "challenger-sft", f"u{n}:ü*"
        numbers = {f"{cohort}:{kind}": 1 + n % 7 for cohort in (3, n % 4) for kind in "ico"[: 1 + n % 3]}
        rows[arm][keys.sums("tr-1", user)] = numbers
        # Cohort 8 is not mature; a user with nothing else has no row.
        store.hset(keys.sums("tr-1", user), mapping={"arm": arm, "bundle": "b", "8:i": 5, **numbers})
    store.hset(keys.sums("tr-1", "only-young"), mapping={"arm": "champion", "bundle": "b", "8:i": 4})
    store.hset(keys.sums("tr-1", "only-clicked"), mapping={"arm": "champion", "bundle": "b", "2:c": 1})
    store.hset(keys.sums("tr-11", "u"), mapping={"arm": "champion", "bundle": "b", "1:i": 9})
    rows["champion"][keys.sums("tr-1", "only-clicked")] = {"2:c": 1}
    with redis.Redis.from_url(redis_url, decode_responses=decode) as connection:
        by_arm = read_outcomes(connection, "tr-1")
    assert by_arm.keys() == rows.keys()
    for arm, outcomes in by_arm.items():
        assert outcomes.cohorts == (0, 1, 2, 3)
        expected = [
            [[numbers.get(f"{cohort}:{kind}", 0) for kind in "ico"] for cohort in outcomes.cohorts]
            for _, numbers in sorted(rows[arm].items(), key=lambda row: row[0].encode())
        ]
        assert outcomes.counts.tolist() == expected
        shown = [np.sum(row, axis=0).tolist() for row in expected if np.sum(row, axis=0)[0]]
        assert outcomes.total().tolist() == shown
        early = outcomes.up_to(1)
        assert (early.cohorts, early.counts.tolist()) == ((0, 1), [row[:2] for row in expected])
        assert outcomes.up_to(-1).total().shape == (0, 3)
    assert len(by_arm["champion"].total()) == 1250
    assert read_outcomes(store, "tr-none") == {}


@pytest.mark.parametrize("wrong", [{"1:i": "many"}, {"1:c": -1}, {"impressions": 3}, {"x:i": 3}, {"1:k": 3}])
def test_sums_that_are_no_whole_numbers_by_cohort_are_refused_without_naming_the_user(store, wrong):
    reach(store, 9 * COHORT)
    store.hset(keys.sums("tr-bad", "secret-user"), mapping={"arm": "champion", "bundle": "b", **wrong})
    with pytest.raises(SidstreamError, match="delete that key") as failure:
        read_outcomes(store, "tr-bad")
    assert "secret-user" not in str(failure.value)


def test_a_worker_with_other_rules_is_warned_about_and_the_newest_rules_stand(store, redis_url, caplog):
    async def tell(rules):
        connection = redisdb.async_redis_client(RedisSettings.model_validate({"url": redis_url}))
        try:
            await store_rules(connection, rules, PARTITIONS)
        finally:
            await connection.aclose()

    asyncio.run(tell(OutcomeRules(WINDOW, LATENESS, COHORT)))
    assert not caplog.records
    asyncio.run(tell(OutcomeRules(WINDOW, LATENESS, COHORT // 2)))
    assert "cohort_ms 3600000 -> 1800000" in caplog.text
    assert "window_ms" not in caplog.text
    assert int(store.hget(keys.outcomes_rules(), "cohort_ms")) == COHORT // 2


def test_one_promoter_at_a_time(redis_url):
    with redis.Redis.from_url(redis_url) as connection:
        with promotion_lease(connection, "lease-a"):
            with (
                pytest.raises(SidstreamError, match="another process"),
                promotion_lease(connection, "lease-a"),
            ):
                raise AssertionError("two hold the lease")
            with promotion_lease(connection, "lease-b"):
                assert connection.exists(lease_key("lease-b"))
        assert not connection.exists(lease_key("lease-a"))


def test_a_lease_outlives_its_term_while_its_holder_lives(redis_url):
    with redis.Redis.from_url(redis_url) as connection, promotion_lease(connection, "lease-c", lease_ms=300):
        assert not threading.Event().wait(1.0)
        assert connection.exists(lease_key("lease-c"))


def test_a_lost_lease_is_reported_and_the_new_holder_keeps_it(redis_url):
    def lose(connection) -> None:
        with promotion_lease(connection, "lease-d", lease_ms=300):
            connection.set(lease_key("lease-d"), "another")
            renewing = [thread for thread in threading.enumerate() if thread.name == "lease"]
            wait_until(lambda: not any(thread.is_alive() for thread in renewing), 10, "the end of renewal")

    with redis.Redis.from_url(redis_url) as connection:
        with pytest.raises(SidstreamError, match="was lost"):
            lose(connection)
        assert connection.get(lease_key("lease-d")) == b"another"
