"""An interaction log for tests, without a broker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from registry.hold_out import HoldOut
from streams.events import Event, Exploration, encode
from tests.tiny_explorations import T0
from trainer.log.interaction_log import INTERACTIONS, VALUES, InteractionLog
from trainer.log.window import TOPICS, Window

NOBODY = HoldOut(share=0.0)


class Logged:
    """A log that grows, without a broker: one partition, offsets in the order of adding."""

    def __init__(self, folder: Path) -> None:
        self.log = InteractionLog.open(folder)
        self.ends = dict.fromkeys(TOPICS, 0)
        self.since = dict(self.ends)

    def _append(self, topic: str, rows: list[tuple[Any, ...]], schema: Any) -> None:
        begin = self.ends[topic]
        self.ends[topic] += len(rows)
        columns = zip(*[(0, begin + at, *row) for at, row in enumerate(rows)], strict=True)
        arrays = [pa.array(list(column), kind.type) for column, kind in zip(columns, schema, strict=True)]
        table = pa.table(arrays, schema=schema)
        self.log.append(topic, 1, {0: (begin, self.ends[topic])}, table, 0)

    def clicks(self, *clicks: tuple[str | None, str, str, int], scene: str | None = None) -> None:
        """(request_id, user_id, item_id, milliseconds after T0) each."""
        rows = [
            (f"c{self.ends['clicks'] + at}", user, item, T0 + ts, "click", request, scene)
            for at, (request, user, item, ts) in enumerate(clicks)
        ]
        self._append("clicks", rows, INTERACTIONS)

    def purchases(self, *purchases: tuple[str, str, int]) -> None:
        """(user_id, item_id, milliseconds after T0) each."""
        rows = [
            (f"p{self.ends['purchases'] + at}", user, item, T0 + ts, "purchase", None, None)
            for at, (user, item, ts) in enumerate(purchases)
        ]
        self._append("purchases", rows, INTERACTIONS)

    def events(self, *events: Event) -> None:
        """Events of the topics that keep their bytes."""
        for event in events:
            self._append(event.topic, [(event.key, encode(event))], VALUES)

    def tombstone(self, topic: str, key: str) -> None:
        """The record that deletes a key."""
        self._append(topic, [(key.encode(), None)], VALUES)

    def explorations(self, *explorations: Exploration) -> None:
        self.events(*explorations)

    def window(self) -> Window:
        """From where the last window ended."""
        ranges = {topic: {0: (self.since[topic], end)} for topic, end in self.ends.items()}
        self.since = dict(self.ends)
        return Window(self.log, ranges, dict.fromkeys(TOPICS, 1))
