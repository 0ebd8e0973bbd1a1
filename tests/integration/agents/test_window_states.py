"""Open windows in Redis: a writer that was overtaken changes nothing, not even the sums."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import redis
import redis.asyncio

from agents.attribution.window_states import StateWrite, SumChange, WindowStates
from streams.settings import RedisSettings
from streams.state import keys, redisdb

pytestmark = pytest.mark.integration

SUM = SumChange("trial", "champion", "bundle", 7, 3, 2, 1, 1999, 60)


def with_states(url: str, body: Callable[[WindowStates, redis.asyncio.Redis], Awaitable[None]]) -> None:
    async def run() -> None:
        store = redisdb.async_redis_client(RedisSettings.model_validate({"url": url}))
        try:
            await store.flushall()
            await body(WindowStates(store, "outcomes"), store)
        finally:
            await store.aclose()

    asyncio.run(run())


def test_a_state_is_read_back_and_found_when_it_is_due(redis_url: str) -> None:
    async def body(states: WindowStates, store: redis.asyncio.Redis) -> None:
        assert (
            await states.write([StateWrite("u", 1, b"", b"body", 50), StateWrite("v", 1, b"", b"other", 60)])
            == []
        )
        assert {user: body for user, (_, body) in (await states.read(["u", "v", "w"])).items()} == {
            "u": b"body", "v": b"other",
        }  # fmt: skip
        assert await states.due_users(1, 49) == []
        assert await states.due_users(1, 50) == ["u"]
        assert await states.due_users(2, 100) == []

    with_states(redis_url, body)


def test_an_overtaken_writer_writes_neither_state_nor_sums(redis_url: str) -> None:
    async def body(states: WindowStates, store: redis.asyncio.Redis) -> None:
        await states.write([StateWrite("u", 0, b"", b"one", 5)])
        token = (await states.read(["u"]))["u"][0]
        assert await states.write([StateWrite("u", 0, token, b"two", 6, [SUM])]) == []
        # The zombie still names the first token, or believes that there is no state at all.
        for stale in (token, b""):
            assert await states.write([StateWrite("u", 0, stale, b"zombie", 7, [SUM])]) == ["u"]
        assert (await states.read(["u"]))["u"][1] == b"two"
        row = await store.hgetall(keys.sums("trial", "u"))
        assert row == {
            b"arm": b"champion", b"bundle": b"bundle", b"7:i": b"3", b"7:c": b"2", b"7:o": b"1",
            b"7:r": b"1999", b"7:m": b"60",
        }  # fmt: skip

    with_states(redis_url, body)


def test_numbers_that_move_to_another_cohort_leave_nothing_behind(redis_url: str) -> None:
    async def body(states: WindowStates, store: redis.asyncio.Redis) -> None:
        async def move(*sums: SumChange) -> dict[bytes, bytes]:
            token = (await states.read(["u"])).get("u", (b"", b""))[0]
            assert await states.write([StateWrite("u", 0, token, b"state", 5, sums)]) == []
            return await store.hgetall(keys.sums("trial", "u"))

        names = {b"arm": b"champion", b"bundle": b"bundle"}
        back = replace(SUM, impressions=-3, clicks=-2, orders=-1, revenue=-1999, commission=-60)
        of_8 = {b"8:i": b"3", b"8:o": b"1", b"8:r": b"1999", b"8:m": b"60"}
        assert await move(SUM, replace(SUM, cohort=8, clicks=0)) == {
            **names, b"7:i": b"3", b"7:c": b"2", b"7:o": b"1", b"7:r": b"1999", b"7:m": b"60", **of_8,
        }  # fmt: skip
        assert await move(back, replace(SUM, cohort=6)) == {
            **names, b"6:i": b"3", b"6:c": b"2", b"6:o": b"1", b"6:r": b"1999", b"6:m": b"60", **of_8,
        }  # fmt: skip
        await move(replace(back, cohort=6))
        assert await move(replace(back, cohort=8, clicks=0)) == {}
        # The same hash twice in one script: emptied, then filled.
        await move(SUM)
        assert await move(back, replace(SUM, cohort=9, clicks=0, orders=0, revenue=0, commission=0)) == {
            **names,
            b"9:i": b"3",
        }

    with_states(redis_url, body)


def test_a_deleted_and_remade_state_does_not_accept_an_old_token(redis_url: str) -> None:
    async def body(states: WindowStates, store: redis.asyncio.Redis) -> None:
        await states.write([StateWrite("u", 0, b"", b"one", 5)])
        token = (await states.read(["u"]))["u"][0]
        assert await states.write([StateWrite("u", 0, token, None, None)]) == []
        assert not await store.exists(keys.outcomes("u"), keys.due("outcomes", 0))
        await states.write([StateWrite("u", 0, b"", b"again", 5)])
        assert await states.write([StateWrite("u", 0, token, b"zombie", 5)]) == ["u"]

    with_states(redis_url, body)


def test_a_server_that_lost_the_script_gets_it_again(redis_url: str) -> None:
    async def body(states: WindowStates, store: redis.asyncio.Redis) -> None:
        await states.write([StateWrite("u", 0, b"", b"one", 5)])
        await store.script_flush()
        assert await states.write([StateWrite("v", 0, b"", b"two", 5)]) == []
        assert (await states.read(["v"]))["v"][1] == b"two"

    with_states(redis_url, body)


def test_event_time_in_redis_never_goes_back(redis_url: str) -> None:
    async def body(states: WindowStates, store: redis.asyncio.Redis) -> None:
        assert await states.watermark(3) is None
        for watermark in (100, 900, 200):
            await states.set_watermark(3, watermark)
        assert await states.watermark(3) == 900

    with_states(redis_url, body)
