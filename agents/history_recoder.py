"""Histories of earlier codebooks, recoded to the one in use: at their next event, and by a scan.

A write compares the bytes that were read with those in Redis: a history that another writer changed in
between is read again. So each is recoded once, wherever a worker dies, and whoever else is writing.

Entries whose items have no SID under the new codebook wait in their history (streams.state.translation). This
worker remembers the items, and recodes the histories again when one of them gets its SID. The scan rebuilds
that memory; it runs after a start, an assignment and a new codebook.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final

import redis.asyncio

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

# Histories recoded in one round trip, and keys of one SCAN: some milliseconds each.
_HISTORIES_PER_PIPELINE: Final = 500
_KEYS_PER_SCAN: Final = 1000
# Time that a scan takes between two batches, seconds.
_SCAN_S: Final = 0.05


# (user, old, new) of each history -> for each 1 where Redis still had the old bytes and they are replaced;
# else 0.
ReplaceHistories = Callable[[Sequence[tuple[str, bytes, bytes]]], Awaitable[list[int]]]


class HistoryRecoder:
    """Keeps `h:{user}` of this worker's users under the codebook in use.

    `replace` writes the histories, by default to Redis; tests put another one in its place.
    """

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
        self._partition_count = 1
        self._cursor: int | None = 0  # of the scan; None: the scan is done
        self._scan_codebook: str | None = None  # the codebook that the scan recodes to
        # item without a SID -> users whose histories have an entry that waits for it.
        self._users_by_item: dict[str, set[str]] = {}
        self._change_count_seen = -1

    def take_partitions(self, partitions: Iterable[int], partition_count: int) -> None:
        """This worker's partitions of `partition_count`: a scan of all its users' histories begins."""
        self._partitions, self._partition_count = frozenset(partitions), partition_count
        self._users_by_item.clear()
        self._cursor = 0

    @property
    def is_scanning(self) -> bool:
        """Whether the scan still has histories to look at."""
        return self._cursor is not None

    async def recode_users(self, users: Iterable[str], how: str) -> None:
        """Recode these users' histories. `how` is the label of the metric: touch, scan or sid."""
        codebook = self._sids.codebook
        assert codebook is not None
        remaining = list(users)
        while remaining:
            chunk = remaining[:_HISTORIES_PER_PIPELINE]
            values: list[Any] = await run_pipeline(self._store, [("GET", keys.history(u)) for u in chunk])
            old = {u: value for u, value in zip(chunk, values, strict=True) if value is not None}
            new = {user: self._recoded(user, value, codebook, how) for user, value in old.items()}
            changed = [user for user in old if new[user] != old[user]]
            replaced = await self._replace([(user, old[user], new[user]) for user in changed])
            overtaken = {user for user, written in zip(changed, replaced, strict=True) if not written}
            for user in old.keys() - overtaken:
                self._remember_waiting(user, new[user])
            RECODED.labels(how).inc(len(changed) - len(overtaken))
            remaining = [*overtaken, *remaining[_HISTORIES_PER_PIPELINE:]]

    async def run_slice(self) -> None:
        """Go on with the scan for a while, and recode histories whose items got their SIDs."""
        codebook = self._sids.codebook
        if codebook is None:
            return
        if self._scan_codebook != codebook:
            self._scan_codebook, self._cursor = codebook, 0
            self._users_by_item.clear()
        # With only one codebook on the topic, no history is under another one.
        if self._sids.has_several_codebooks:
            await self._scan(codebook)
        await self._recode_waiting()

    async def _recode_waiting(self) -> None:
        if self._change_count_seen == self._sids.change_count:
            return
        changes = self._sids.change_count
        ready = [item for item in self._users_by_item if self._sids.get(item) is not None]
        users = {user for item in ready for user in self._users_by_item[item]}
        await self.recode_users(users, "sid")
        for item in ready:
            del self._users_by_item[item]
        self._change_count_seen = changes

    async def _scan(self, codebook: str) -> None:
        until = time.monotonic() + _SCAN_S
        while self._cursor is not None and time.monotonic() < until:
            reply: tuple[int, list[Any]] = await self._store.scan(
                self._cursor, match=keys.history("*"), count=_KEYS_PER_SCAN
            )
            cursor, names = reply
            users = [user for user in (keys.user_of_history(key) for key in names) if self._is_own_user(user)]
            headers = await run_pipeline(self._store, [("GETRANGE", keys.history(u), 0, 5) for u in users])
            outdated = [
                user for user, header in zip(users, headers, strict=True) if needs_recoding(header, codebook)
            ]
            await self.recode_users(outdated, "scan")
            # Last, so that a part of the scan that failed half-way is repeated.
            self._cursor = cursor or None

    def _recoded(self, user: str, value: bytes, codebook: str, how: str) -> bytes:
        try:
            return recode_history(
                value, self._sids.translate, codebook=codebook, levels=self._sids.levels, bounds=self._bounds
            )
        except (SidstreamError, IndexError) as error:
            if how == "touch":  # the batch loop dead-letters the event; a scan leaves the history as it is
                raise
            log.error("the history of user %s stays as it is: %s", keys.anonymous_user(user), error)
            return value

    def _is_own_user(self, user: str) -> bool:
        return partition_of(user.encode(), self._partition_count) in self._partitions

    def _remember_waiting(self, user: str, value: bytes) -> None:
        try:
            waiting = split_parts(value).waiting
        except (SidstreamError, IndexError):  # `_recoded` has logged it
            return
        for tag, entry in waiting:
            item = self._sids.item_with_sid(tag, entry[10:])
            # An SID whose codebook is not on the topic any more has no item: the entry stays and waits.
            if item is not None:
                self._users_by_item.setdefault(item, set()).add(user)
                self._change_count_seen = -1


class HistoryReplacer:
    """Replaces histories in Redis, each only where no other writer changed it since it was read."""

    def __init__(self, store: redis.asyncio.Redis) -> None:
        self._store = store

    async def replace(self, values: Sequence[tuple[str, bytes, bytes]]) -> list[int]:
        """Implements `ReplaceHistories`. Raises RedisError."""
        if not values:
            return []
        calls = [REPLACE_IF_UNCHANGED.command([keys.history(user)], [old, new]) for user, old, new in values]
        return await run_pipeline(self._store, calls, REPLACE_IF_UNCHANGED)
