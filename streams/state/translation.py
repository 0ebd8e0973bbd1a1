"""A history under another codebook: old SID -> item -> new SID, and nothing is lost.

A new codebook gives every item another SID. A history is recoded entry by entry; time, kind and event hash
stay, and with them the order. An entry whose item has no SID under the new codebook waits: it stays in the
history unchanged, with the tag of its own codebook, and takes its place once the item has a SID. Recoding a
history twice is the same as once, and recoding it to another codebook and back gives the same entries.
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

# (tag of a codebook, packed SID under it) -> packed SID of the same item under the target codebook, if any.
TranslateSid = Callable[[str, bytes], bytes | None]

# KEYS history | ARGV expected value, new value. Returns 0 and changes nothing where the value is another one.
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
    target_tag = codebook_tag(codebook)
    entries: set[bytes] = set()
    waiting: list[tuple[bytes, str]] = []
    for tag, entry in _tagged_entries(stored):
        sid = entry[10:] if tag == target_tag else translate(tag, entry[10:])
        if sid is None:
            waiting.append((entry, tag))
        else:
            entries.add(entry[:10] + sid)
    # Bounded apart, so that waiting entries push out no translated one; sorted, as in every history.
    waiting_within_bounds = set(keep_newest([entry for entry, _ in sorted(waiting)], bounds))
    return join_parts(
        HistoryParts(
            header_of(codebook, levels),
            stored.fences,
            [(tag, entry) for entry, tag in sorted(set(waiting)) if entry in waiting_within_bounds],
            keep_newest(sorted(entries), bounds),
        )
    )


def entries_under(value: bytes | None, codebook: str, translate: TranslateSid) -> list[HistoryEntry]:
    """The entries of a history that have a SID under `codebook`, oldest first, without the others.

    Raises SidstreamError on another layout version.
    """
    if value is None:
        return []
    target_tag = codebook_tag(codebook)
    translated: set[bytes] = set()
    for tag, entry in _tagged_entries(split_parts(value)):
        sid = entry[10:] if tag == target_tag else translate(tag, entry[10:])
        if sid is not None:
            translated.add(entry[:10] + sid)
    return [unpack_entry(entry) for entry in sorted(translated)]


def needs_recoding(header: bytes, codebook: str) -> bool:
    """Whether the history with these first 6 bytes has entries to recode to `codebook`.

    False for no bytes (the history is deleted) and for another layout version.
    """
    if header[:1] == bytes((WAITING,)):
        return True
    return header[:1] == bytes((VERSION,)) and header[2:6].hex() != codebook_tag(codebook)


def _tagged_entries(stored: HistoryParts) -> list[tuple[str, bytes]]:
    own_tag = stored.header[2:].hex()
    return [*stored.waiting, *((own_tag, entry) for entry in stored.entries)]
