"""The topics: partitions, cleanup policy and retention, stated, never left to a broker's defaults."""

from __future__ import annotations

from dataclasses import dataclass

from streams import events
from streams.settings import KafkaSettings

# Log compaction only touches closed segments: an hour bounds how long superseded records stay.
_COMPACT_SEGMENT_MS = 3_600_000


@dataclass(frozen=True)
class TopicSpec:
    """One topic: what it carries, how it is cut and how long it is kept."""

    name: str
    event: type[events.Event]
    partitions: int
    configs: dict[str, str]

    @property
    def compacted(self) -> bool:
        """True where only the newest record of a key is kept."""
        return self.configs["cleanup.policy"] == "compact"


_COMPACTED = frozenset({"catalog", "users", "sids", "rollout"})
# One partition: a total order of releases.
_SINGLE = frozenset({"rollout"})


def all_topics(kafka: KafkaSettings) -> tuple[TopicSpec, ...]:
    """All topics of the product, as the settings want them."""
    made = []
    for event in events.EVENTS:
        limit = kafka.max_event_bytes
        if event is events.DeadLetter:
            # It carries a whole record of another topic, in base64.
            limit *= 2
        configs = {"max.message.bytes": str(limit)}
        if kafka.replication >= 3:
            # Confirmed by all that are in sync must mean more than one.
            configs["min.insync.replicas"] = "2"
        if event.topic in _COMPACTED:
            configs |= {"cleanup.policy": "compact", "segment.ms": str(_COMPACT_SEGMENT_MS)}
        else:
            # CreateTime would let a replay of an old year expire at once: retention counts arrival.
            configs |= {
                "cleanup.policy": "delete",
                "retention.ms": str(kafka.retention_days * 86_400_000),
                "message.timestamp.type": "LogAppendTime",
            }
        partitions = 1 if event.topic in _SINGLE else kafka.partitions
        made.append(TopicSpec(event.topic, event, partitions, configs))
    return tuple(made)
