"""What the page for newcomers says is what works: other people's producers reach the recommender."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from streams.events import (
    BY_TOPIC,
    Arm,
    CatalogItem,
    Event,
    Recommendation,
    Rollout,
    SidAssignment,
    decode,
)
from streams.settings import KafkaSettings
from streams.wire.admin import end_offsets
from streams.wire.bulk_writer import publish_all
from streams.wire.records import partition_of
from tests import foreign_producers as foreign
from tests.conftest import FreshStack
from tests.responder import read_new
from tests.serving_support import BundlesByVersion, running
from tests.tiny_bundle import tiny_codebook, write_tiny_bundle

pytestmark = pytest.mark.integration


ITEMS = ("85123A", "22423", "84879", "20725", "47566")


@pytest.fixture
def answering(fresh_stack: FreshStack, tmp_path: Path) -> Iterator[KafkaSettings]:
    """A broker, and a serving agent with a model and five items in service."""
    kafka, url = fresh_stack()
    sizes = (4, 4, 4)
    bundle = write_tiny_bundle(tmp_path / "bundle", sizes, popular=ITEMS)
    facts: list[Event] = [CatalogItem.new(item_id=item, title=f"Item {item}") for item in ITEMS]
    facts += [
        SidAssignment.new(item_id=item, sid=[n % 4, n // 4, 0], codebook=tiny_codebook(sizes).id)
        for n, item in enumerate(ITEMS)
    ]
    arm = Arm(name="champion", bundle=bundle.id, weight=1.0, version="1")
    publish_all(kafka, [*facts, Rollout.new(name="sidstream", action="start", trial="t", arms=[arm])])
    with running(kafka, url, BundlesByVersion(**{"1": bundle})) as agent:
        agent.wait_ready()
        yield kafka


def arrived(kafka: KafkaSettings, topic: str, since: dict[int, int], event_id: str) -> None:
    """The event stands on its topic, decodes, and is in the partition of its key."""
    (record,) = read_new(kafka, topic, 1, since)
    event = decode(BY_TOPIC[topic], record.value)
    assert event.event_id == event_id
    assert record.key == event.key
    assert record.partition == partition_of(event.key, len(since))


def answered(kafka: KafkaSettings, since: dict[int, int], request_id: str) -> None:
    """The reply topic has the answer to the request, with items."""
    (record,) = read_new(kafka, "recommendations", 1, since)
    answer = decode(Recommendation, record.value)
    assert answer.request_id == request_id
    assert len(answer.items) == 3
    assert {ranked.item_id for ranked in answer.items} <= set(ITEMS)


@pytest.mark.skipif(shutil.which("kcat") is None, reason="kcat is not on PATH (apt install kcat)")
def test_the_kcat_lines_reach_their_partition_and_get_an_answer(answering: KafkaSettings) -> None:
    before = {topic: end_offsets(answering, topic) for topic in ("clicks", "triggers", "recommendations")}
    click, trigger = foreign.run_kcat(answering.bootstrap or "")
    arrived(answering, "clicks", before["clicks"], click["event_id"])
    arrived(answering, "triggers", before["triggers"], trigger["event_id"])
    answered(answering, before["recommendations"], trigger["request_id"])


def test_the_console_producer_line_reaches_its_partition_and_gets_an_answer(answering: KafkaSettings) -> None:
    before = {topic: end_offsets(answering, topic) for topic in ("triggers", "recommendations")}
    (trigger,) = foreign.run_console_producer(answering.bootstrap or "")
    arrived(answering, "triggers", before["triggers"], trigger["event_id"])
    answered(answering, before["recommendations"], trigger["request_id"])


def test_the_kafkajs_script_prints_the_answer_to_its_trigger(
    answering: KafkaSettings, tmp_path: Path
) -> None:
    problem = foreign.install_kafkajs(tmp_path)
    if problem:
        pytest.skip(problem)
    before = end_offsets(answering, "triggers")
    answer = foreign.run_kafkajs(answering.bootstrap or "", tmp_path)
    arrived(answering, "triggers", before, answer["request_id"])
    assert (answer["user_id"], answer["trigger_item_id"]) == ("17850", "85123A")
    assert {ranked["item_id"] for ranked in answer["items"]} <= set(ITEMS)
    assert answer["items"]


def test_the_python_lines_print_delivery_and_answer(answering: KafkaSettings) -> None:
    before = {topic: end_offsets(answering, topic) for topic in ("clicks", "recommendations")}
    printed = foreign.run_python(answering.bootstrap or "")
    (click,) = read_new(answering, "clicks", 1, before["clicks"])
    assert f"partition={click.partition}, offset={click.offset}" in printed
    (answer,) = read_new(answering, "recommendations", 1, before["recommendations"])
    assert decode(Recommendation, answer.value).request_id in printed


def test_the_script_has_ten_lines() -> None:
    assert len(foreign.SCRIPT.read_text().splitlines()) == 10
