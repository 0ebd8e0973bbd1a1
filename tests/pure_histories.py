"""The histories that a file of purchases makes, by the pure function alone: no Kafka, no Redis, no agents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from streams import history
from streams.history import Change, pack_entry
from streams.records import partition_of
from streams.replay import OnlineRetail
from streams.settings import HistorySettings


def pure_histories(
    shop: OnlineRetail, sids: Mapping[str, bytes], codebook: str, levels: int,
    incarnations: Mapping[str, int], partitions: int,
) -> dict[str, bytes]:  # fmt: skip
    """{user: packed history}. `sids` are packed; `incarnations` those of the topics.

    Offsets are counted, not asked for: on a new topic the n-th purchase of a partition has offset n.
    """
    written: Counter[int] = Counter()
    changes: dict[str, list[Change]] = {}
    for event in shop.events():
        partition = partition_of(event.key, partitions)
        entry = pack_entry(event.ts, history.PURCHASE, event.event_id, sids[event.item_id])
        changes.setdefault(event.user_id, []).append(Change("purchases", written[partition], entry))
        written[partition] += 1
    made = {}
    for user, mine in changes.items():
        value, _, _ = history.apply(
            None, mine, codebook=codebook, levels=levels, incarnations=incarnations, bounds=HistorySettings()
        )
        assert value is not None
        made[user] = value
    return made
