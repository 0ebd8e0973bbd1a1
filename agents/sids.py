"""The SID of every item under the codebook in use, in memory and in Redis, from the topic `sids`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Final

import redis.asyncio

from streams import keys
from streams.events import SidAssignment
from streams.history import pack_sid
from streams.settings import KafkaSettings
from streams.tables import TopicTable

log = logging.getLogger(__name__)

# After a codebook first appears, its table counts as whole once nothing was added for this long: whoever
# fitted it publishes thousands of SIDs in one go.
_SETTLE_S: Final = 1.0
_POLL_S: Final = 0.05
# Items a script call: some 0.5 ms of Redis's time.
_CHUNK: Final = 500

# KEYS sids, slots | ARGV item, packed SID, item, packed SID ...
# Idempotent, and never over a slot that another item holds.
_MIRROR: Final = """
for i = 1, #ARGV, 2 do
  if redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1]) == 1 then
    redis.call('HSETNX', KEYS[2], ARGV[i + 1], ARGV[i])
  end
end
return redis.status_reply('OK')
"""


class Sids:
    """`get(item)` -> packed SID under the codebook in use, which is the one that appeared last on `sids`."""

    def __init__(self, kafka: KafkaSettings, store: redis.asyncio.Redis) -> None:
        self._table = TopicTable(kafka, SidAssignment, self._on_change)
        self._mirror = store.register_script(_MIRROR)
        self._packed: dict[str, dict[str, bytes]] = {}
        self._first_ts: dict[str, int] = {}
        self._unwritten: list[SidAssignment] = []
        self._changed_at = 0.0
        self._settled: str | None = None
        self._settled_ms = 0
        self.codebook: str | None = None
        self.levels = 0
        self.changes = 0

    async def start(self) -> None:
        """Read the topic from its beginning; return when it is read."""
        await self._table.start()
        await self._table.wait_caught_up()

    async def stop(self) -> None:
        """Stop following the topic."""
        await self._table.stop()

    def get(self, item_id: str) -> bytes | None:
        """Packed SID under the codebook in use; None: the item has none."""
        return self._packed[self.codebook].get(item_id) if self.codebook is not None else None

    def under(self, codebook: str) -> dict[str, bytes]:
        """Packed SIDs of one codebook by item."""
        return self._packed.get(codebook, {})

    def whole_since_ms(self) -> int | None:
        """Wall clock (ms) from which the codebook in use covers the catalogue; None: not yet."""
        if self.codebook is None:
            return None
        if self._settled != self.codebook:
            if time.monotonic() - self._changed_at < _SETTLE_S:
                return None
            self._settled, self._settled_ms = self.codebook, time.time_ns() // 1_000_000
        return self._settled_ms

    async def refresh(self) -> None:
        """Return once everything that is on the topic now is known, and nothing more is coming in."""
        while True:
            await self._table.refresh()
            quiet = time.monotonic() - self._changed_at
            if quiet >= _SETTLE_S:
                return
            await asyncio.sleep(max(_POLL_S, _SETTLE_S - quiet))

    async def write(self) -> None:
        """Bring Redis up to what was read. Raises RedisError; the next call goes on where it failed."""
        while self._unwritten:
            chunk = self._unwritten[:_CHUNK]
            by_codebook: dict[str, list[bytes | str]] = {}
            for event in chunk:
                by_codebook.setdefault(event.codebook, []).extend((event.item_id, pack_sid(event.sid)))
            for codebook, arguments in by_codebook.items():
                await self._mirror(keys=[keys.sids(codebook), keys.slots(codebook)], args=arguments)
            del self._unwritten[: len(chunk)]

    def _on_change(self, item_id: str, event: SidAssignment | None) -> None:
        if event is None:  # a deleted assignment: the slot stays taken, the item keeps its SID here
            return
        self._unwritten.append(event)
        known = self._packed.setdefault(event.codebook, {})
        packed = pack_sid(event.sid)
        if known.get(item_id) == packed:
            return
        known[item_id] = packed
        self._changed_at = time.monotonic()
        self.changes += 1
        first = min(event.ts, self._first_ts.get(event.codebook, event.ts))
        self._first_ts[event.codebook] = first
        # By first appearance: a straggling assignment under the old codebook must not bring that one back.
        newest = max(self._first_ts, key=lambda codebook: (self._first_ts[codebook], codebook))
        if newest != self.codebook:
            log.info("SIDs of codebook %s are in use", newest)
            self.codebook = newest
            self.levels = len(next(iter(self._packed[newest].values()))) // 2


def as_list(packed: bytes) -> Sequence[int]:
    """Codes of a packed SID as the wire has them."""
    return [int.from_bytes(packed[at : at + 2], "big") for at in range(0, len(packed), 2)]
