"""The rollout that is in service now, from the topic `rollout`."""

from __future__ import annotations

from streams.events import Rollout
from streams.settings import KafkaSettings
from streams.wire.topic_reader import read_newest_events


def current_rollout(kafka: KafkaSettings, name: str) -> Rollout | None:
    """The rollout that recommender `name` is in, or None before its first."""
    return read_newest_events(kafka, Rollout).get(name)
