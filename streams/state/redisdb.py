"""Redis clients from the settings, and which of their errors mean that the server is away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis
import redis.asyncio
from redis import exceptions

from streams.errors import SidstreamError
from streams.settings import RedisSettings

# A server that does not answer within this is away. Scripts here take far below a millisecond; a minute of
# AOF rewriting on a busy disk does not stall replies for as long.
_TIMEOUT_S = 10.0

# The server is away, starting, failing over or out of memory: wait and try again, the data is not at fault.
OUTAGES: tuple[type[BaseException], ...] = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.BusyLoadingError,
    exceptions.ReadOnlyError,
    exceptions.TryAgainError,
    exceptions.ClusterDownError,
    exceptions.MasterDownError,
    exceptions.OutOfMemoryError,
)


def redis_url(settings: RedisSettings) -> str:
    """The server's address. Raises SidstreamError when none is known."""
    if settings.url is None:
        raise SidstreamError(
            "no Redis address: start the local stack with `sidstream up`, or set SIDSTREAM_REDIS__URL"
        )
    return settings.url.get_secret_value()


def redis_client(settings: RedisSettings) -> redis.Redis:
    """A blocking client; replies are bytes."""
    return redis.Redis.from_url(
        redis_url(settings), socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
    )


def async_client(settings: RedisSettings) -> redis.asyncio.Redis:
    """A client for asyncio; replies are bytes."""
    return redis.asyncio.Redis.from_url(
        redis_url(settings), socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
    )


async def run_pipeline(store: redis.asyncio.Redis, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Send raw commands in one go, without a transaction; return raw replies in order.

    Raises the first reply that is an error, after all were read.
    """
    async with store.pipeline(transaction=False) as pipe:
        for command in commands:
            pipe.execute_command(*command)
        results: list[Any] = await pipe.execute(raise_on_error=False)
    for result in results:
        # Not by the pipeline itself: its message quotes the command, and with it the user's id.
        if isinstance(result, Exception):
            raise result
    return results
