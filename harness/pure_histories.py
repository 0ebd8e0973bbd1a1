"""The histories that events make, by the pure function alone: no Redis, no agents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from streams.events import Click, Purchase, decode
from streams.replay import OnlineRetail
from streams.settings import HistorySettings, KafkaSettings
from streams.state import history
from streams.state.history import HistoryChange, pack_entry
from streams.wire.admin import incarnations
from streams.wire.records import partition_of
from streams.wire.topic_reader import read_records


def pure_histories(
    shop: OnlineRetail, sids: Mapping[str, bytes], codebook: str, levels: int,
    topic_incarnations: Mapping[str, int], partitions: int,
) -> dict[str, bytes]:  # fmt: skip
    """{user: packed history}. `sids` are packed; `topic_incarnations`: the incarnation of each topic.

    Offsets are counted, not read from Kafka: on a new topic the n-th purchase of a partition has offset n.
    """
    written: Counter[int] = Counter()
    changes: dict[str, list[HistoryChange]] = {}
    for event in shop.events():
        partition = partition_of(event.key, partitions)
        entry = pack_entry(event.ts, history.PURCHASE, event.event_id, sids[event.item_id])
        changes.setdefault(event.user_id, []).append(HistoryChange("purchases", written[partition], entry))
        written[partition] += 1
    return _apply_changes(changes, codebook, levels, topic_incarnations)


def replayed_histories(
    kafka: KafkaSettings, sids: Mapping[str, bytes], codebook: str, levels: int
) -> dict[str, bytes]:
    """{user: packed history} of all clicks and purchases that are on Kafka. `sids` are packed."""
    changes: dict[str, list[HistoryChange]] = {}
    for kind in (Click, Purchase):
        for record in read_records(kafka, kind.topic):
            event: Any = decode(kind, record.value)
            code = history.KIND_CODES[event.kind] if isinstance(event, Click) else history.PURCHASE
            entry = pack_entry(event.ts, code, event.event_id, sids[event.item_id])
            changes.setdefault(event.user_id, []).append(HistoryChange(kind.topic, record.offset, entry))
    topic_incarnations = incarnations(kafka)
    return _apply_changes(
        changes, codebook, levels, {source: topic_incarnations[source] for source in history.SOURCE_TOPICS}
    )


def _apply_changes(
    changes: Mapping[str, list[HistoryChange]],
    codebook: str,
    levels: int,
    topic_incarnations: Mapping[str, int],
) -> dict[str, bytes]:
    histories = {}
    for user, user_changes in changes.items():
        history_bytes, _, _ = history.apply_changes(
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
