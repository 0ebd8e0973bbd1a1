"""Reads users' histories and profiles from Redis; a result of None says that Redis did not answer in time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import NamedTuple

from streams.backoff import Backoff
from streams.settings import RedisSettings
from streams.state import keys
from streams.state.redisdb import OUTAGES, async_redis_client

log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.05


class StoredUser(NamedTuple):
    """A user's history and profile as Redis stores them, packed; None where there is none."""

    history: bytes | None = None
    profile: bytes | None = None


class HistoryReader:
    """The histories and profiles of a batch of users in one round trip.

    When Redis fails, the first batch waits for it up to `wait_s`; those after it try once each, so that an
    outage costs every request one timeout and not the whole wait.
    """

    def __init__(self, settings: RedisSettings, timeout_s: float, wait_s: float) -> None:
        self._redis = async_redis_client(settings, timeout_s, retries=False)
        self._wait_s = wait_s
        self.down = False

    async def read(self, users: Sequence[str]) -> list[StoredUser] | None:
        """History and profile of each user, in order; None: Redis did not answer."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (0 if self.down else self._wait_s)
        backoff = Backoff(_FIRST_RETRY_S)
        while True:
            try:
                # Single GETs in one pipeline: MGET may not span the slots of a cluster.
                async with self._redis.pipeline(transaction=False) as pipeline:
                    for user in users:
                        pipeline.get(keys.history(user))
                        pipeline.get(keys.profile(user))
                    values: list[bytes | None] = await pipeline.execute()
            except OUTAGES as error:
                wait_s = backoff.next_wait()
                if loop.time() + wait_s > deadline:
                    if not self.down:
                        log.warning("Redis does not answer (%s): recommending without histories", error)
                    self.down = True
                    return None
                await asyncio.sleep(wait_s)
            else:
                if self.down:
                    log.warning("Redis answers again")
                self.down = False
                return [StoredUser(*pair) for pair in zip(values[::2], values[1::2], strict=True)]

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()
