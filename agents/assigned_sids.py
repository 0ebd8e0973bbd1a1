"""The SID of every item under every codebook, in memory and in Redis, from the topic `sids`.

One codebook is in use: histories and pairs are written under it. It is the newest one on the topic, once its
SIDs are complete. It changes only in `switch_to_newest`: a caller of that between two pieces of work sees one
codebook in each of them.
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
from streams.state.redisdb import RedisScript, run_pipeline
from streams.wire.topic_table import TopicTable

log = logging.getLogger(__name__)

# A new codebook's SIDs count as complete once no SID came for this long: `codebook fit` publishes thousands
# of them in one go.
_QUIET_S: Final = 1.0
# Also complete after this: where items are listed without a pause, the topic is never quiet for a second.
_COMPLETE_AFTER_S: Final = 60.0
_POLL_S: Final = 0.05
# Items in one script call: about 0.5 ms of Redis's time.
_ITEMS_PER_CALL: Final = 500

# KEYS sids, slots | ARGV item, packed SID, item, packed SID ...
# Idempotent, and never over a slot that another item holds.
_MIRROR_SIDS: Final = RedisScript("""
for i = 1, #ARGV, 2 do
  if redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1]) == 1 then
    redis.call('HSETNX', KEYS[2], ARGV[i + 1], ARGV[i])
  end
end
return redis.status_reply('OK')
""")


class AssignedSids:
    """SIDs by item, items by SID, and which codebook is in use.

    `clock()`: monotonic seconds; they decide when a codebook's SIDs are complete.
    """

    def __init__(
        self, kafka: KafkaSettings, store: redis.asyncio.Redis, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._table = TopicTable(kafka, SidAssignment, self.add_record)
        self._clock = clock
        self._store = store
        self._sids_by_codebook: dict[str, dict[str, bytes]] = {}
        # By codebook tag; filled at the first translation of that codebook's SIDs.
        self._items_by_sid: dict[str, dict[bytes, str]] = {}
        self._newest = NewestCodebook()
        self._first_seen_at: dict[str, float] = {}
        self._not_mirrored: list[SidAssignment] = []
        self._last_change_at = 0.0
        self._complete_codebook: str | None = None
        self._complete_since_ms = 0
        self.codebook: str | None = None
        self.levels = 0
        self.change_count = 0

    async def start(self) -> None:
        """Read the topic from its beginning; return when it is read."""
        await self._table.start()
        await self._table.wait_caught_up()
        if self.newest is not None:
            self._switch_to(self.newest)

    async def stop(self) -> None:
        """Stop following the topic."""
        await self._table.stop()

    @property
    def newest(self) -> str | None:
        """The newest codebook on the topic: the one in use, or the next one."""
        return self._newest.codebook

    @property
    def has_several_codebooks(self) -> bool:
        """Whether the topic has SIDs of more than one codebook."""
        return len(self._sids_by_codebook) > 1

    def get(self, item_id: str) -> bytes | None:
        """Packed SID under the codebook in use; None: the item has none."""
        return self._sids_by_codebook[self.codebook].get(item_id) if self.codebook is not None else None

    def sids_under(self, codebook: str) -> dict[str, bytes]:
        """Packed SIDs of one codebook by item."""
        return self._sids_by_codebook.get(codebook, {})

    def item_with_sid(self, tag: str, packed: bytes) -> str | None:
        """The item that has this packed SID under the codebook with this tag; None: there is none."""
        items_by_sid = self._items_by_sid.get(tag)
        if items_by_sid is None:
            codebooks = [codebook for codebook in self._sids_by_codebook if codebook_tag(codebook) == tag]
            if not codebooks:
                return None
            items_by_sid = self._items_by_sid[tag] = {}
            for item_id, sid in self._sids_by_codebook[codebooks[0]].items():
                items_by_sid.setdefault(sid, item_id)
        return items_by_sid.get(packed)

    def translate(self, tag: str, packed: bytes) -> bytes | None:
        """The packed SID, under the codebook in use, of the item that has `packed` under codebook `tag`."""
        item = self.item_with_sid(tag, packed)
        return None if item is None else self.get(item)

    def switch_to_newest(self) -> None:
        """Use the newest codebook from now on, if its SIDs are complete."""
        newest = self.newest
        if newest is not None and newest != self.codebook and self._is_complete(newest):
            self._switch_to(newest)

    def complete_since_ms(self) -> int | None:
        """Wall clock (ms) since which the SIDs of the codebook in use are complete; None: they are not."""
        if self.codebook is None:
            return None
        if self._complete_codebook != self.codebook:
            if not self._is_complete(self.codebook):
                return None
            self._complete_codebook, self._complete_since_ms = self.codebook, time.time_ns() // 1_000_000
        return self._complete_since_ms

    async def refresh(self) -> None:
        """Return once all SIDs on the topic are read and no more come in."""
        while True:
            await self._table.refresh()
            quiet_s = self._clock() - self._last_change_at
            if quiet_s >= _QUIET_S:
                return
            await asyncio.sleep(max(_POLL_S, _QUIET_S - quiet_s))

    async def mirror_to_redis(self) -> None:
        """Copy the SIDs that were read to Redis. Raises RedisError; the next call goes on where it failed."""
        while self._not_mirrored:
            chunk = self._not_mirrored[:_ITEMS_PER_CALL]
            by_codebook: dict[str, list[bytes | str]] = {}
            for event in chunk:
                by_codebook.setdefault(event.codebook, []).extend((event.item_id, pack_sid(event.sid)))
            for codebook, arguments in by_codebook.items():
                call = _MIRROR_SIDS.command([keys.sids(codebook), keys.slots(codebook)], arguments)
                await run_pipeline(self._store, [call], _MIRROR_SIDS)
            del self._not_mirrored[: len(chunk)]

    def add_record(self, _key: str, event: SidAssignment | None) -> None:
        """Add one record of the topic; event None: the key was deleted."""
        if event is None:  # the slot stays taken and the item keeps its SID
            return
        self._not_mirrored.append(event)
        self._newest.observe(event)
        now = self._clock()
        self._first_seen_at.setdefault(event.codebook, now)
        sids = self._sids_by_codebook.setdefault(event.codebook, {})
        if event.item_id in sids:  # the first SID counts, as in serving: an SID is never moved
            return
        packed = pack_sid(event.sid)
        sids[event.item_id] = packed
        items_by_sid = self._items_by_sid.get(codebook_tag(event.codebook))
        if items_by_sid is not None:
            items_by_sid.setdefault(packed, event.item_id)
        self._last_change_at = now
        self.change_count += 1
        # The first codebook is in use at once: nothing is written under another one.
        if self.codebook is None:
            self._switch_to(event.codebook)

    def _is_complete(self, codebook: str) -> bool:
        now = self._clock()
        return (
            now - self._last_change_at >= _QUIET_S or now - self._first_seen_at[codebook] >= _COMPLETE_AFTER_S
        )

    def _switch_to(self, codebook: str) -> None:
        if codebook != self.codebook:
            log.info("SIDs of codebook %s are in use", codebook)
            self.codebook = codebook
            self.levels = len(next(iter(self._sids_by_codebook[codebook].values()))) // 2


def sid_codes(packed: bytes) -> Sequence[int]:
    """The codes of a packed SID, as events carry them."""
    return [int.from_bytes(packed[at : at + 2], "big") for at in range(0, len(packed), 2)]
