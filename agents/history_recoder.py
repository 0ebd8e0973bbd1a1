"""Histories of earlier codebooks, brought over to the one in use: at their next touch, and by a scan.

A write compares the bytes that were read with those that stand: a history that somebody else changed in
between is read again. So it is brought over once, wherever a worker dies, and whoever else is writing.

Entries whose items have no SID under the new codebook wait in their history (streams.state.translation). The
items are remembered here, and the histories are brought over again when one of them gets its SID. That memory
is rebuilt by the scan, which runs after a start, an assignment and a new codebook.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final

import redis.asyncio
from redis.exceptions import NoScriptError

from agents.assigned_sids import AssignedSids
from agents.metrics import RECODED
from streams.errors import SidstreamError
from streams.settings import HistorySettings
from streams.state import keys
from streams.state.history import split_parts
from streams.state.redisdb import run_pipeline
from streams.state.translation import REPLACE_IF_UNCHANGED, needs_recoding, recode_history
from streams.wire.records import partition_of

log = logging.getLogger(__name__)

# Histories translated in one go, and keys looked at by one SCAN: some milliseconds each.
_HISTORIES_PER_PIPELINE: Final = 500
_KEYS_PER_SCAN: Final = 1000
# What a scan takes of the time between two batches, seconds.
_SCAN_S: Final = 0.05


# (user, old, new) of some histories -> for each 1 where the old bytes still stood and are replaced, else 0.
ReplaceHistories = Callable[[Sequence[tuple[str, bytes, bytes]]], Awaitable[list[int]]]


class HistoryRecoder:
    """Keeps `h:{user}` of this worker's users under the codebook in use. `replace`: by default in Redis."""

    def __init__(
        self,
        store: redis.asyncio.Redis,
        sids: AssignedSids,
        bounds: HistorySettings,
        replace: ReplaceHistories | None = None,
    ) -> None:
        self._store = store
        self._sids = sids
        self._bounds = bounds
        self._replace = replace or HistoryReplacer(store).replace
        self._partitions: frozenset[int] = frozenset()
        self._count = 1
        self._cursor: int | None = 0  # of the scan; None: it is done
        self._scanned: str | None = None  # the codebook that it is for
        # item -> users of whose histories an entry waits for its SID; looked at when SIDs came.
        self._waiting: dict[str, set[str]] = {}
        self._change_count_seen = -1

    def take_partitions(self, partitions: Iterable[int], count: int) -> None:
        """This worker's partitions of `count`: all its users' histories are looked at."""
        self._partitions, self._count = frozenset(partitions), count
        self._waiting.clear()
        self._cursor = 0

    @property
    def is_scanning(self) -> bool:
        """Whether histories are still to be looked at."""
        return self._cursor is not None

    async def recode_users(self, users: Iterable[str], how: str) -> None:
        """Bring these users' histories over. `how` stands in the metric: touch, scan or sid."""
        codebook = self._sids.codebook
        assert codebook is not None
        left = list(users)
        while left:
            chunk = left[:_HISTORIES_PER_PIPELINE]
            values: list[Any] = await run_pipeline(self._store, [("GET", keys.history(u)) for u in chunk])
            old = {u: value for u, value in zip(chunk, values, strict=True) if value is not None}
            new = {user: self._recoded(user, value, codebook, how) for user, value in old.items()}
            changed = [user for user in old if new[user] != old[user]]
            replaced = await self._replace([(user, old[user], new[user]) for user in changed])
            overtaken = {user for user, done in zip(changed, replaced, strict=True) if not done}
            for user in old.keys() - overtaken:
                self._remember_waiting(user, new[user])
            RECODED.labels(how).inc(len(changed) - len(overtaken))
            left = [*overtaken, *left[_HISTORIES_PER_PIPELINE:]]

    async def run_slice(self) -> None:
        """Go on with the scan for a while, and bring over what waited for SIDs that came."""
        codebook = self._sids.codebook
        if codebook is None:
            return
        if self._scanned != codebook:
            self._scanned, self._cursor = codebook, 0
            self._waiting.clear()
        # Under the only codebook that ever was, nothing is to be brought over.
        if self._sids.has_several_codebooks:
            await self._scan(codebook)
        await self._recode_waiting()

    async def _recode_waiting(self) -> None:
        if self._change_count_seen == self._sids.change_count:
            return
        changes = self._sids.change_count
        ready = [item for item in self._waiting if self._sids.get(item) is not None]
        users = {user for item in ready for user in self._waiting[item]}
        await self.recode_users(users, "sid")
        for item in ready:
            del self._waiting[item]
        self._change_count_seen = changes

    async def _scan(self, codebook: str) -> None:
        until = time.monotonic() + _SCAN_S
        while self._cursor is not None and time.monotonic() < until:
            looked: tuple[int, list[Any]] = await self._store.scan(
                self._cursor, match=keys.history("*"), count=_KEYS_PER_SCAN
            )
            cursor, found = looked
            users = [user for user in (keys.user_of_history(key) for key in found) if self._is_own_user(user)]
            starts = await run_pipeline(self._store, [("GETRANGE", keys.history(u), 0, 5) for u in users])
            some = [
                user for user, start in zip(users, starts, strict=True) if needs_recoding(start, codebook)
            ]
            await self.recode_users(some, "scan")
            # Last: a look that failed half-way is repeated.
            self._cursor = cursor or None

    def _recoded(self, user: str, value: bytes, codebook: str, how: str) -> bytes:
        try:
            return recode_history(
                value, self._sids.translate, codebook=codebook, levels=self._sids.levels, bounds=self._bounds
            )
        except (SidstreamError, IndexError) as error:
            if how == "touch":  # the event that touched it is refused; a scan only leaves it as it is
                raise
            log.error("the history of user %s stays as it is: %s", keys.anonymous_user(user), error)
            return value

    def _is_own_user(self, user: str) -> bool:
        return partition_of(user.encode(), self._count) in self._partitions

    def _remember_waiting(self, user: str, value: bytes) -> None:
        try:
            waiting = split_parts(value).waiting
        except (SidstreamError, IndexError):  # said where it was to be brought over
            return
        for tag, entry in waiting:
            item = self._sids.item_with_sid(tag, entry[10:])
            # An SID of a codebook that nobody tells of any more waits without hope, and is kept all the same.
            if item is not None:
                self._waiting.setdefault(item, set()).add(user)
                self._change_count_seen = -1


class HistoryReplacer:
    """Replaces histories in Redis, each only where nobody changed it since it was read."""

    def __init__(self, store: redis.asyncio.Redis) -> None:
        self._store = store
        self._script: str | None = None

    async def replace(self, values: Sequence[tuple[str, bytes, bytes]]) -> list[int]:
        """As `Replace` says. Raises RedisError."""
        while values:
            if self._script is None:
                self._script = await self._store.script_load(REPLACE_IF_UNCHANGED)
            try:
                return await run_pipeline(
                    self._store,
                    [("EVALSHA", self._script, 1, keys.history(user), old, new) for user, old, new in values],
                )
            except NoScriptError:
                self._script = None  # a restarted server has no scripts; what was replaced is found so
        return []
