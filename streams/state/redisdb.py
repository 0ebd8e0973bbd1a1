"""Redis: clients from the settings, Lua scripts, pipelines, and which errors mean that the server is away."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from typing import Any

import redis
import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

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
    """The server's address. Raises SidstreamError where the settings have none."""
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


def async_redis_client(
    settings: RedisSettings, timeout_s: float = _TIMEOUT_S, retries: bool = True
) -> redis.asyncio.Redis:
    """A client for asyncio; replies are bytes.

    `timeout_s`: for connecting and for each reply. `retries` False: a command is sent once, for callers that
    have their own deadline, or whose commands may not take effect twice.
    """
    options: dict[str, Any] = {} if retries else {"retry": Retry(NoBackoff(), 0)}
    return redis.asyncio.Redis.from_url(
        redis_url(settings), socket_timeout=timeout_s, socket_connect_timeout=timeout_s, **options
    )


class RedisScript:
    """A Lua script that Redis runs by its SHA-1 (EVALSHA): a call sends forty characters, not the source."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._sha = sha1(source.encode(), usedforsecurity=False).hexdigest()

    def command(self, keys: Sequence[str], arguments: Sequence[Any]) -> tuple[Any, ...]:
        """One call of the script, for `run_pipeline`."""
        return ("EVALSHA", self._sha, len(keys), *keys, *arguments)


async def run_pipeline(
    store: redis.asyncio.Redis, commands: Sequence[tuple[Any, ...]], script: RedisScript | None = None
) -> list[Any]:
    """Send raw commands in one round trip, without a transaction; return raw replies in order.

    `script`: the one that the commands call. Where the server does not have it (it was restarted), it is
    loaded and all commands are sent again, so they must be idempotent. Raises the first reply that is an
    error, after all were read.
    """
    while True:
        async with store.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            replies: list[Any] = await pipe.execute(raise_on_error=False)
        # Not raised by the pipeline itself: its message quotes the command, and with it the user's id.
        error = next((reply for reply in replies if isinstance(reply, Exception)), None)
        if error is None:
            return replies
        if script is None or not isinstance(error, exceptions.NoScriptError):
            raise error
        await store.script_load(script.source)
