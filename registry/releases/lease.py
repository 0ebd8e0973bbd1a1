"""The promotion lease in Redis: one process at a time may change what is in service.

MLflow sets aliases without compare-and-swap, so that the writes of two promoters could interleave. The lease
expires when its holder dies. `check_lease` tells a holder that was stopped for longer than the lease.
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

# In milliseconds. Longer than any pause of a healthy process, short enough to wait for after a crash.
LEASE_MS = 30_000
# The check of the lease around the running code. Not an argument: a caller could forget to hand it on.
_CHECK: ContextVar[Callable[[], None] | None] = ContextVar("check_lease", default=None)
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

    `redis` is a redis-py client. Raises SidstreamError when another process holds the lease, and at the end
    of the block when it was lost meanwhile.
    """
    key = lease_key(name)
    holder = f"{socket.gethostname()}:{uuid.uuid4().hex}"
    if not redis.set(key, holder, nx=True, px=lease_ms):
        raise SidstreamError(
            f"another process is changing what {name} serves; try again when it is done "
            f"(at the latest {lease_ms // 1000} seconds after it died)"
        )
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(lease_ms / 3000):
            # A short outage of Redis is harmless: the lease may still hold when Redis is back.
            with suppress(RedisError):
                if not redis.eval(_RENEW, 1, key, holder, lease_ms):
                    return

    def renew_or_raise() -> None:
        try:
            # The check renews the lease: the next write has the full time of the lease.
            if redis.eval(_RENEW, 1, key, holder, lease_ms):
                return
        except RedisError as error:
            raise SidstreamError(
                f"whether the lease on {name} still holds is unknown ({error}): nothing more was changed; "
                "see `sidstream doctor`, then repeat the step"
            ) from error
        raise _lost_error(name)

    keeper = threading.Thread(target=renew, name="lease", daemon=True)
    keeper.start()
    outer = _CHECK.get()
    _CHECK.set(renew_or_raise)
    still_held = 1
    try:
        yield
    finally:
        _CHECK.set(outer)
        ended.set()
        keeper.join()
        # Without Redis the lease expires by itself.
        with suppress(RedisError):
            still_held = redis.eval(_RELEASE, 1, key, holder)
    if not still_held:
        raise _lost_error(name)


def check_lease() -> None:
    """Raise SidstreamError unless Redis confirms that the lease around the caller still holds.

    Outside of `promotion_lease` (one process, as in tests) it does nothing.
    """
    renew_or_raise = _CHECK.get()
    if renew_or_raise is not None:
        renew_or_raise()


def _lost_error(name: str) -> SidstreamError:
    return SidstreamError(
        f"the lease on {name} was lost on the way: see `sidstream models` for what is in service, "
        "and repeat the step if it is not what you asked for"
    )
