"""Items of the catalogue -> SIDs: the nearest free slot of the frozen codebook, claimed in Redis.

Before there is a codebook, items only wait on their topic. `codebook fit` publishes the SIDs of all listed
items on `sids`, and makes the codebook current last. Then the agents read those SIDs, go once over the whole
catalogue for items without one, and from there on give every new item its SID as it comes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, Protocol

import redis.asyncio
from aiokafka import AIOKafkaProducer, TopicPartition

from agents.assigned_sids import AssignedSids, sid_codes
from agents.metrics import SIDS
from registry.bundles.codebook import Codebook
from registry.bundles.embedder import Embedder, item_text, load_embedder
from streams.errors import SidstreamError
from streams.events import CatalogItem, SidAssignment, encode
from streams.settings import KafkaSettings
from streams.state import keys
from streams.state.history import pack_sid
from streams.state.redisdb import RedisScript, run_pipeline
from streams.wire.batch_stage import BatchHooks, ReceivedEvent
from streams.wire.dead_letters import RefusedRecord
from streams.wire.records import partition_of
from streams.wire.topic_table import TopicTable

log = logging.getLogger(__name__)

# Items embedded, and their slots claimed, together.
_ITEMS_PER_CALL: Final = 500
# Slots offered for an item at a time; for nearly every item one of the first few is free.
_SLOTS_PER_OFFER: Final = 16

# KEYS sids, slots | ARGV per item: item, number of slots n, n packed SIDs, nearest first.
# Returns per item its SID from now on, or '' where every offered slot belongs to another item.
_CLAIM_SLOTS: Final = RedisScript("""
local result, i = {}, 1
while i <= #ARGV do
  local item, n = ARGV[i], tonumber(ARGV[i + 1])
  local sid = redis.call('HGET', KEYS[1], item)
  if not sid then
    sid = ''
    for s = i + 2, i + 1 + n do
      if redis.call('HSETNX', KEYS[2], ARGV[s], item) == 1 then
        sid = ARGV[s]
        redis.call('HSET', KEYS[1], item, sid)
        break
      end
    end
  end
  result[#result + 1] = sid
  i = i + 2 + n
end
return result
""")


class CodebookRegistry(Protocol):
    """The part of the registry that the allocator needs; the calls block."""

    def current_codebook(self) -> str | None: ...

    def codebook(self, id: str | None = None) -> Codebook: ...

    def encoder(self, codebook: str) -> Path: ...


class SidAllocator(BatchHooks):
    """The stage that reads `catalog`; between its batches it asks the registry for a new codebook."""

    name = "catalogue"

    def __init__(
        self, kafka: KafkaSettings, store: redis.asyncio.Redis, producer: AIOKafkaProducer,
        sids: AssignedSids, codebooks: CodebookRegistry, check_s: float,
    ) -> None:  # fmt: skip
        self._kafka = kafka
        self._producer = producer
        self._store = store
        self._sids = sids
        self._codebooks = codebooks
        self._embedder: Embedder | None = None
        self._check_s = check_s
        self._checked_at = float("-inf")
        self._change_count_seen = 0
        self._last_complaint = ""
        self._codebook: Codebook | None = None
        self._partitions: frozenset[int] = frozenset()
        self._covered_partitions: frozenset[int] = frozenset()

    async def apply(self, batch: Sequence[ReceivedEvent]) -> Sequence[RefusedRecord]:
        """Give new items their SID; an item that has one keeps it, also with another title."""
        if self._codebook is not None:
            # The newest record of an item in the batch: its title is the one to embed.
            newest = {event.item_id: event for _, event in batch if event is not None}
            await self._assign(self._codebook, newest.values())
        return ()

    async def on_assigned(self, partitions: frozenset[TopicPartition]) -> None:
        """Note the partitions; items of those that another worker had are checked once."""
        self._partitions = frozenset(p.partition for p in partitions)
        self._covered_partitions &= self._partitions

    async def on_tick(self) -> Sequence[RefusedRecord]:
        """Copy new SIDs to Redis; where a new codebook is current, give every item its SID under it."""
        await self._sids.mirror_to_redis()
        due = time.monotonic() - self._checked_at >= self._check_s
        # SIDs of another codebook than this one: it was just fitted, so do not wait.
        has_other_codebook = self._sids.newest is not None and (
            self._codebook is None or self._codebook.id != self._sids.newest
        )
        if due or (has_other_codebook and self._change_count_seen != self._sids.change_count):
            self._checked_at = time.monotonic()
            self._change_count_seen = self._sids.change_count
            await self._look_for_codebook()
        if self._codebook is not None and self._partitions - self._covered_partitions:
            await self._assign_missing(self._codebook)
        return ()

    async def _look_for_codebook(self) -> None:
        try:
            current = await asyncio.to_thread(self._codebooks.current_codebook)
            if current is None or (self._codebook is not None and self._codebook.id == current):
                return
            codebook = await asyncio.to_thread(self._codebooks.codebook, current)
            embedder = self._embedder
            if embedder is None or embedder.id != codebook.embedder:
                embedder = await asyncio.to_thread(load_embedder, codebook, self._codebooks.encoder)
        except SidstreamError as error:
            # Without the registry new items wait, and everything else goes on.
            if str(error) != self._last_complaint:
                log.warning("%s", error)
            self._last_complaint = str(error)
            return
        log.info("codebook %s is current", current)
        self._last_complaint = ""
        self._embedder = embedder
        self._codebook = codebook
        self._covered_partitions = frozenset()

    async def _assign_missing(self, codebook: Codebook) -> None:
        """Give a SID to every item of this worker's partitions that has none."""
        partitions = self._partitions
        # All SIDs that `codebook fit` published must be read before a slot counts as free.
        await self._sids.refresh()
        table = TopicTable(self._kafka, CatalogItem)
        await table.start()
        try:
            await table.wait_caught_up()
            count = len(table.next_offsets())
            own_items = [i for i in table.values() if partition_of(i.key, count) in partitions]
        finally:
            await table.stop()
        await self._assign(codebook, own_items)
        self._covered_partitions = partitions

    async def _assign(self, codebook: Codebook, items: Iterable[CatalogItem]) -> None:
        assigned = self._sids.sids_under(codebook.id)
        without_sid = [item for item in items if item.item_id not in assigned]
        if not without_sid:
            return
        await self._sids.mirror_to_redis()
        for start in range(0, len(without_sid), _ITEMS_PER_CALL):
            chunk = without_sid[start : start + _ITEMS_PER_CALL]
            claimed = await self._claim_slots(codebook, chunk)
            events = [
                SidAssignment.new(
                    event_id=f"sid-{codebook.id}-{item_id}"[:128],
                    item_id=item_id,
                    sid=sid_codes(packed),
                    codebook=codebook.id,
                )
                for item_id, packed in claimed.items()
            ]
            confirmations = [await self._producer.send(e.topic, encode(e), key=e.key) for e in events]
            await asyncio.gather(*confirmations)
            SIDS.inc(len(events))
            log.info("%d items were given SIDs", len(events))

    async def _claim_slots(self, codebook: Codebook, items: Sequence[CatalogItem]) -> dict[str, bytes]:
        assert self._embedder is not None
        vectors = await asyncio.to_thread(self._embedder.embed, [item_text(item) for item in items])
        offers = {i.item_id: codebook.candidates(v) for i, v in zip(items, vectors, strict=True)}
        claimed: dict[str, bytes] = {}
        while offers:
            arguments: list[str | bytes | int] = []
            for item_id, slots in offers.items():
                packed_sids = _next_offers(slots)
                if not packed_sids:
                    raise SidstreamError(
                        f"codebook {codebook.id} has no free slot for item {item_id}: "
                        "fit a larger one with `sidstream codebook fit --replace`"
                    )
                arguments += (item_id, len(packed_sids), *packed_sids)
            call = _CLAIM_SLOTS.command([keys.sids(codebook.id), keys.slots(codebook.id)], arguments)
            (results,) = await run_pipeline(self._store, [call], _CLAIM_SLOTS)
            for item_id, packed in zip(list(offers), results, strict=True):
                if packed:
                    claimed[item_id] = packed
                    del offers[item_id]
        return claimed


def _next_offers(slots: Iterator[tuple[int, ...]]) -> list[bytes]:
    return [pack_sid(sid) for sid in islice(slots, _SLOTS_PER_OFFER)]
