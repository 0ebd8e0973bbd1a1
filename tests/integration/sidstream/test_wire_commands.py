"""`replay`, `publish` and `topics` as a person or a script types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from sidstream.commands import wire
from streams.errors import SidstreamError
from streams.events import EVENTS, Click, decode
from streams.settings import KafkaSettings
from streams.wire.admin import delete_topics, end_offsets
from tests.responder import read_new

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def environment(kafka: KafkaSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of a person whose Kafka is the tests' broker."""
    monkeypatch.setenv("SIDSTREAM_KAFKA__BOOTSTRAP", kafka.bootstrap or "")
    monkeypatch.setenv("SIDSTREAM_KAFKA__PARTITIONS", str(kafka.partitions))
    monkeypatch.setenv("SIDSTREAM_STACK__HOME", str(tmp_path / "state"))


def run_command(*arguments: str, stdin: str | None = None) -> dict[str, Any]:
    """Run a command with --json; what it printed. Raises what the command raises."""
    app = typer.Typer()
    for name in ("replay", "publish", "topics_create", "topics_list", "topics_delete", "contract"):
        app.command(name.replace("_", "-"))(getattr(wire, name))
    result = CliRunner().invoke(app, [*arguments, "--json"], input=stdin, catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    printed: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return printed


def test_topics_are_created_listed_and_deleted_only_when_meant(kafka: KafkaSettings) -> None:
    delete_topics(kafka)
    assert run_command("topics-list")["topics"][0]["partitions"] is None
    assert "clicks" in run_command("topics-create")["created"]
    assert run_command("topics-create")["created"] == []
    topics_by_name = {row["topic"]: row for row in run_command("topics-list")["topics"]}
    assert (topics_by_name["clicks"]["partitions"], topics_by_name["clicks"]["records"]) == (
        kafka.partitions,
        0,
    )
    assert (topics_by_name["catalog"]["cleanup"], topics_by_name["catalog"]["key"]) == ("compact", "item_id")
    with pytest.raises(SidstreamError, match="--yes"):
        run_command("topics-delete")
    assert "clicks" in run_command("topics-delete", "--yes")["deleted"]


def test_replay_makes_the_topics_and_says_what_it_sent(kafka: KafkaSettings) -> None:
    delete_topics(kafka)
    result = run_command(
        "replay", "online-retail", "--from", "2011-12-09T12:00", "--to", "2011-12-10", "--only", "events"
    )
    assert result["topics"] == {"purchases": result["sent"]}
    assert result["sent"] == sum(end_offsets(kafka, "purchases").values()) > 0
    assert result["last_ts"] == 1_323_435_000_000
    assert run_command("replay", "online-retail", "--only", "catalog")["topics"] == {
        "catalog": 3_659, "users": 4_334,
    }  # fmt: skip


def test_a_file_with_a_bad_line_is_sent_only_when_meant(kafka: KafkaSettings, tmp_path: Path) -> None:
    run_command("topics-create")
    before = end_offsets(kafka, "clicks")
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(SidstreamError, match="line 1 is no event of clicks: not_utf8"):
        run_command("replay", str(path), "--topic", "clicks")
    assert end_offsets(kafka, "clicks") == before
    assert run_command("replay", str(path), "--topic", "clicks", "--raw")["sent"] == 1
    (record,) = read_new(kafka, "clicks", 1, before)
    assert record.value == b"\xff\xfe"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("replay", "nothing.csv"), "no log 'nothing.csv'"),
        (("replay", "online-retail", "--from", "soon"), "time 'soon'"),
        (("replay", "online-retail", "--speed", "0"), "speed '0'"),
        (("replay", "online-retail", "--only", "items"), "--only is 'items'"),
        (("replay", "online-retail", "--raw"), "--raw sends the lines of a file"),
        (("publish", "click", "{}"), "topic 'click' is unknown"),
        (("publish", "clicks", "{"), "the event is no JSON"),
        (("publish", "clicks", "[]"), "give one JSON object"),
        (("publish", "clicks", '{"user_id": "u"}'), "item_id"),
    ],
)
def test_what_a_command_cannot_do_it_says_in_one_line(arguments: tuple[str, ...], named: str) -> None:
    with pytest.raises(SidstreamError) as refused:
        run_command(*arguments)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("by_pipe", [False, True])
def test_publish_fills_in_what_every_event_has_and_says_where_it_stands(
    kafka: KafkaSettings, by_pipe: bool
) -> None:
    run_command("topics-create")
    before = end_offsets(kafka, "clicks")
    text = '{"user_id": "17850", "item_id": "85123A"}'
    position = (
        run_command("publish", "clicks", stdin=text) if by_pipe else run_command("publish", "clicks", text)
    )
    (record,) = read_new(kafka, "clicks", 1, before)
    assert (position["partition"], position["offset"]) == (record.partition, record.offset)
    assert decode(Click, record.value).event_id == position["event_id"]


def test_contract_writes_the_documents(tmp_path: Path) -> None:
    assert len(run_command("contract", str(tmp_path))["files"]) == len(EVENTS) + 1
    assert json.loads((tmp_path / "asyncapi.json").read_text())["asyncapi"] == "3.0.0"
