"""What the page for newcomers says is what works: other people's producers reach the recommender."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from streams.admin import create_topics, end_offsets
from streams.events import BY_TOPIC, Recommendation, decode
from streams.records import partition_of
from streams.settings import KafkaSettings
from tests import foreign_producers as foreign
from tests.responder import Responder, read_new

pytestmark = pytest.mark.integration


@pytest.fixture
def answering(kafka: KafkaSettings) -> Iterator[KafkaSettings]:
    """A broker with the topics and something that answers triggers."""
    create_topics(kafka)
    with Responder(kafka):
        yield kafka


def arrived(kafka: KafkaSettings, topic: str, since: dict[int, int], event_id: str) -> None:
    """The event stands on its topic, decodes, and is in the partition of its key."""
    (record,) = read_new(kafka, topic, 1, since)
    event = decode(BY_TOPIC[topic], record.value)
    assert event.event_id == event_id
    assert record.key == event.key
    assert record.partition == partition_of(event.key, len(since))


def answered(kafka: KafkaSettings, since: dict[int, int], request_id: str) -> None:
    """The reply topic has the answer to the request."""
    (record,) = read_new(kafka, "recommendations", 1, since)
    assert decode(Recommendation, record.value).request_id == request_id


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


def test_the_python_lines_print_delivery_and_answer(answering: KafkaSettings) -> None:
    before = {topic: end_offsets(answering, topic) for topic in ("clicks", "recommendations")}
    printed = foreign.run_python(answering.bootstrap or "")
    (click,) = read_new(answering, "clicks", 1, before["clicks"])
    assert f"partition={click.partition}, offset={click.offset}" in printed
    (answer,) = read_new(answering, "recommendations", 1, before["recommendations"])
    assert decode(Recommendation, answer.value).request_id in printed


def test_the_script_has_ten_lines() -> None:
    assert len(foreign.SCRIPT.read_text().splitlines()) == 10
