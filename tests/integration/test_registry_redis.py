"""The sums of a trial and the promoter's lease on a real Redis."""

import threading

import pytest
import redis

from registry.lease import lease_key, promoter
from registry.outcomes import read_outcomes
from streams import keys
from streams.errors import SidstreamError
from tests.support import wait_until

pytestmark = pytest.mark.integration


def test_the_sums_of_a_trial_become_arrays_by_arm(redis_url):
    with redis.Redis.from_url(redis_url) as connection:
        expected = {"champion": [], "challenger-sft": []}
        for n in range(2500):
            arm = "champion" if n % 2 else "challenger-sft"
            row = (n + 1, n % 7, n % 3)
            expected[arm].append(row)
            names = ("impressions", "clicks", "orders")
            connection.hset(
                keys.sums("tr-1", f"u{n}:ü*"),
                mapping={"arm": arm, "bundle": "b"} | dict(zip(names, row, strict=True)),
            )
        connection.hset(keys.sums("tr-1", "only-shown"), mapping={"arm": "champion", "impressions": 4})
        expected["champion"].append((4, 0, 0))
        connection.hset(keys.sums("tr-11", "u"), mapping={"arm": "champion", "impressions": 9})
        found = read_outcomes(connection, "tr-1")
        assert {arm: rows.tolist() for arm, rows in found.items()} == {
            arm: sorted(map(list, rows)) for arm, rows in expected.items()
        }
        assert read_outcomes(connection, "tr-none") == {}
        connection.hset(keys.sums("tr-bad", "secret-user"), mapping={"arm": "champion", "clicks": "many"})
        with pytest.raises(SidstreamError, match="no whole numbers") as failure:
            read_outcomes(connection, "tr-bad")
        assert "secret-user" not in str(failure.value)


def test_one_promoter_at_a_time(redis_url):
    with redis.Redis.from_url(redis_url) as connection:
        with promoter(connection, "lease-a"):
            with pytest.raises(SidstreamError, match="another process"), promoter(connection, "lease-a"):
                raise AssertionError("two hold the lease")
            with promoter(connection, "lease-b"):
                assert connection.exists(lease_key("lease-b"))
        assert not connection.exists(lease_key("lease-a"))


def test_a_lease_outlives_its_term_while_its_holder_lives(redis_url):
    with redis.Redis.from_url(redis_url) as connection, promoter(connection, "lease-c", lease_ms=300):
        assert not threading.Event().wait(1.0)
        assert connection.exists(lease_key("lease-c"))


def test_a_lost_lease_is_reported_and_the_new_holder_keeps_it(redis_url):
    def lose(connection) -> None:
        with promoter(connection, "lease-d", lease_ms=300):
            connection.set(lease_key("lease-d"), "another")
            renewing = [thread for thread in threading.enumerate() if thread.name == "lease"]
            wait_until(lambda: not any(thread.is_alive() for thread in renewing), 10, "the end of renewal")

    with redis.Redis.from_url(redis_url) as connection:
        with pytest.raises(SidstreamError, match="was lost"):
            lose(connection)
        assert connection.get(lease_key("lease-d")) == b"another"
