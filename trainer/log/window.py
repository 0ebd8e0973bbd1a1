"""The trainer's window: topics read by offsets into the log, from its end to the ends at this moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from aiokafka import TopicPartition

from registry.bundles.context import Attributes, Context, Counts, count_values
from registry.bundles.prompt import Sid
from registry.hold_out import HoldOut
from streams import events
from streams.settings import KafkaSettings
from streams.state import profile
from streams.wire.admin import incarnations, missing_topic_error, offset_spans
from streams.wire.topic_reader import read_ranges
from trainer.log.interaction_log import INTERACTIONS, VALUES, InteractionLog, Offsets, Ranges
from trainer.log.pair_filter import FilteredPairs, newest_of_each_scheme, withdraw_contradicted
from trainer.sequences.held_out import without_validation_users
from trainer.sequences.interactions import Interactions, TrainingCatalogue, user_sequences

TOPICS = ("clicks", "purchases", "preferences", "explorations", "catalog", "users", "sids")
# Compacted topics: a record without a value removes its key.
_KEYED = ("catalog", "users", "sids")
# Rows in memory before a file is written: a year of a shop is one file, and a large backlog still fits.
_FILE_ROWS = 1_000_000


class _TimeAndUser(msgspec.Struct):
    ts: int
    user_id: str


@dataclass(frozen=True)
class Window:
    """What one cycle trains on: everything that was logged up to its ends, and which part of it is new."""

    log: InteractionLog
    ranges: Ranges  # {topic: {partition: (from, to)}}, from where the parent's window ended
    incarnations: dict[str, int]

    def _read(self, topic: str) -> tuple[pa.Table, Any]:
        since = {partition: begin for partition, (begin, _) in self.ranges[topic].items()}
        until = {partition: end for partition, (_, end) in self.ranges[topic].items()}
        return self.log.read(topic, since, self.incarnations[topic], until)

    def count_new(self) -> int:
        """Clicks and purchases that are new, repeats included."""
        return sum(
            end - begin for topic in ("clicks", "purchases") for begin, end in self.ranges[topic].values()
        )

    def user_sequences(
        self,
        catalogue: TrainingCatalogue,
        context: Context | None = None,
        profiles: Mapping[str, Attributes] | None = None,
    ) -> Interactions:
        """Users' sequences in event time over all that was logged; an event that repeats counts once.

        With `context` each has the tokens of its own scene, and of its user's profile among `profiles`.
        """
        users: list[str] = []
        scenes: list[str | None] = []
        items: list[str] = []
        stamps: list[int] = []
        fresh: list[bool] = []
        bought: list[bool] = []
        # At one millisecond a purchase follows the click that led to it.
        for topic in ("clicks", "purchases"):
            table, new = self._read(topic)
            first_records = _first_of_each_event(table)
            if len(first_records) < table.num_rows:
                table, new = table.take(pa.array(first_records, pa.int64())), new[first_records]
            users += table["user_id"].to_pylist()
            scenes += table["scene"].to_pylist()
            items += table["item_id"].to_pylist()
            stamps += table["ts"].to_pylist()
            fresh += new.tolist()
            bought += [topic == "purchases"] * table.num_rows
        context_tokens = (context or Context()).rows(scenes, users, profiles or {})
        return user_sequences(users, stamps, items, catalogue, fresh, bought, context_tokens)

    def profiles(self) -> dict[str, Attributes]:
        """The attributes of each user: of the newest record by its time, as the agents keep them."""
        table, _ = self._read("users")
        decoder = msgspec.json.Decoder(events.UserProfile)
        newest: dict[str, events.UserProfile] = {}
        for key, value in zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True):
            if value is None:
                newest.pop(key.decode(errors="replace"), None)
                continue
            record = decoder.decode(value)
            newest_record = newest.get(record.user_id)
            if newest_record is None or profile.newest_order_key(record) >= profile.newest_order_key(
                newest_record
            ):
                newest[record.user_id] = record
        return {user: profile_record.attributes for user, profile_record in newest.items()}

    def context_counts(self, profiles: Mapping[str, Attributes], hold_out: HoldOut) -> Counts:
        """How many clicks each scene has, and how many users with an event have each attribute.

        Validation users do not count.
        """
        clicks, purchases = (
            _without_validation_users(self._read(topic)[0], hold_out) for topic in ("clicks", "purchases")
        )
        scenes = {group["values"]: group["counts"] for group in clicks["scene"].value_counts().to_pylist()}
        scenes.pop(None, None)
        users = {user for table in (clicks, purchases) for user in table["user_id"].unique().to_pylist()}
        return count_values(scenes, (profiles[user] for user in sorted(users & profiles.keys())))

    def preference_pairs(
        self, window_ms: int, codebook: str, schemes: Container[events.Scheme], max_pairs: int,
        hold_out: HoldOut, max_validation_pairs: int = 0,
    ) -> tuple[FilteredPairs, FilteredPairs]:  # fmt: skip
        """The newest `max_pairs` pairs of a codebook, from old windows too, in equal shares of `schemes`.

        Each once, without what purchases and clicks in the log contradict. `window_ms` is the attribution
        window that the agents made them with. The first are to learn from, and none of them is a validation
        user's; the second are validation users', `max_validation_pairs` at most.
        """
        table, _ = self._read("preferences")
        decoder = msgspec.json.Decoder(events.PreferencePair)
        decoded = (decoder.decode(value) for value in table["value"].to_pylist())
        of_codebook = [pair for pair in decoded if pair.codebook == codebook]
        of_schemes = [pair for pair in of_codebook if pair.scheme in schemes]
        learned, validation = without_validation_users(of_schemes, lambda pair: pair.user_id, hold_out)
        purchases, clicks = self._read("purchases")[0], self._read("clicks")[0]
        # A pair that repeats or is withdrawn is not replaced by an older one: that would be one more rule.
        filtered, filtered_validation = (
            withdraw_contradicted(newest_of_each_scheme(pairs, limit), purchases, clicks, window_ms)
            for pairs, limit in ((learned, max_pairs), (validation, max_validation_pairs))
        )
        other_schemes = len(of_codebook) - len(of_schemes)
        return replace(filtered, of_other_schemes=other_schemes), filtered_validation

    def explorations(self, horizon_ms: int, hold_out: HoldOut) -> list[tuple[events.Exploration, bool]]:
        """Explorations whose click window closed in this window, each request once: was its item clicked?

        A click window closes when the newest click is `horizon_ms` or more after the answer; a click that is
        later than that does not count, so that a reward never changes again. One that was logged before
        this window, and was open then, is of this window: each counts in one. Those to validation users are
        of all windows: nothing is learned from them, and so they judge each model anew.
        """
        clicks, new = self._read("clicks")
        stamps = clicks["ts"].to_numpy()
        newest_click, newest_earlier_click = int(stamps.max(initial=0)), int(stamps[~new].max(initial=0))
        table, fresh = self._read("explorations")
        short_decoder, decoder = msgspec.json.Decoder(_TimeAndUser), msgspec.json.Decoder(events.Exploration)
        closed: dict[str, events.Exploration] = {}
        for value, is_new in zip(table["value"].to_pylist(), fresh.tolist(), strict=True):
            short = short_decoder.decode(value)
            closes = short.ts + horizon_ms
            of_window = is_new or closes > newest_earlier_click
            if closes <= newest_click and (of_window or hold_out.has(short.user_id)):
                exploration = decoder.decode(value)
                # An answer may be sent twice. Its draw is the same, its event_id need not be.
                closed.setdefault(exploration.request_id, exploration)
        clicks_of_requests = clicks.filter(
            pc.is_in(clicks["request_id"], value_set=pa.array(list(closed), pa.string()))
        )
        clicked = set()
        columns = (
            clicks_of_requests[name].to_pylist() for name in ("request_id", "user_id", "item_id", "ts")
        )
        for request, user, item, ts in zip(*columns, strict=True):
            exploration = closed[request]
            if (user, item) == (
                exploration.user_id,
                exploration.item_id,
            ) and ts <= exploration.ts + horizon_ms:
                clicked.add(request)
        return [(exploration, request in clicked) for request, exploration in closed.items()]

    def catalogue_records(self) -> dict[str, events.CatalogItem]:
        """The newest record of each item."""
        decoder = msgspec.json.Decoder(events.CatalogItem)
        return {item: decoder.decode(value) for item, value in self._newest("catalog").items()}

    def sids(self, codebook: str) -> dict[str, Sid]:
        """Each item's SID under a codebook; the first one counts, as everywhere."""
        table, _ = self._read("sids")
        decoder = msgspec.json.Decoder(events.SidAssignment)
        sids: dict[str, Sid] = {}
        for value in table["value"].to_pylist():
            assigned = decoder.decode(value) if value is not None else None
            if assigned is not None and assigned.codebook == codebook:
                sids.setdefault(assigned.item_id, tuple(assigned.sid))
        return sids

    def _newest(self, topic: str) -> dict[str, bytes]:
        table, _ = self._read(topic)
        newest: dict[str, bytes] = {}
        for key, value in zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True):
            name = key.decode(errors="replace")
            if value is None:
                newest.pop(name, None)
            else:
                newest[name] = value
        return newest


def _without_validation_users(table: pa.Table, hold_out: HoldOut) -> pa.Table:
    users = table["user_id"].unique()
    learned, _ = without_validation_users(users.to_pylist(), lambda user: user, hold_out)
    return table.filter(pc.is_in(table["user_id"], value_set=pa.array(learned, pa.string())))


def _first_of_each_event(table: pa.Table) -> list[int]:
    """Rows of the first record of each event_id, ascending: an event may be sent more than once."""
    first: dict[str, int] = {}
    for row, event_id in enumerate(table["event_id"].to_pylist()):
        first.setdefault(event_id, row)
    return list(first.values())


class _TopicBuffer:
    """Records of one topic on their way into a file."""

    def __init__(self, topic: str, incarnation: int, begin: Offsets) -> None:
        self.topic, self.incarnation = topic, incarnation
        self.kind = events.BY_TOPIC[topic]
        self.columnar = topic in ("clicks", "purchases")
        self.schema = INTERACTIONS if self.columnar else VALUES
        self.begin, self.end = dict(begin), dict(begin)
        self.columns: list[list[Any]] = [[] for _ in self.schema]
        self.refused = 0

    def add(self, partition: int, record: Any, now_ms: int) -> None:
        self.end[partition] = record.offset + 1
        try:
            if self.columnar:
                event: Any = events.decode(self.kind, record.value, now_ms)
                kind = event.kind if self.topic == "clicks" else "purchase"
                row = (
                    partition, record.offset, event.event_id, event.user_id, event.item_id, event.ts, kind,
                    event.request_id, event.scene if self.topic == "clicks" else None,
                )  # fmt: skip
            else:
                if record.value is not None or self.topic not in _KEYED:
                    events.decode(self.kind, record.value, now_ms)
                row = (partition, record.offset, record.key or b"", record.value)  # type: ignore[assignment]
        except events.EventError:
            # The agents put such a record into dead letters with its reason; here it is only counted.
            self.refused += 1
            return
        for column, value in zip(self.columns, row, strict=True):
            column.append(value)

    def flush(self, log: InteractionLog) -> None:
        window = {number: (self.begin[number], self.end[number]) for number in self.begin}
        if all(begin == end for begin, end in window.values()):
            return
        arrays = [pa.array(column, kind.type) for column, kind in zip(self.columns, self.schema, strict=True)]
        log.append(self.topic, self.incarnation, window, pa.table(arrays, schema=self.schema), self.refused)
        self.begin = dict(self.end)
        self.columns = [[] for _ in self.schema]
        self.refused = 0


async def _read_into_log(
    buffers: dict[str, _TopicBuffer], kafka: KafkaSettings, log: InteractionLog,
    ranges: Mapping[TopicPartition, tuple[int, int]], advance: Callable[[int], None] | None,
) -> None:  # fmt: skip
    """Read the ranges into the buffers, and the buffers into the log."""
    async for at, records in read_ranges(kafka, ranges):
        now_ms = time.time_ns() // 1_000_000
        buffer = buffers[at.topic]
        for record in records:
            buffer.add(at.partition, record, now_ms)
        if advance:
            advance(len(records))
        if len(buffer.columns[0]) >= _FILE_ROWS:
            buffer.flush(log)
    for at, (_, end) in ranges.items():
        # Compaction leaves gaps: the last record may lie below the end that was read.
        buffers[at.topic].end[at.partition] = end
    for buffer in buffers.values():
        buffer.flush(log)


def read_window(
    kafka: KafkaSettings,
    log: InteractionLog,
    parent: Mapping[str, Mapping[int, tuple[int, int]]] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Window:
    """Log what Kafka has beyond the log's end, up to the ends at this moment, and say what is new.

    `parent` is the window of the model that training goes on from: what lies before its end is old. A topic
    that was made again since then is new as a whole. `advance(n)` is called for every n records read. Raises
    SidstreamError when the broker does not answer or a topic is missing.
    """
    now = offset_spans(kafka)
    lives = incarnations(kafka)
    buffers: dict[str, _TopicBuffer] = {}
    unread: dict[TopicPartition, tuple[int, int]] = {}
    ranges: Ranges = {}
    for topic in TOPICS:
        if topic not in now:
            raise missing_topic_error(topic)
        logged = log.ends(topic, lives[topic])
        begin = {number: max(logged.get(number, 0), span.begin) for number, span in now[topic].items()}
        buffers[topic] = _TopicBuffer(topic, lives[topic], begin)
        for number, span in now[topic].items():
            if begin[number] < span.end:
                unread[TopicPartition(topic, number)] = (begin[number], span.end)
        before = (parent or {}).get(topic, {})
        ranges[topic] = {}
        for number, span in now[topic].items():
            old = before.get(number, (0, 0))[1]
            ranges[topic][number] = (old if old <= span.end else 0, span.end)
    asyncio.run(_read_into_log(buffers, kafka, log, unread, advance))
    return Window(log, ranges, {topic: lives[topic] for topic in TOPICS})
