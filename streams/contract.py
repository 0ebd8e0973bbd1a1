"""The published contract: JSON Schema and AsyncAPI documents made from the event types and the topics.

The files in docs/reference are this module's output (`sidstream contract`); a test fails when they drift.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from streams.events import EVENTS, SCHEMA_VERSION, Event
from streams.settings import KafkaSettings
from streams.wire.topics import TopicSpec, all_topics

DIALECT = "https://json-schema.org/draft/2020-12/schema"
# The topics that an application around the recommender writes; it reads the others.
PRODUCER_TOPICS = ("clicks", "impressions", "purchases", "triggers", "catalog", "users")
# Versions of the specification and of its Kafka bindings.
_ASYNCAPI, _BINDING = "3.0.0", "0.5.0"


def schema(kind: type[Event]) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of one event. Fields that it does not name are allowed."""
    return {
        "$schema": DIALECT,
        "$id": f"urn:sidstream:{kind.topic}:{SCHEMA_VERSION}",
        "title": kind.__name__,
        **_single_line_descriptions(msgspec.json.schema(kind)),
    }


def asyncapi(kafka: KafkaSettings) -> dict[str, Any]:
    """The AsyncAPI 3.0 document, seen from an application that uses sidstream."""
    _, schemas = msgspec.json.schema_components(EVENTS, ref_template="#/components/schemas/{name}")
    specs = all_topics(kafka)
    return {
        "asyncapi": _ASYNCAPI,
        "info": {
            "title": "sidstream",
            "version": f"{SCHEMA_VERSION}.0.0",
            "description": (
                "Events that an application exchanges with sidstream over Kafka. Values are one JSON object, "
                "UTF-8; unknown fields are ignored. Keys are UTF-8 text, and producers partition by Java's "
                "murmur2 of the key (librdkafka: partitioner=murmur2_random)."
            ),
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "kafka": {
                "host": "{bootstrap}",
                "protocol": "kafka",
                "description": "Apache Kafka 4; `sidstream status` prints the local stack's address",
                "variables": {
                    "bootstrap": {"default": "localhost:9092", "description": "host:port of a broker"}
                },
            }
        },
        "channels": {topic.name: _channel(topic, kafka) for topic in specs},
        "operations": {_operation_id(topic): _operation(topic) for topic in specs},
        "components": {
            "schemas": _single_line_descriptions(schemas),
            "messages": {topic.event.__name__: _message(topic) for topic in specs},
        },
    }


def _single_line_descriptions(schema: Any) -> Any:
    """The schema with each description on one line: Python 3.13 cuts docstrings' indents, 3.11 keeps them."""
    if isinstance(schema, list):
        return [_single_line_descriptions(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: " ".join(value.split())
        if key == "description" and isinstance(value, str)
        else _single_line_descriptions(value)
        for key, value in schema.items()
    }


def _summary(kind: type[Event]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _channel(topic: TopicSpec, kafka: KafkaSettings) -> dict[str, Any]:
    configuration: dict[str, Any] = {"max.message.bytes": int(topic.configs["max.message.bytes"])}
    configuration["cleanup.policy"] = [topic.configs["cleanup.policy"]]
    if "retention.ms" in topic.configs:
        configuration["retention.ms"] = int(topic.configs["retention.ms"])
    name = topic.event.__name__
    return {
        "address": topic.name,
        "description": _summary(topic.event),
        "servers": [{"$ref": "#/servers/kafka"}],
        "messages": {name: {"$ref": f"#/components/messages/{name}"}},
        "bindings": {
            "kafka": {
                "topic": topic.name,
                "partitions": topic.partitions,
                "replicas": kafka.replication,
                "topicConfiguration": configuration,
                "bindingVersion": _BINDING,
            }
        },
    }


def _message(topic: TopicSpec) -> dict[str, Any]:
    kind = topic.event
    message: dict[str, Any] = {
        "name": kind.__name__,
        "title": kind.__name__,
        "summary": _summary(kind),
        "contentType": "application/json",
        "payload": {"$ref": f"#/components/schemas/{kind.__name__}"},
        "bindings": {
            "kafka": {
                "key": {"type": "string", "description": f"the event's {kind.key_name()}, UTF-8"},
                "bindingVersion": _BINDING,
            }
        },
    }
    if topic.name in ("triggers", "recommendations"):
        message["correlationId"] = {
            "location": "$message.payload#/request_id",
            "description": "an answer carries its trigger's request_id",
        }
    return message


def _operation_id(topic: TopicSpec) -> str:
    return f"{'send' if topic.name in PRODUCER_TOPICS else 'receive'}-{topic.name}"


def _operation(topic: TopicSpec) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "action": "send" if topic.name in PRODUCER_TOPICS else "receive",
        "channel": {"$ref": f"#/channels/{topic.name}"},
        "summary": _summary(topic.event),
        "messages": [{"$ref": f"#/channels/{topic.name}/messages/{topic.event.__name__}"}],
    }
    if topic.name == "triggers":
        operation["reply"] = {
            "channel": {"$ref": "#/channels/recommendations"},
            "messages": [{"$ref": "#/channels/recommendations/messages/Recommendation"}],
        }
    return operation


def documents(kafka: KafkaSettings) -> dict[str, dict[str, Any]]:
    """Every document of the contract by its path below docs/reference."""
    schemas = {f"schemas/{kind.topic}.json": schema(kind) for kind in EVENTS}
    return {**schemas, "asyncapi.json": asyncapi(kafka)}


def write_documents(kafka: KafkaSettings, folder: Path) -> list[Path]:
    """Write the documents below `folder`; return their paths."""
    paths = []
    for name, document in documents(kafka).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        paths.append(path)
    return paths
