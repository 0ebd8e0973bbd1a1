"""The published contract is the one that the program keeps: files, schemas and types say the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from streams.contract import PRODUCER_TOPICS, asyncapi, documents, schema, write_documents
from streams.events import BY_TOPIC, EVENTS, EventError, decode
from streams.settings import KafkaSettings
from streams.wire.topics import all_topics

REFERENCE = Path(__file__).resolve().parents[3] / "docs" / "reference"
HEAD = {"schema_version": 1, "event_id": "e-1", "ts": 1_767_225_600_000}
# Written by hand from the contract's words, every optional field set.
EXAMPLES: dict[str, dict[str, Any]] = {
    "clicks": {**HEAD, "user_id": "u", "item_id": "i", "kind": "cart", "request_id": "r", "scene": "home"},
    "impressions": {**HEAD, "user_id": "u", "item_ids": ["i", "j"], "request_id": "r", "scene": None},
    "purchases": {
        **HEAD, "user_id": "u", "item_id": "i", "price": 2.5, "quantity": 3, "order_id": "o",
        "request_id": None,
    },
    "triggers": {
        **HEAD, "request_id": "r", "user_id": "u", "item_id": "i", "scene": "page", "k": 5, "exclude": ["j"],
        "reply_to": "my.answers", "preferences": {"price": 1, "commission": 0.5, "click": 0},
    },
    "recommendations": {
        **HEAD, "request_id": "r", "user_id": "u", "items": [{"item_id": "i", "sid": [1, 2], "score": -0.5}],
        "bundle": "b", "arm": "champion", "trial": "t", "fallback": "popular", "scene": "s",
        "trigger_item_id": "j", "conditions": {"price": 7},
    },
    "explorations": {
        **HEAD, "request_id": "r", "user_id": "u", "item_id": "i", "propensity": 0.25, "chosen": 1,
        "candidates": [[1, 2], [1, 3]], "scores": [-0.5, -1.5], "temperature": 1.0, "prompt": [[5, 6]],
        "codebook": "c", "bundle": "b", "arm": "champion", "trial": "t", "context": {"scene": "s"},
    },
    "preferences": {
        **HEAD, "user_id": "u", "scheme": "clicked_over_shown", "codebook": "c", "chosen_item": "i",
        "chosen": [1, 2], "rejected_items": ["j"], "rejected": [[3, 4]], "history": [[5, 6]],
        "trigger": [7, 8], "request_id": "r", "scene": "s",
    },
    "catalog": {
        **HEAD, "item_id": "i", "title": "A thing", "category": "things", "brand": "b", "price": 1,
        "commission_rate": 0.1, "active": False,
    },
    "users": {**HEAD, "user_id": "u", "attributes": {"country": "Japan"}},
    "sids": {**HEAD, "item_id": "i", "sid": [1, 2, 65535], "codebook": "c"},
    "rollout": {
        **HEAD, "name": "main", "action": "trial", "trial": "t", "salt": "s", "step": 0.1,
        "arms": [{"name": "champion", "bundle": "b", "weight": 0.5, "version": "1"}],
        "decision": {"any": [1]},
    },
    "dead-letters": {
        **HEAD, "source": "clicks", "partition": 0, "offset": 7, "key_base64": None, "value_base64": "e30=",
        "stage": "histories", "reason": "invalid_field", "detail": "d", "attempt": 2,
    },
}  # fmt: skip
JSON_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-10, 70_000), st.floats(-2, 2), st.text(max_size=3),
    st.just("x" * 129), st.just([]), st.just(["a"]), st.just([[1]]), st.just([{}]), st.just({}),
    st.just({"a": "b"}), st.just({"a": 1}), st.just({"price": 1}), st.just({"price": 0}),
    st.just("a b"), st.just("a b\n"),
)  # fmt: skip


def validator(topic: str) -> Draft202012Validator:
    json_schema = schema(BY_TOPIC[topic])
    Draft202012Validator.check_schema(json_schema)
    return Draft202012Validator(json_schema)


VALIDATORS = {topic: validator(topic) for topic in BY_TOPIC}


def accepted(topic: str, fields: object) -> tuple[bool, bool]:
    """Whether the types take it, and whether the schema does."""
    try:
        decode(BY_TOPIC[topic], json.dumps(fields).encode())
        by_types = True
    except EventError:
        by_types = False
    # Through JSON once: that is what the schema is about.
    return by_types, VALIDATORS[topic].is_valid(json.loads(json.dumps(fields)))


def test_the_files_are_what_the_types_say(tmp_path: Path) -> None:
    written = write_documents(KafkaSettings(), tmp_path)
    generated = {path.relative_to(tmp_path) for path in written}
    committed = {path.relative_to(REFERENCE) for path in REFERENCE.rglob("*.json")}
    assert committed == generated, "run `sidstream contract docs/reference`"
    for path in generated:
        assert (REFERENCE / path).read_text() == (tmp_path / path).read_text(), (
            f"docs/reference/{path} is not what the types say: run `sidstream contract docs/reference`"
        )


def test_a_changed_type_changes_a_document() -> None:
    assert documents(KafkaSettings()) != documents(KafkaSettings(partitions=8))


@pytest.mark.parametrize("topic", BY_TOPIC)
def test_a_full_example_is_accepted_by_schema_and_types(topic: str) -> None:
    assert accepted(topic, EXAMPLES[topic]) == (True, True)


@pytest.mark.parametrize("topic", BY_TOPIC)
def test_fields_that_nobody_knows_are_allowed(topic: str) -> None:
    assert accepted(topic, {**EXAMPLES[topic], "our_own": {"deep": [1]}}) == (True, True)


@pytest.mark.parametrize("topic", BY_TOPIC)
def test_the_schema_requires_what_the_types_require(topic: str) -> None:
    for field in EXAMPLES[topic]:
        without = {name: value for name, value in EXAMPLES[topic].items() if name != field}
        by_types, by_schema = accepted(topic, without)
        assert by_types == by_schema, field
    assert accepted(topic, {**EXAMPLES[topic], "schema_version": 2}) == (False, False)
    assert accepted(topic, {**EXAMPLES[topic], "ts": 1_767_225_600}) == (False, False)
    assert accepted(topic, []) == (False, False)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_what_the_types_refuse_the_schema_refuses_and_the_other_way_round(data: st.DataObject) -> None:
    topic = data.draw(st.sampled_from(sorted(BY_TOPIC)))
    fields = copy.deepcopy(EXAMPLES[topic])
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(JSON_VALUES)
    by_types, by_schema = accepted(topic, fields)
    assert by_types == by_schema, fields


@pytest.mark.parametrize(
    ("topic", "change"),
    [
        ("purchases", {"price": -1}),
        ("purchases", {"quantity": 0}),
        ("triggers", {"k": 0}),
        ("triggers", {"reply_to": "no spaces"}),
        ("triggers", {"preferences": {}}),
        ("triggers", {"preferences": {"fame": 1}}),
        ("triggers", {"preferences": {"price": -1}}),
        ("triggers", {"preferences": {"price": 2e6}}),
        ("triggers", {"preferences": {"price": 0, "click": 0.0}}),
        ("impressions", {"item_ids": []}),
        ("catalog", {"title": ""}),
        ("sids", {"sid": [65536]}),
        ("recommendations", {"items": [{"item_id": "i", "sid": [1], "score": "high"}]}),
        ("rollout", {"arms": [{"name": "winner", "bundle": "b", "weight": 0.5, "version": "1"}]}),
    ],
)
def test_a_value_out_of_its_limits_is_refused_by_both(topic: str, change: dict[str, Any]) -> None:
    assert accepted(topic, {**EXAMPLES[topic], **change}) == (False, False)


def references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def resolve(document: dict[str, Any], reference: str) -> Any:
    assert reference.startswith("#/"), reference
    node: Any = document
    for part in reference[2:].split("/"):
        node = node[part.replace("~1", "/").replace("~0", "~")]
    return node


def test_every_reference_of_the_asyncapi_document_leads_somewhere() -> None:
    document = asyncapi(KafkaSettings())
    all_references = set(references(document))
    assert all_references
    for reference in all_references:
        resolve(document, reference)


def test_the_asyncapi_document_has_the_parts_that_version_3_requires() -> None:
    document = asyncapi(KafkaSettings())
    assert document["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= document["info"].keys()
    assert all({"host", "protocol"} <= server.keys() for server in document["servers"].values())
    for operation in document["operations"].values():
        assert operation["action"] in ("send", "receive")
        channel = operation["channel"]["$ref"]
        # An operation's messages must be ones of its channel, by reference to the channel.
        for message in operation["messages"]:
            assert message["$ref"].startswith(f"{channel}/messages/")
            payload = resolve(document, resolve(document, message["$ref"])["$ref"])["payload"]["$ref"]
            assert resolve(document, payload)["type"] == "object"
    reply = document["operations"]["send-triggers"]["reply"]
    assert reply["channel"]["$ref"] == "#/channels/recommendations"


def test_the_asyncapi_document_names_every_topic_with_key_partitions_cleanup_and_direction() -> None:
    kafka = KafkaSettings(partitions=8)
    document = asyncapi(kafka)
    assert set(document["channels"]) == {kind.topic for kind in EVENTS}
    for topic in all_topics(kafka):
        channel = document["channels"][topic.name]
        binding = channel["bindings"]["kafka"]
        assert (channel["address"], binding["topic"]) == (topic.name, topic.name)
        assert binding["partitions"] == topic.partitions
        assert binding["topicConfiguration"]["cleanup.policy"] == [topic.configs["cleanup.policy"]]
        message = document["components"]["messages"][topic.event.__name__]
        assert topic.event.key_name() in message["bindings"]["kafka"]["key"]["description"]
        action = "send" if topic.name in PRODUCER_TOPICS else "receive"
        assert document["operations"][f"{action}-{topic.name}"]["action"] == action
