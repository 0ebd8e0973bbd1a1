"""Whether a trigger on Kafka would be answered, read from Kafka's topics and groups without sending one."""

from __future__ import annotations

from kafka.errors import GroupIdNotFoundError, KafkaError

from streams.errors import SidstreamError
from streams.events import Recommendation, Trigger
from streams.settings import KafkaSettings
from streams.wire.admin import admin_client


def waiting_for(kafka: KafkaSettings, group: str) -> str | None:
    """What is missing before group `group` answers triggers, with the remedy; None: nothing.

    Raises SidstreamError when no broker answers.
    """
    with admin_client(kafka) as client:
        try:
            existing_topics = {topic["name"] for topic in client.describe_topics()}
            members = client.describe_groups([group])[group]["members"]
        except GroupIdNotFoundError:
            members = []
        except KafkaError as error:
            raise SidstreamError(
                f"Kafka does not tell about group {group} ({type(error).__name__}); try again"
            ) from error
    missing_topics = sorted({Trigger.topic, Recommendation.topic} - existing_topics)
    if missing_topics:
        return f"no topic {missing_topics[0]}: create it with `sidstream topics create`"
    # An agent joins when its tables are read and its bundle is loaded, so a member is one that answers.
    if not members:
        return "no serving agent has joined: start one with `sidstream serving`, or wait for its bundle"
    return None
