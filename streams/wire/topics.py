"""The topics with their partitions, cleanup policy and retention, so that no broker default applies."""

from __future__ import annotations

from dataclasses import dataclass

from streams import events
from streams.settings import KafkaSettings

# Log compaction only touches closed segments: an hour bounds how long superseded records stay.
_COMPACT_SEGMENT_MS = 3_600_000


@dataclass(frozen=True)
class TopicSpec:
    """One topic: its event type, number of partitions and configuration."""

    name: str
    event: type[events.Event]
    partitions: int
    configs: dict[str, str]

    @property
    def compacted(self) -> bool:
        """True where the topic keeps only the newest record of a key."""
        return self.configs["cleanup.policy"] == "compact"


_COMPACTED = frozenset({"catalog", "users", "sids", "rollout"})
# One partition: a total order of releases.
_SINGLE = frozenset({"rollout"})


def all_topics(kafka: KafkaSettings) -> tuple[TopicSpec, ...]:
    """All topics of the product, under the settings."""
    specs = []
    for event in events.EVENTS:
        max_bytes = kafka.max_event_bytes
        if event is events.DeadLetter:
            # A dead letter carries a whole record of another topic, in base64.
            max_bytes *= 2
        configs = {"max.message.bytes": str(max_bytes)}
        if kafka.replication >= 3:
            # A confirmation by all replicas in sync must mean more than one replica.
            configs["min.insync.replicas"] = "2"
        if event.topic in _COMPACTED:
            configs |= {"cleanup.policy": "compact", "segment.ms": str(_COMPACT_SEGMENT_MS)}
        else:
            # Retention counts from arrival: by CreateTime a replay of an old year would expire at once.
            configs |= {
                "cleanup.policy": "delete",
                "retention.ms": str(kafka.retention_days * 86_400_000),
                "message.timestamp.type": "LogAppendTime",
            }
        partitions = 1 if event.topic in _SINGLE else kafka.partitions
        specs.append(TopicSpec(event.topic, event, partitions, configs))
    return tuple(specs)
