"""The SID of every item under every codebook, in memory and in Redis, from the topic `sids`.

One codebook is in use: histories and pairs are written under it. It is the newest one on the topic, from
the moment at which its SIDs have all come. It changes only where `follow` is called, so whoever calls that
between two pieces of work sees one codebook in each.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

import redis.asyncio

from streams.events import SidAssignment
from streams.settings import KafkaSettings
from streams.state import keys
from streams.state.history import codebook_tag, pack_sid
from streams.state.newest_codebook import NewestCodebook
from streams.wire.topic_table import TopicTable

log = logging.getLogger(__name__)

# After a codebook first appears, its table counts as whole once nothing was added for this long: whoever
# fitted it publishes thousands of SIDs in one go.
_SETTLE_S: Final = 1.0
# And in any case after this: where items are listed without a pause, nothing is ever quiet for a second.
_SETTLE_AT_MOST_S: Final = 60.0
_POLL_S: Final = 0.05
# Items a script call: some 0.5 ms of Redis's time.
_ITEMS_PER_CALL: Final = 500

# KEYS sids, slots | ARGV item, packed SID, item, packed SID ...
# Idempotent, and never over a slot that another item holds.
_MIRROR_SIDS: Final = """
for i = 1, #ARGV, 2 do
  if redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1]) == 1 then
    redis.call('HSETNX', KEYS[2], ARGV[i + 1], ARGV[i])
  end
end
return redis.status_reply('OK')
"""


class AssignedSids:
    """`get(item)` -> packed SID under the codebook in use; `translate` an SID of another one.

    `clock()`: seconds, by which a codebook's SIDs have all come.
    """

    def __init__(
        self, kafka: KafkaSettings, store: redis.asyncio.Redis, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._table = TopicTable(kafka, SidAssignment, self.see)
        self._clock = clock
        self._mirror = store.register_script(_MIRROR_SIDS)
        self._packed: dict[str, dict[str, bytes]] = {}
        # By tag; made where a codebook's SIDs are first translated, so that one codebook costs nothing.
        self._holders: dict[str, dict[bytes, str]] = {}
        self._newest = NewestCodebook()
        self._seen_at: dict[str, float] = {}
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
        if self.newest is not None:
            self._use(self.newest)

    async def stop(self) -> None:
        """Stop following the topic."""
        await self._table.stop()

    @property
    def newest(self) -> str | None:
        """The codebook that appeared last: the one in use, or the next one."""
        return self._newest.codebook

    @property
    def several(self) -> bool:
        """Whether SIDs of more than one codebook are known."""
        return len(self._packed) > 1

    def get(self, item_id: str) -> bytes | None:
        """Packed SID under the codebook in use; None: the item has none."""
        return self._packed[self.codebook].get(item_id) if self.codebook is not None else None

    def under(self, codebook: str) -> dict[str, bytes]:
        """Packed SIDs of one codebook by item."""
        return self._packed.get(codebook, {})

    def holder(self, tag: str, packed: bytes) -> str | None:
        """The item that has this SID under the codebook with this tag; None: nobody, or it is not known."""
        held = self._holders.get(tag)
        if held is None:
            named = [codebook for codebook in self._packed if codebook_tag(codebook) == tag]
            if not named:
                return None
            held = self._holders[tag] = {}
            for item_id, sid in self._packed[named[0]].items():
                held.setdefault(sid, item_id)
        return held.get(packed)

    def translate(self, tag: str, packed: bytes) -> bytes | None:
        """The SID under the codebook in use, of the item that has this one under another; None: none."""
        item = self.holder(tag, packed)
        return None if item is None else self.get(item)

    def follow(self) -> None:
        """Take the newest codebook into use, once its SIDs have come."""
        newest = self.newest
        if newest is not None and newest != self.codebook and self._has_settled(newest):
            self._use(newest)

    def whole_since_ms(self) -> int | None:
        """Wall clock (ms) from which the codebook in use covers the catalogue; None: not yet."""
        if self.codebook is None:
            return None
        if self._settled != self.codebook:
            if not self._has_settled(self.codebook):
                return None
            self._settled, self._settled_ms = self.codebook, time.time_ns() // 1_000_000
        return self._settled_ms

    async def refresh(self) -> None:
        """Return once everything that is on the topic now is known, and nothing more is coming in."""
        while True:
            await self._table.refresh()
            quiet = self._clock() - self._changed_at
            if quiet >= _SETTLE_S:
                return
            await asyncio.sleep(max(_POLL_S, _SETTLE_S - quiet))

    async def write(self) -> None:
        """Bring Redis up to what was read. Raises RedisError; the next call goes on where it failed."""
        while self._unwritten:
            chunk = self._unwritten[:_ITEMS_PER_CALL]
            by_codebook: dict[str, list[bytes | str]] = {}
            for event in chunk:
                by_codebook.setdefault(event.codebook, []).extend((event.item_id, pack_sid(event.sid)))
            for codebook, arguments in by_codebook.items():
                await self._mirror(keys=[keys.sids(codebook), keys.slots(codebook)], args=arguments)
            del self._unwritten[: len(chunk)]

    def see(self, _key: str, event: SidAssignment | None) -> None:
        """Take in a record of the topic; None: it was deleted."""
        if event is None:  # a deleted assignment: the slot stays taken, the item keeps its SID here
            return
        self._unwritten.append(event)
        self._newest.see(event)
        now = self._clock()
        self._seen_at.setdefault(event.codebook, now)
        known = self._packed.setdefault(event.codebook, {})
        if event.item_id in known:  # the first one counts, as in serving: an SID is never moved
            return
        packed = pack_sid(event.sid)
        known[event.item_id] = packed
        held = self._holders.get(codebook_tag(event.codebook))
        if held is not None:
            held.setdefault(packed, event.item_id)
        self._changed_at = now
        self.changes += 1
        # The first of all needs no moment of its own: nothing was written under another one.
        if self.codebook is None:
            self._use(event.codebook)

    def _has_settled(self, codebook: str) -> bool:
        now = self._clock()
        return now - self._changed_at >= _SETTLE_S or now - self._seen_at[codebook] >= _SETTLE_AT_MOST_S

    def _use(self, codebook: str) -> None:
        if codebook != self.codebook:
            log.info("SIDs of codebook %s are in use", codebook)
            self.codebook = codebook
            self.levels = len(next(iter(self._packed[codebook].values()))) // 2


def sid_codes(packed: bytes) -> Sequence[int]:
    """Codes of a packed SID as the wire has them."""
    return [int.from_bytes(packed[at : at + 2], "big") for at in range(0, len(packed), 2)]
