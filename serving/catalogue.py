"""The live catalogue: SIDs and active flags as they arrive from Kafka, and index snapshots built from them.

Every codebook on the topic has its table and its index, so that bundles of several codebooks answer side by
side. A history under one codebook is translated for a bundle of another: SID -> item -> SID.

Changes are cheap and happen on the event loop. A snapshot is sorted in a thread, on copies, and the finished
index replaces the one in service by one assignment. A new item is recommendable as soon as its SID and its
catalogue record are in a snapshot, in whichever order they came.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from registry.decoding.sid_index import SidIndex
from streams.events import CatalogItem, Event, SidAssignment
from streams.state.history import codebook_tag, pack_sid, unpack_sid
from streams.state.newest_codebook import NewestCodebook
from streams.state.translation import TranslateSid

log = logging.getLogger(__name__)

# Rows a table starts with and grows by doubling: a megabyte at most before the first item.
_FIRST_ROWS = 1024


class SidTable:
    """One codebook's SIDs: rows are only ever appended. (N, L) uint16 codes, (N,) active flags."""

    def __init__(self, levels: int) -> None:
        self.codes = np.zeros((_FIRST_ROWS, levels), dtype=np.uint16)
        self.active = np.zeros(_FIRST_ROWS, dtype=bool)
        self.item_ids: list[str] = []
        self.rows: dict[str, int] = {}
        self._item_by_sid: dict[tuple[int, ...], str] = {}

    def add(self, item_id: str, sid: tuple[int, ...], active: bool) -> bool:
        """Append an item; False where it has an SID already, or another item has this one (logged)."""
        if item_id in self.rows:
            if tuple(self.codes[self.rows[item_id]].tolist()) != sid:
                log.warning("item %s keeps its first SID, not %s: an SID is never moved", item_id, sid)
            return False
        if len(sid) != self.codes.shape[1]:
            log.warning("item %s: SID %s has not %d codes; left out", item_id, sid, self.codes.shape[1])
            return False
        owner = self._item_by_sid.setdefault(sid, item_id)
        if owner != item_id:
            log.warning("item %s: SID %s belongs to item %s; left out", item_id, sid, owner)
            return False
        row = len(self.item_ids)
        if row == len(self.codes):
            self.codes = np.concatenate((self.codes, np.zeros_like(self.codes)))
            self.active = np.concatenate((self.active, np.zeros_like(self.active)))
        self.codes[row], self.active[row] = sid, active
        self.item_ids.append(item_id)
        self.rows[item_id] = row
        return True

    def item_of(self, sid: tuple[int, ...]) -> str | None:
        """The item that has this SID."""
        return self._item_by_sid.get(sid)

    def sid(self, item_id: str) -> tuple[int, ...] | None:
        """The SID of an item."""
        row = self.rows.get(item_id)
        return None if row is None else tuple(self.codes[row].tolist())

    def snapshot_rows(self) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
        """The rows so far, safe to read in another thread."""
        size = len(self.item_ids)
        return self.codes[:size].copy(), self.active[:size].copy()


class ServingCatalogue:
    """SID tables by codebook, what is active, and the newest index of each codebook.

    Pass `on_sid` and `on_item` to TopicTables as callbacks; `run()` rebuilds the indexes of codebooks that
    changed. `on_build(codebook, seconds, items)` is called after each new index.
    """

    def __init__(self, delay_s: float, on_build: Callable[[str, float, int], None] = lambda *_: None) -> None:
        self._delay_s = delay_s
        self._on_build = on_build
        self._tables: dict[str, SidTable] = {}
        self._by_tag: dict[str, SidTable] = {}
        self._newest = NewestCodebook()
        self._active: dict[str, bool] = {}
        self._titles: dict[str, str] = {}
        self._indexes: dict[str, SidIndex] = {}
        self._changed: set[str] = set()
        self._wake = asyncio.Event()

    @property
    def newest(self) -> str | None:
        """The codebook that appeared last; its index is used while no bundle names a codebook."""
        return self._newest.codebook

    def on_sid(self, _key: str, event: Event | None) -> None:
        """Take an assignment that arrived. Deletions change nothing: the table is append-only."""
        if not isinstance(event, SidAssignment):
            return
        self._newest.observe(event)
        table = self._tables.get(event.codebook)
        if table is None:
            table = self._tables[event.codebook] = SidTable(len(event.sid))
            self._by_tag.setdefault(codebook_tag(event.codebook), table)
        if table.add(event.item_id, tuple(event.sid), self._active.get(event.item_id, False)):
            self._mark_changed(event.codebook)

    def on_item(self, key: str, event: Event | None) -> None:
        """Take a catalogue record that arrived; a deletion (None) makes the item inactive."""
        if isinstance(event, CatalogItem):
            self._titles[key] = event.title
        active = isinstance(event, CatalogItem) and event.active
        if self._active.get(key, False) == active:
            return
        self._active[key] = active
        for codebook, table in self._tables.items():
            row = table.rows.get(key)
            if row is not None:
                table.active[row] = active
                self._mark_changed(codebook)

    def index(self, codebook: str | None = None) -> SidIndex | None:
        """The newest index of a codebook (default: of the newest codebook); None before the first."""
        codebook_id = self.newest if codebook is None else codebook
        return self._indexes.get(codebook_id) if codebook_id else None

    def translator(self, codebook: str) -> TranslateSid:
        """Turns packed SIDs of any codebook into those of the same items under `codebook`.

        May be called from other threads: tables only grow, and an item is looked up once it is whole.
        """
        target = self._tables.get(codebook)

        def translate(tag: str, packed: bytes) -> bytes | None:
            source = self._by_tag.get(tag)
            if source is None or target is None:
                return None
            item = source.item_of(unpack_sid(packed))
            sid = None if item is None else target.sid(item)
            return None if sid is None else pack_sid(sid)

        return translate

    def title_of(self, item_id: str) -> str:
        """The newest title of an item, also of one that is no longer listed; empty where there is none."""
        return self._titles.get(item_id, "")

    def items(self) -> int:
        """How many items are active."""
        return sum(self._active.values())

    async def refresh(self) -> None:
        """Build the indexes of all codebooks that changed since the last one, in a thread."""
        changed, self._changed = self._changed, set()
        self._wake.clear()
        for codebook in sorted(changed):
            table = self._tables[codebook]
            codes, active = table.snapshot_rows()
            started = asyncio.get_running_loop().time()
            index = await asyncio.to_thread(_build, self._indexes.get(codebook), codes, active, table)
            self._indexes[codebook] = index
            self._on_build(codebook, asyncio.get_running_loop().time() - started, len(index))

    async def run(self) -> None:
        """Rebuild after changes until cancelled; a burst of changes is one rebuild."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(self._delay_s)
            await self.refresh()

    def _mark_changed(self, codebook: str) -> None:
        self._changed.add(codebook)
        self._wake.set()


def _build(
    old: SidIndex | None, codes: NDArray[np.uint16], active: NDArray[np.bool_], table: SidTable
) -> SidIndex:
    """A new index; where only active flags changed the old tree is kept, since rows are never moved."""
    if old is not None and len(old) == len(codes):
        return old.with_active(active)
    return SidIndex.build(codes, table.item_ids, active, table.rows)
