"""A history under another codebook: old SID -> item -> new SID, and nothing is lost.

A new codebook gives every item another SID. A history is brought over entry by entry; time, kind and event
hash stay, and with them its order. An entry whose item has no SID under the new codebook waits: it stays in
the history as it is, with the tag of its own codebook, and takes its place once the item has one. Bringing a
history over twice is bringing it over once, and there and back again gives the same entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from streams.settings import HistorySettings
from streams.state.history import (
    VERSION,
    WAITING,
    HistoryEntry,
    HistoryParts,
    codebook_tag,
    header_of,
    join_parts,
    keep_newest,
    split_parts,
    unpack_entry,
)
from streams.state.redisdb import RedisScript

# (tag of a codebook, packed SID under it) -> packed SID of the same item under the codebook that is wanted.
TranslateSid = Callable[[str, bytes], bytes | None]

# KEYS history | ARGV expected value, new value. 0: somebody else changed it meanwhile, and nothing was done.
REPLACE_IF_UNCHANGED: Final = RedisScript("""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
""")


def recode_history(
    value: bytes, translate: TranslateSid, *, codebook: str, levels: int, bounds: HistorySettings
) -> bytes:
    """The history under `codebook`, whose SIDs have `levels` codes. Fences are kept.

    Raises SidstreamError on another layout version.
    """
    stored = split_parts(value)
    wanted = codebook_tag(codebook)
    entries: set[bytes] = set()
    waiting: list[tuple[bytes, str]] = []
    for tag, entry in _tagged_entries(stored):
        sid = entry[10:] if tag == wanted else translate(tag, entry[10:])
        if sid is None:
            waiting.append((entry, tag))
        else:
            entries.add(entry[:10] + sid)
    # Bounded apart: what waits may not push out what is known. In the order of all histories.
    kept = set(keep_newest([entry for entry, _ in sorted(waiting)], bounds))
    return join_parts(
        HistoryParts(
            header_of(codebook, levels),
            stored.fences,
            [(tag, entry) for entry, tag in sorted(set(waiting)) if entry in kept],
            keep_newest(sorted(entries), bounds),
        )
    )


def entries_under(value: bytes | None, codebook: str, translate: TranslateSid) -> list[HistoryEntry]:
    """The entries of a history that can be told under `codebook`, oldest first; the others are left out.

    Changes nothing. Raises SidstreamError on another layout version.
    """
    if value is None:
        return []
    wanted = codebook_tag(codebook)
    found: set[bytes] = set()
    for tag, entry in _tagged_entries(split_parts(value)):
        sid = entry[10:] if tag == wanted else translate(tag, entry[10:])
        if sid is not None:
            found.add(entry[:10] + sid)
    return [unpack_entry(entry) for entry in sorted(found)]


def needs_recoding(start: bytes, codebook: str) -> bool:
    """Whether the history with these first 6 bytes has anything to bring over to `codebook`.

    No bytes (the history is gone) and those of a layout that is not known here have nothing.
    """
    if start[:1] == bytes((WAITING,)):
        return True
    return start[:1] == bytes((VERSION,)) and start[2:6].hex() != codebook_tag(codebook)


def _tagged_entries(stored: HistoryParts) -> list[tuple[str, bytes]]:
    own = stored.header[2:].hex()
    return [*stored.waiting, *((own, entry) for entry in stored.entries)]
