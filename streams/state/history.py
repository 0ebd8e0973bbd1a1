"""A user's recent interactions as packed bytes, and the one rule by which they change.

Layout 1, big-endian: version u8 | levels u8 | codebook tag 4 bytes | fence of clicks | fence of purchases |
entries. A fence is incarnation u32 | next offset u48. An entry is ts_ms u48 | kind u8 | event hash u24 |
codes u16 x levels; entries stand in ascending order of their bytes, so the newest is last.

Layout 2 has, between fences and entries, length u32 | entries that wait, each as codebook tag 4 bytes |
levels u8 | entry: those under another codebook, whose items have no SID under this one
(streams.state.translation).

Entries form a set: an equal entry is the same event. The newest `max_length` of them stay, and of those the
ones not older than `max_age` before the newest. Both bounds only ever drop from the old end, so any order of
the same events gives the same entries. The fence holds, for each source topic, the offset below which every
event of this user was applied; a topic that was made anew has another incarnation and starts again.

A change is only applied to a history under its own codebook: another one is brought over first, and loses
nothing by it (streams.state.translation).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib import resources
from typing import Final, NamedTuple

from streams.errors import SidstreamError
from streams.settings import HistorySettings
from streams.state.redisdb import RedisScript

VERSION: Final = 1
# The layout of a history with entries that wait.
WAITING: Final = 2
CLICK: Final = 1
CART: Final = 2
PURCHASE: Final = 3
KIND_CODES: Final = {"click": CLICK, "cart": CART, "purchase": PURCHASE}
SOURCE_TOPICS: Final = ("clicks", "purchases")

APPLY_CHANGES: Final = RedisScript(
    resources.files("streams.state").joinpath("history.lua").read_text(encoding="utf-8")
)

_FENCES_AT: Final = 6
_ENTRIES_AT: Final = 26
_NO_FENCE: Final = bytes(10)
# What the script answers for a history under another codebook, which it leaves as it is.
OTHER_CODEBOOK_RESULT: Final = [-1, 0]
_DAY_MS: Final = 86_400_000


class OffsetFence(NamedTuple):
    """Below `next_offset` of that incarnation of the topic, everything was applied."""

    incarnation: int
    next_offset: int


class HistoryEntry(NamedTuple):
    """One interaction: `ts` in ms, `kind` CLICK, CART or PURCHASE, 24-bit hash of the event's id, SID."""

    ts: int
    kind: int
    event_hash: int
    sid: tuple[int, ...]


class OtherCodebookError(Exception):
    """The history is under another codebook than the changes."""


class HistoryParts(NamedTuple):
    """A history's bytes, cut. `header`: layout, levels and tag; `waiting`: (tag, packed entry), ascending."""

    header: bytes
    fences: bytes
    waiting: list[tuple[str, bytes]]
    entries: list[bytes]


class HistoryChange(NamedTuple):
    """A packed entry and where it came from; `source` None: applied whatever the fence says."""

    source: str | None
    offset: int
    entry: bytes


@dataclass(frozen=True, slots=True)
class History:
    """A decoded history, entries oldest first; `codebook_tag` is the first 8 hex digits of its codebook.

    `waiting`: (codebook tag, entry) of those whose items have no SID under that codebook yet.
    """

    codebook_tag: str
    entries: list[HistoryEntry]
    fences: dict[str, OffsetFence] = field(default_factory=dict)
    waiting: list[tuple[str, HistoryEntry]] = field(default_factory=list)


def event_hash(event_id: str) -> bytes:
    """Three bytes that tell events of one user, kind and millisecond apart."""
    return blake2b(event_id.encode("utf-8", "surrogatepass"), digest_size=3).digest()


def pack_sid(sid: Sequence[int]) -> bytes:
    """Codes as u16, big-endian."""
    return struct.pack(f">{len(sid)}H", *sid)


def unpack_sid(packed: bytes) -> tuple[int, ...]:
    """The codes of a packed SID."""
    return struct.unpack(f">{len(packed) // 2}H", packed)


def pack_entry(ts: int, kind: int, event_id: str, packed_sid: bytes) -> bytes:
    """One entry: `ts` in ms, `kind` CLICK, CART or PURCHASE, the SID as pack_sid gives it."""
    return ts.to_bytes(6, "big") + bytes((kind,)) + event_hash(event_id) + packed_sid


def unpack_entry(entry: bytes) -> HistoryEntry:
    """The fields of a packed entry."""
    return HistoryEntry(
        int.from_bytes(entry[:6], "big"), entry[6], int.from_bytes(entry[7:10], "big"),
        unpack_sid(entry[10:]),
    )  # fmt: skip


def codebook_tag(codebook: str) -> str:
    """What a history keeps of a codebook's id: its first 8 hex digits."""
    return codebook[:8]


def header_of(codebook: str, levels: int) -> bytes:
    """The first six bytes of a history. Raises SidstreamError when the codebook's id is not hex."""
    try:
        tag = bytes.fromhex(codebook_tag(codebook))
    except ValueError:
        tag = b""
    if len(tag) != 4:
        raise SidstreamError(f"codebook id {codebook!r} does not start with 8 hex digits: fit it again")
    return bytes((VERSION, levels)) + tag


def script_arguments(
    changes: Iterable[HistoryChange], *, codebook: str, levels: int, incarnations: Mapping[str, int],
    bounds: HistorySettings,
) -> tuple[bytes, bytes, int, int, bytes]:  # fmt: skip
    """ARGV of the script; KEYS[1] is the history's key.

    The script returns [applied, skipped], or OTHER_CODEBOOK where nothing was done.
    """
    blob = b"".join(
        bytes((0 if c.source is None else SOURCE_TOPICS.index(c.source) + 1,))
        + c.offset.to_bytes(6, "big")
        + c.entry
        for c in changes
    )
    marks = b"".join(incarnations[source].to_bytes(4, "big") for source in SOURCE_TOPICS)
    return header_of(codebook, levels), marks, bounds.max_length, bounds.max_age_days * _DAY_MS, blob


def apply_changes(
    value: bytes | None, changes: Sequence[HistoryChange], *, codebook: str, levels: int,
    incarnations: Mapping[str, int], bounds: HistorySettings,
) -> tuple[bytes | None, int, int]:  # fmt: skip
    """The history after `changes`, how many were applied and how many the fence skipped.

    Equal to what the script writes, byte for byte. `value` None: no history yet. Raises OtherCodebook where
    the history is under another one, and SidstreamError on another layout version.
    """
    start = header_of(codebook, levels)
    stored = (
        HistoryParts(start, _NO_FENCE * len(SOURCE_TOPICS), [], []) if value is None else split_parts(value)
    )
    if stored.header[1:] != start[1:]:
        raise OtherCodebookError(stored.header[2:].hex())
    fences = {source: stored.fences[10 * i : 10 * i + 10] for i, source in enumerate(SOURCE_TOPICS)}
    entries = set(stored.entries)
    nexts: dict[str, int] = {}
    for topic, fence in fences.items():
        same = int.from_bytes(fence[:4], "big") == incarnations[topic]
        nexts[topic] = int.from_bytes(fence[4:], "big") if same else 0
    reached = dict(nexts)
    applied = skipped = 0
    for source, offset, entry in changes:
        if source is not None:
            if offset < nexts[source]:
                skipped += 1
                continue
            reached[source] = max(reached[source], offset + 1)
        applied += 1
        entries.add(entry)
    if not applied:
        return value, 0, skipped
    for topic in SOURCE_TOPICS:
        if reached[topic] > nexts[topic]:
            fences[topic] = incarnations[topic].to_bytes(4, "big") + reached[topic].to_bytes(6, "big")
    kept = keep_newest(sorted(entries), bounds)
    return join_parts(HistoryParts(start, b"".join(fences.values()), stored.waiting, kept)), applied, skipped


def keep_newest(entries: Sequence[bytes], bounds: HistorySettings) -> list[bytes]:
    """The entries, oldest first, that a history may hold; those of any codebooks."""
    kept = list(entries[-bounds.max_length :])
    if not kept:
        return kept
    oldest = int.from_bytes(kept[-1][:6], "big") - bounds.max_age_days * _DAY_MS
    return [entry for entry in kept if int.from_bytes(entry[:6], "big") >= oldest]


def split_parts(value: bytes) -> HistoryParts:
    """A history's parts. Raises SidstreamError on another layout version."""
    if value[0] not in (VERSION, WAITING):
        raise SidstreamError(
            f"a history has layout {value[0]}, this version reads {VERSION} and {WAITING}: "
            "replay the topics into an empty Redis"
        )
    waiting = []
    at = _ENTRIES_AT
    if value[0] == WAITING:
        end = at + 4 + int.from_bytes(value[at : at + 4], "big")
        at += 4
        while at < end:
            size = 10 + 2 * value[at + 4]
            waiting.append((value[at : at + 4].hex(), value[at + 5 : at + 5 + size]))
            at += 5 + size
    size = 10 + 2 * value[1]
    entries = [value[place : place + size] for place in range(at, len(value), size)]
    return HistoryParts(value[:_FENCES_AT], value[_FENCES_AT:_ENTRIES_AT], waiting, entries)


def join_parts(parts: HistoryParts) -> bytes:
    """The bytes of a history; layout 2 only where entries wait."""
    block = b"".join(
        bytes.fromhex(tag) + bytes(((len(entry) - 10) // 2,)) + entry for tag, entry in parts.waiting
    )
    layout = bytes((WAITING if block else VERSION,))
    sized = len(block).to_bytes(4, "big") + block if block else b""
    return layout + parts.header[1:] + parts.fences + sized + b"".join(parts.entries)


def decode_history(value: bytes | None) -> History:
    """Read a packed history; None is an empty one. Raises SidstreamError on another layout version."""
    if value is None:
        return History("", [])
    stored = split_parts(value)
    fences = {
        source: OffsetFence(
            int.from_bytes(stored.fences[10 * i : 10 * i + 4], "big"),
            int.from_bytes(stored.fences[10 * i + 4 : 10 * i + 10], "big"),
        )
        for i, source in enumerate(SOURCE_TOPICS)
    }
    waiting = [(tag, unpack_entry(entry)) for tag, entry in stored.waiting]
    return History(
        stored.header[2:].hex(), [unpack_entry(entry) for entry in stored.entries], fences, waiting
    )
