"""A user's recent interactions as packed bytes, and the one rule by which they change.

Layout 1, big-endian: version u8 | levels u8 | codebook tag 4 bytes | fence of clicks | fence of purchases |
entries. A fence is incarnation u32 | next offset u48. An entry is ts_ms u48 | kind u8 | event hash u24 |
codes u16 x levels; entries stand in ascending order of their bytes, so the newest is last.

Layout 2 has, between fences and entries, length u32 | waiting entries, each as codebook tag 4 bytes |
levels u8 | entry: those under another codebook, whose items have no SID under this one
(streams.state.translation).

Entries form a set: an equal entry is the same event. The newest `max_length` of them stay, and of those the
ones not older than `max_age` before the newest. Both bounds only drop the oldest entries, so any order of the
same events gives the same entries. The fence holds, for each source topic, the offset below which every event
of this user is applied; a topic that is deleted and created again has another incarnation and starts again.

A change is only applied to a history under its own codebook: a history under another one is recoded first,
and loses nothing by that (streams.state.translation).
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
# The layout of a history with waiting entries.
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
# The script's reply for a history under another codebook, which it does not change.
OTHER_CODEBOOK_RESULT: Final = [-1, 0]
_DAY_MS: Final = 86_400_000


class OffsetFence(NamedTuple):
    """All offsets below `next_offset` of this incarnation of the topic are applied."""

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
    """A history's bytes by part. `header`: layout, levels, tag; `waiting`: (tag, packed entry), ascending."""

    header: bytes
    fences: bytes
    waiting: list[tuple[str, bytes]]
    entries: list[bytes]


class HistoryChange(NamedTuple):
    """A packed entry, its source topic and offset; `source` None: no fence skips it."""

    source: str | None
    offset: int
    entry: bytes


@dataclass(frozen=True, slots=True)
class History:
    """A decoded history, entries oldest first; `codebook_tag` is the first 8 hex digits of its codebook.

    `waiting`: (codebook tag, entry) of entries whose items have no SID under this codebook yet.
    """

    codebook_tag: str
    entries: list[HistoryEntry]
    fences: dict[str, OffsetFence] = field(default_factory=dict)
    waiting: list[tuple[str, HistoryEntry]] = field(default_factory=list)


def event_hash(event_id: str) -> bytes:
    """Three bytes that distinguish events of one user, kind and millisecond."""
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
    """The part of a codebook's id that a history stores: its first 8 hex digits."""
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

    The script returns [applied, skipped], or OTHER_CODEBOOK_RESULT where it changed nothing.
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
    """The history after `changes`, the number of applied ones, and of those that the fence skipped.

    Equal to what the script writes, byte for byte. `value` None: no history yet. Raises OtherCodebookError
    where the history is under another one, and SidstreamError on another layout version.
    """
    header = header_of(codebook, levels)
    no_fences = _NO_FENCE * len(SOURCE_TOPICS)
    stored = HistoryParts(header, no_fences, [], []) if value is None else split_parts(value)
    if stored.header[1:] != header[1:]:
        raise OtherCodebookError(stored.header[2:].hex())
    fences = {source: stored.fences[10 * i : 10 * i + 10] for i, source in enumerate(SOURCE_TOPICS)}
    entries = set(stored.entries)
    next_offsets: dict[str, int] = {}
    for topic, fence in fences.items():
        is_same_incarnation = int.from_bytes(fence[:4], "big") == incarnations[topic]
        next_offsets[topic] = int.from_bytes(fence[4:], "big") if is_same_incarnation else 0
    next_after = dict(next_offsets)
    applied = skipped = 0
    for source, offset, entry in changes:
        if source is not None:
            if offset < next_offsets[source]:
                skipped += 1
                continue
            next_after[source] = max(next_after[source], offset + 1)
        applied += 1
        entries.add(entry)
    if not applied:
        return value, 0, skipped
    for topic in SOURCE_TOPICS:
        if next_after[topic] > next_offsets[topic]:
            fences[topic] = incarnations[topic].to_bytes(4, "big") + next_after[topic].to_bytes(6, "big")
    bounded = keep_newest(sorted(entries), bounds)
    parts = HistoryParts(header, b"".join(fences.values()), stored.waiting, bounded)
    return join_parts(parts), applied, skipped


def keep_newest(entries: Sequence[bytes], bounds: HistorySettings) -> list[bytes]:
    """The entries within the bounds, of those given oldest first; they may be of several codebooks."""
    newest = list(entries[-bounds.max_length :])
    if not newest:
        return newest
    oldest = int.from_bytes(newest[-1][:6], "big") - bounds.max_age_days * _DAY_MS
    return [entry for entry in newest if int.from_bytes(entry[:6], "big") >= oldest]


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
    """The bytes of a history; layout 2 only where it has waiting entries."""
    block = b"".join(
        bytes.fromhex(tag) + bytes(((len(entry) - 10) // 2,)) + entry for tag, entry in parts.waiting
    )
    layout = bytes((WAITING if block else VERSION,))
    waiting_block = len(block).to_bytes(4, "big") + block if block else b""
    return layout + parts.header[1:] + parts.fences + waiting_block + b"".join(parts.entries)


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
