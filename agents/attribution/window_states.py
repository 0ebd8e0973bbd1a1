"""Per-user states in Redis with open windows, replaced by compare-and-set.

A value is 8 random bytes (the token that a writer must name to replace it) and a msgpack body. The sorted set
`due:<stage>:{partition}` says which users have a window that closes, and when, so that a restart resumes. A
writer that was overtaken (two workers during a rebalance) writes nothing and starts again from the new state.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

import msgspec
import redis.asyncio

from streams.errors import SidstreamError
from streams.state import keys
from streams.state.redisdb import RedisScript, run_pipeline

# KEYS state, sums ... | ARGV expected token ('' = absent), new value ('' = delete), then per sums key:
# arm, bundle, cohort, impressions, clicks, orders, revenue, commission to add. All or nothing: sums, state
# and fences agree. A field that comes to 0 is deleted, and with the last of them the hash.
_REPLACE_STATE: Final = RedisScript("""
if redis.call('GETRANGE', KEYS[1], 0, 7) ~= ARGV[1] then return 0 end
if ARGV[2] == '' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], ARGV[2]) end
for k = 2, #KEYS do
  local a = 3 + (k - 2) * 8
  redis.call('HSET', KEYS[k], 'arm', ARGV[a], 'bundle', ARGV[a + 1])
  for n, kind in ipairs({'i', 'c', 'o', 'r', 'm'}) do
    local field, change = ARGV[a + 2] .. ':' .. kind, ARGV[a + 2 + n]
    if redis.call('HINCRBY', KEYS[k], field, change) == 0 then redis.call('HDEL', KEYS[k], field) end
  end
  if redis.call('HLEN', KEYS[k]) == 2 then redis.call('DEL', KEYS[k]) end
end
return 1
""")
# KEYS clock | ARGV stage, watermark. The stored watermark never becomes smaller.
_ADVANCE_WATERMARK: Final = RedisScript("""
local stored = redis.call('HGET', KEYS[1], ARGV[1])
if not stored or tonumber(stored) < tonumber(ARGV[2]) then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
return redis.status_reply('OK')
""")
# Users read in one round; the next round reads more.
DUE_USERS_PER_READ: Final = 2000


@dataclass(frozen=True, slots=True)
class SumChange:
    """The numbers to add to a user's sums of one trial and cohort; they may be negative.

    `revenue` and `commission` are in hundredths of the currency.
    """

    trial: str
    arm: str
    bundle: str
    cohort: int
    impressions: int
    clicks: int
    orders: int
    revenue: int = 0
    commission: int = 0


@dataclass(frozen=True, slots=True)
class StateWrite:
    """One user's new state; `token`: of the state that it replaces; body None: delete the state.

    `due_ms`: event time at which a window closes next; None: no window is open.
    """

    user: str
    partition: int
    token: bytes
    body: bytes | None
    due_ms: int | None
    sums: Sequence[SumChange] = ()


class VersionedState(Protocol):
    """What every stage's state has: the version of its layout."""

    version: int


S = TypeVar("S", bound=VersionedState)


class StateCodec(Generic[S]):
    """A stage's states as msgpack. `what` names a state in the error for one of another version."""

    def __init__(self, kind: type[S], version: int, what: str) -> None:
        self._version = version
        self._what = what
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(kind)

    def encode(self, state: S) -> bytes:
        """Bytes of a state."""
        return self._encoder.encode(state)

    def decode(self, body: bytes) -> S:
        """Read a stored state. Raises SidstreamError for one of another version."""
        state = self._decoder.decode(body)
        if state.version != self._version:
            raise SidstreamError(
                f"{self._what} state has version {state.version}, this sidstream reads {self._version}: "
                "replay the topics into an empty Redis"
            )
        return state


class WindowStates:
    """The states of one stage ('preferences' or 'outcomes')."""

    def __init__(self, store: redis.asyncio.Redis, stage: str) -> None:
        self._store = store
        self._stage = stage
        self._key = {"preferences": keys.preferences, "outcomes": keys.outcomes}[stage]

    async def read(self, users: Sequence[str]) -> dict[str, tuple[bytes, bytes]]:
        """(token, body) of each user that has a state."""
        if not users:
            return {}
        values = await run_pipeline(self._store, [("GET", self._key(user)) for user in users])
        return {user: (value[:8], value[8:]) for user, value in zip(users, values, strict=True) if value}

    async def due_users(self, partition: int, watermark: int) -> list[str]:
        """Users with something that matures at or before `watermark`, at most DUE_AT_ONCE."""
        members: list[Any] = await self._store.zrangebyscore(
            keys.due(self._stage, partition), "-inf", watermark, start=0, num=DUE_USERS_PER_READ
        )
        return [user.decode() for user in members]

    async def write(self, writes: Sequence[StateWrite]) -> list[str]:
        """Replace states; return the users whose state another writer changed meanwhile."""
        if not writes:
            return []
        commands: list[tuple[Any, ...]] = []
        for write in writes:
            # The index first: an entry without a state does no harm, a state without an entry never closes.
            index = keys.due(self._stage, write.partition)
            if write.due_ms is None:
                commands.append(("ZREM", index, write.user))
            else:
                commands.append(("ZADD", index, write.due_ms, write.user))
            value = b"" if write.body is None else os.urandom(8) + write.body
            sums = [keys.sums(s.trial, write.user) for s in write.sums]
            arguments: list[Any] = [write.token, value]
            for s in write.sums:
                arguments += (
                    s.arm, s.bundle, s.cohort, s.impressions, s.clicks, s.orders, s.revenue, s.commission,
                )  # fmt: skip
            commands.append(_REPLACE_STATE.command([self._key(write.user), *sums], arguments))
        # Where the script is loaded on the way, a state that was already replaced counts as overtaken.
        results = await run_pipeline(self._store, commands, _REPLACE_STATE)
        return [write.user for write, replaced in zip(writes, results[1::2], strict=True) if not replaced]

    async def watermark(self, partition: int) -> int | None:
        """The watermark (ms) up to which this stage closed the partition's windows."""
        stored = await self._store.hget(keys.clock(partition), self._stage)
        return None if stored is None else int(stored)

    async def set_watermark(self, partition: int, watermark: int) -> None:
        """Store the watermark (ms); one smaller than the stored one changes nothing."""
        command = _ADVANCE_WATERMARK.command([keys.clock(partition)], [self._stage, watermark])
        await run_pipeline(self._store, [command], _ADVANCE_WATERMARK)
