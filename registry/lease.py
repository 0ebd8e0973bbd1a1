"""Who may change what is in service: one holder at a time, by a lease in Redis.

MLflow sets aliases without compare-and-swap, so two promoters could interleave. The lease ends by itself when
its holder dies.
"""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from redis.exceptions import RedisError

from streams.errors import SidstreamError

# Longer than any pause of a healthy process, short enough to wait for after a crash.
LEASE_MS = 30_000
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
def promoter(redis: Any, name: str, lease_ms: int = LEASE_MS) -> Iterator[None]:
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
    ended, lost = threading.Event(), threading.Event()

    def renew() -> None:
        while not ended.wait(lease_ms / 3000):
            try:
                held = redis.eval(_RENEW, 1, key, mine, lease_ms)
            except RedisError:
                held = 0  # whether the lease still holds is unknown, so it does not
            if not held:
                lost.set()
                return

    keeper = threading.Thread(target=renew, name="lease", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        # Without Redis the lease ends by itself.
        with suppress(RedisError):
            redis.eval(_RELEASE, 1, key, mine)
    if lost.is_set():
        raise SidstreamError(
            f"the lease on {name} was lost on the way: see `sidstream models` for what is in service, "
            "and repeat the step if it is not what you asked for"
        )
