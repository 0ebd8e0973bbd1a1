"""What a log of the past offers: catalogue, profiles and events, each a pure function of the file."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec

from streams.events import CatalogItem, Event, UserProfile

MS_PER_DAY = 86_400_000


class EventSource(Protocol):
    """A log of the past. Reading it twice gives the same events, `event_id`s included."""

    def catalogue(self) -> Iterator[CatalogItem]:
        """Every item of the log, by the time of its first event."""

    def profiles(self) -> Iterator[UserProfile]:
        """Every user's attributes, by the time from which they hold; many logs have none."""

    def events(self, start: int | None = None, end: int | None = None) -> Iterator[Event]:
        """Events of start <= ts < end (ms since 1970 UTC) in event time, ties in the log's order."""

    def count(self, start: int | None = None, end: int | None = None) -> int:
        """How many events `events` gives."""


class TimedRow(Protocol):
    """What every row of a log has: its time, ms since 1970 UTC."""

    @property
    def ts(self) -> int: ...


class RowLog(ABC):
    """A log that gives one event a row."""

    @property
    @abstractmethod
    def _rows(self) -> Sequence[TimedRow]: ...

    def count(self, start: int | None = None, end: int | None = None) -> int:
        """How many events `events` gives."""
        return sum(in_time_range(row.ts, start, end) for row in self._rows)


def in_time_range(ts: int, start: int | None, end: int | None) -> bool:
    """True when start <= ts < end; None is no bound."""
    return (start is None or ts >= start) and (end is None or ts < end)


def catalogue_item(prefix: str, ts: int, **fields: Any) -> CatalogItem:
    """A catalogue item whose event_id is a hash of its content: the same content is the same event."""
    return CatalogItem.new(event_id=f"{prefix}-{_content_hash(fields)}", ts=ts, **fields)


def user_profile(prefix: str, ts: int, user_id: str, attributes: dict[str, str]) -> UserProfile:
    """A profile whose event_id is a hash of its content: the same content is the same event."""
    return UserProfile.new(
        event_id=f"{prefix}-{_content_hash([user_id, attributes])}",
        ts=ts,
        user_id=user_id,
        attributes=attributes,
    )


def collapse_spaces(text: str) -> str:
    """The text without surrounding, doubled or other than plain spaces."""
    return " ".join(text.split())


def simulated_commission(kind_name: str) -> float:
    """A commission rate of 2 to 15 %, in whole percents, that the name of an item's kind decides.

    Simulated, since none of these logs has commissions. Items of one kind have one rate, as in the tables of
    affiliate programmes.
    """
    hash_value = int.from_bytes(hashlib.blake2b(kind_name.casefold().encode(), digest_size=8).digest())
    return (2 + hash_value % 14) / 100


def _content_hash(content: Any) -> str:
    return hashlib.blake2b(msgspec.json.encode(content, order="sorted"), digest_size=8).hexdigest()


def user_item_sequences(source: EventSource) -> dict[str, list[str]]:
    """Every user's items, oldest first, repeats kept: clicks and purchases alike."""
    sequences: dict[str, list[str]] = {}
    for event in source.events():
        user, item = getattr(event, "user_id", None), getattr(event, "item_id", None)
        if user is not None and item is not None:
            sequences.setdefault(user, []).append(item)
    return sequences
