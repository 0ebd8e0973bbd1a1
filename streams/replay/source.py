"""What a log of the past offers: its catalogue and its events, each a pure function of the file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

import msgspec

from streams.events import CatalogItem, Event

MS_PER_DAY = 86_400_000


class Source(Protocol):
    """A log of the past. Reading it twice gives the same events, `event_id`s included."""

    def catalogue(self) -> Iterator[CatalogItem]:
        """Every item that the log knows, by the time at which it was first seen."""

    def events(self, start: int | None = None, end: int | None = None) -> Iterator[Event]:
        """Events of start <= ts < end (ms since 1970 UTC) in event time, ties in the log's order."""

    def count(self, start: int | None = None, end: int | None = None) -> int:
        """How many events `events` gives."""


def inside(ts: int, start: int | None, end: int | None) -> bool:
    """True when start <= ts < end; None is no bound."""
    return (start is None or ts >= start) and (end is None or ts < end)


def listed(prefix: str, ts: int, **fields: Any) -> CatalogItem:
    """A catalogue item whose event_id is a hash of its content: the same content is the same event."""
    content = hashlib.blake2b(msgspec.json.encode(fields, order="sorted"), digest_size=8).hexdigest()
    return CatalogItem.new(event_id=f"{prefix}-{content}", ts=ts, **fields)


def tidy(text: str) -> str:
    """The text without surrounding, doubled or other than plain spaces."""
    return " ".join(text.split())


def past_of(source: Source) -> dict[str, list[str]]:
    """Every user's items, oldest first, repeats kept: clicks and purchases alike."""
    past: dict[str, list[str]] = {}
    for event in source.events():
        user, item = getattr(event, "user_id", None), getattr(event, "item_id", None)
        if user is not None and item is not None:
            past.setdefault(user, []).append(item)
    return past
