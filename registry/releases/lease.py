"""Who may change what is in service: one holder at a time, by a lease in Redis.

MLflow sets aliases without compare-and-swap, so two promoters could interleave. The lease ends by itself when
its holder dies. A holder that is stopped for longer than the lease, and goes on, learns of it by `check`.
"""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from redis.exceptions import RedisError

from streams.errors import SidstreamError

# Longer than any pause of a healthy process, short enough to wait for after a crash.
LEASE_MS = 30_000
# How the lease around the running code is checked. Not an argument: a caller could forget to hand it on.
_CHECK: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)
_RENEW = """
if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('pexpire', KEYS[1], ARGV[2]) end
return 0
"""
_RELEASE = """
if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end
return 0
"""


def lease_key(name: str) -> str:
    """The Redis key of a recommender's lease."""
    return f"promoter:{name}"


@contextmanager
def promotion_lease(redis: Any, name: str, lease_ms: int = LEASE_MS) -> Iterator[None]:
    """Hold the lease of recommender `name` while the block runs; it is renewed every third of `lease_ms`.

    `redis` is a redis-py client. Raises SidstreamError when another holds it, and at the end when it was lost
    on the way.
    """
    key = lease_key(name)
    mine = f"{socket.gethostname()}:{uuid.uuid4().hex}"
    if not redis.set(key, mine, nx=True, px=lease_ms):
        raise SidstreamError(
            f"another process is changing what {name} serves; try again when it is done "
            f"(at the latest {lease_ms // 1000} seconds after it died)"
        )
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(lease_ms / 3000):
            # A Redis that is away for a moment costs nothing: the lease may still stand when it is back.
            with suppress(RedisError):
                if not redis.eval(_RENEW, 1, key, mine, lease_ms):
                    return

    def held() -> None:
        try:
            # By renewing it: what follows has the whole lease before it.
            if redis.eval(_RENEW, 1, key, mine, lease_ms):
                return
        except RedisError as error:
            raise SidstreamError(
                f"whether the lease on {name} still holds is unknown ({error}): nothing more was changed; "
                "see `sidstream doctor`, then repeat the step"
            ) from error
        raise _lost(name)

    keeper = threading.Thread(target=renew, name="lease", daemon=True)
    keeper.start()
    outer = _CHECK.get()
    _CHECK.set(held)
    still_mine = 1
    try:
        yield
    finally:
        _CHECK.set(outer)
        ended.set()
        keeper.join()
        # Without Redis the lease ends by itself.
        with suppress(RedisError):
            still_mine = redis.eval(_RELEASE, 1, key, mine)
    if not still_mine:
        raise _lost(name)


def check_lease() -> None:
    """Raise SidstreamError unless the lease around the caller still holds, by Redis's own word.

    Outside of `promoter` (one process, as in tests) there is nothing to lose, and nothing happens.
    """
    held = _CHECK.get()
    if held is not None:
        held()


def _lost(name: str) -> SidstreamError:
    return SidstreamError(
        f"the lease on {name} was lost on the way: see `sidstream models` for what is in service, "
        "and repeat the step if it is not what you asked for"
    )
