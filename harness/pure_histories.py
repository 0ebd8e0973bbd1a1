"""The histories that events make, by the pure function alone: no Redis, no agents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from harness.servers import read_all
from streams.events import Click, Purchase, decode
from streams.replay import OnlineRetail
from streams.settings import HistorySettings, KafkaSettings
from streams.state import history
from streams.state.history import Change, pack_entry
from streams.wire.admin import incarnations
from streams.wire.records import partition_of


def pure_histories(
    shop: OnlineRetail, sids: Mapping[str, bytes], codebook: str, levels: int,
    topic_incarnations: Mapping[str, int], partitions: int,
) -> dict[str, bytes]:  # fmt: skip
    """{user: packed history}. `sids` are packed; `topic_incarnations`: the incarnation of each topic.

    Offsets are counted, not read from Kafka: on a new topic the n-th purchase of a partition has offset n.
    """
    written: Counter[int] = Counter()
    changes: dict[str, list[Change]] = {}
    for event in shop.events():
        partition = partition_of(event.key, partitions)
        entry = pack_entry(event.ts, history.PURCHASE, event.event_id, sids[event.item_id])
        changes.setdefault(event.user_id, []).append(Change("purchases", written[partition], entry))
        written[partition] += 1
    return _apply_changes(changes, codebook, levels, topic_incarnations)


def replayed_histories(
    kafka: KafkaSettings, sids: Mapping[str, bytes], codebook: str, levels: int
) -> dict[str, bytes]:
    """{user: packed history} of all clicks and purchases that are on Kafka. `sids` are packed."""
    changes: dict[str, list[Change]] = {}
    for kind in (Click, Purchase):
        for record in read_all(kafka, kind.topic):
            event: Any = decode(kind, record.value)
            code = history.KINDS[event.kind] if isinstance(event, Click) else history.PURCHASE
            entry = pack_entry(event.ts, code, event.event_id, sids[event.item_id])
            changes.setdefault(event.user_id, []).append(Change(kind.topic, record.offset, entry))
    current = incarnations(kafka)
    return _apply_changes(changes, codebook, levels, {source: current[source] for source in history.SOURCES})


def _apply_changes(
    changes: Mapping[str, list[Change]], codebook: str, levels: int, topic_incarnations: Mapping[str, int]
) -> dict[str, bytes]:
    histories = {}
    for user, user_changes in changes.items():
        history_bytes, _, _ = history.apply(
            None,
            user_changes,
            codebook=codebook,
            levels=levels,
            incarnations=topic_incarnations,
            bounds=HistorySettings(),
        )
        assert history_bytes is not None
        histories[user] = history_bytes
    return histories
