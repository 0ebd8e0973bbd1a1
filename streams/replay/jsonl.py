"""A file of events, one JSON object a line: `{"topic": "clicks", "value": {...}}`, or values of one topic."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import msgspec

from streams.errors import SidstreamError
from streams.events import BY_TOPIC, CatalogItem, Event, EventError, UserProfile, decode
from streams.replay.source import in_time_range
from streams.wire.records import KafkaRecord


class _Line(msgspec.Struct):
    topic: str
    value: msgspec.Raw


class JsonLines:
    """The events of a file. `topic`: of every line, where the lines do not name theirs."""

    def __init__(self, path: Path, topic: str | None = None) -> None:
        if topic is not None and topic not in BY_TOPIC:
            raise SidstreamError(f"topic {topic!r} is unknown: it is one of {', '.join(BY_TOPIC)}")
        self._path = path
        self._topic = topic

    def catalogue(self) -> Iterator[CatalogItem]:
        """The file's catalogue items."""
        return (event for event in self._events if isinstance(event, CatalogItem))

    def profiles(self) -> Iterator[UserProfile]:
        """Nothing: a file's profiles are among its events, in event time."""
        return iter(())

    def events(self, start: int | None = None, end: int | None = None) -> Iterator[Event]:
        """The file's other events in event time, ties in the file's order.

        Raises SidstreamError that names the first line which cannot be read.
        """
        return (
            event
            for event in self._events
            if not isinstance(event, CatalogItem) and in_time_range(event.ts, start, end)
        )

    def count(self, start: int | None = None, end: int | None = None) -> int:
        """How many events `events` gives."""
        return sum(1 for _ in self.events(start, end))

    def records(self) -> Iterator[KafkaRecord]:
        """Every line as it is, without a check, in the file's order, to try the effect of a bad event.

        The key is read from the value where possible, else it is empty.
        """
        for number, line in self._lines():
            topic, value = self._split(number, line)
            yield KafkaRecord(topic, _key(topic, value), value)

    @cached_property
    def _events(self) -> list[Event]:
        events = []
        for number, line in self._lines():
            topic, value = self._split(number, line)
            try:
                events.append(decode(BY_TOPIC[topic], value))
            except EventError as error:
                raise SidstreamError(
                    f"{self._path} line {number} is no event of {topic}: {error}; correct it, or send "
                    "the file as it is with --raw"
                ) from error
        events.sort(key=lambda event: event.ts)
        return events

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.strip()

    def _split(self, number: int, line: bytes) -> tuple[str, bytes]:
        if self._topic is not None:
            return self._topic, line
        try:
            parsed = msgspec.json.decode(line, type=_Line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise SidstreamError(
                f'{self._path} line {number} is not {{"topic": ..., "value": {{...}}}}: {error}; correct it, '
                "or name the lines' topic with --topic"
            ) from error
        if parsed.topic not in BY_TOPIC:
            raise SidstreamError(
                f"{self._path} line {number}: topic {parsed.topic!r} is unknown; "
                f"it is one of {', '.join(BY_TOPIC)}"
            )
        return parsed.topic, bytes(parsed.value)


def _key(topic: str, value: bytes) -> bytes:
    try:
        parsed = msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return b""
    fields = BY_TOPIC[topic].key_fields
    parts = [parsed.get(field) for field in fields] if isinstance(parsed, dict) else [None]
    return b"" if None in parts else "/".join(map(str, parts)).encode()
