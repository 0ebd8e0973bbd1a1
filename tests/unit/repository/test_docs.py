"""What the documents show is true: examples decode, tables name the fields and topics that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import msgspec
import pytest

from streams.events import BY_TOPIC, Event, EventError, decode
from streams.settings import KafkaSettings
from streams.wire.records import partition_of
from streams.wire.topics import all_topics

ROOT = Path(__file__).resolve().parents[3]
EVENTS_MD = (ROOT / "docs/events.md").read_text()
COMMON = {field.name for field in msgspec.structs.fields(Event)}


def chapters() -> dict[str, str]:
    """The text under each heading that is a topic's name."""
    parts = re.split(r"^### `([a-z-]+)`$", EVENTS_MD, flags=re.MULTILINE)[1:]
    return {
        name: re.split(r"^## ", text, flags=re.MULTILINE)[0]
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


def examples() -> list[tuple[str, str]]:
    return [
        (topic, line)
        for topic, text in chapters().items()
        for block in re.findall(r"^```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]


def tables(text: str) -> dict[str, list[list[str]]]:
    """The rows of each table of `text`, by the table's first heading."""
    tables_by_heading: dict[str, list[list[str]]] = {}
    current: list[list[str]] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            current = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if current is None:
            current = tables_by_heading.setdefault(cells[0].strip(" |"), [])
        elif not set(line) <= set("|- "):
            current.append(cells)
    return tables_by_heading


def names(rows: list[list[str]]) -> list[str]:
    return [row[0].strip("` ") for row in rows]


def test_every_topic_has_its_chapter_and_an_example() -> None:
    assert set(chapters()) == set(BY_TOPIC)
    assert {topic for topic, _ in examples()} == set(BY_TOPIC)


@pytest.mark.parametrize(("topic", "line"), examples())
def test_each_example_is_an_event_with_known_fields_only(topic: str, line: str) -> None:
    kind = BY_TOPIC[topic]
    event = decode(kind, line.encode())
    assert event.key
    assert set(msgspec.json.decode(line)) <= {field.name for field in msgspec.structs.fields(kind)}


def test_a_wrong_example_would_be_seen() -> None:
    with pytest.raises(EventError):
        decode(BY_TOPIC["purchases"], examples()[0][1].encode())


@pytest.mark.parametrize("topic", sorted(BY_TOPIC))
def test_the_field_tables_name_the_fields_of_the_types(topic: str) -> None:
    documented = names(tables(chapters()[topic])["field"])
    expected = [field.name for field in msgspec.structs.fields(BY_TOPIC[topic]) if field.name not in COMMON]
    assert documented == expected


@pytest.mark.parametrize("topic", sorted(BY_TOPIC))
def test_required_and_optional_fields_are_told_apart(topic: str) -> None:
    if "write" not in next(row for row in tables(EVENTS_MD)["topic"] if row[0] == f"`{topic}`")[2]:
        return
    rows = {row[0].strip("`"): row[1] for row in tables(chapters()[topic])["field"]}
    for field in msgspec.structs.fields(BY_TOPIC[topic]):
        if field.name not in COMMON:
            assert ("required" in rows[field.name]) == field.required, field.name


def test_the_table_of_topics_is_what_is_created() -> None:
    documented = {row[0].strip("`"): row for row in tables(EVENTS_MD)["topic"]}
    topics_by_name = {topic.name: topic for topic in all_topics(KafkaSettings())}
    assert set(documented) == set(topics_by_name)
    for name, topic in topics_by_name.items():
        assert documented[name][1] == f"`{topic.event.key_name()}`", name
        assert documented[name][3] == topic.configs["cleanup.policy"], name
        assert topic.partitions == (1 if name == "rollout" else 4), name


def test_the_partitions_shown_are_those_of_the_client() -> None:
    rows = tables(EVENTS_MD)["key"]
    assert len(rows) >= 4
    for key, positive, of_4, of_12 in rows:
        raw = key.strip("`").encode()
        assert partition_of(raw, 1 << 31) == int(positive)
        assert partition_of(raw, 4) == int(of_4)
        assert partition_of(raw, 12) == int(of_12)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "empty"),
        (b"\xff\xfe{}", "not_utf8"),
        (b"{", "malformed_json"),
        (b'{"schema_version":2}', "unknown_schema_version"),
        (b'{"schema_version":1}', "invalid_field"),
        (
            b'{"schema_version":1,"event_id":"e","ts":32503680000000,"user_id":"u","item_id":"i"}',
            "timestamp_in_future",
        ),
    ],
)
def test_the_reasons_of_refusal_are_documented(value: bytes, reason: str) -> None:
    with pytest.raises(EventError) as refused:
        decode(BY_TOPIC["clicks"], value)
    assert refused.value.reason == reason
    assert reason in names(tables(EVENTS_MD)["reason"])


def reasons_in_sources() -> set[str]:
    """Every reason that a record may be refused for, as the sources write it down."""
    place = {"RefusedRecord": 2, "_refusal": 1, "EventError": 0}
    reasons: set[str] = set()
    files = [ROOT / "streams/events.py", ROOT / "streams/wire/batch_loop.py", ROOT / "serving/agent.py"]
    for path in [*files, *(ROOT / "agents").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in place:
                at = place[node.func.id]
                if at < len(node.args) and isinstance(node.args[at], ast.Constant):
                    reasons.add(node.args[at].value)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "reason":
                reasons |= {part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)}
    return reasons


def test_every_reason_of_a_dead_letter_is_documented() -> None:
    documented = {name for row in tables(EVENTS_MD)["reason"] for name in re.findall(r"`(\w+)`", row[0])}
    assert {"unknown_item", "reply_topic", "timeout", "failed"} <= reasons_in_sources()
    assert documented == reasons_in_sources()


def links(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "document", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]), ids=lambda path: path.name
)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in links(document):
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{document.name} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{document.name} links to {target}"


DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_the_settings_named_in_documents_exist() -> None:
    from sidstream.settings import Settings

    named = {
        setting
        for document in DOCUMENTS
        for setting in re.findall(r"SIDSTREAM_([A-Z]+)__([A-Z_]+)", document.read_text())
    }
    dotted = {
        (section.upper(), field.upper())
        for document in DOCUMENTS
        for section, field in re.findall(r"`([a-z]+)\.([a-z_]+)`", document.read_text())
        if section in Settings.model_fields and field != "json"
    }
    assert len(named | dotted) > 10
    for section, field in named | dotted:
        kind = Settings.model_fields[section.lower()].annotation
        assert field.lower() in getattr(kind, "model_fields", {}), f"{section.lower()}.{field.lower()}"


def test_the_metrics_named_in_documents_are_counted_somewhere() -> None:
    named = {
        metric
        for document in DOCUMENTS
        for metric in re.findall(r"`(sidstream_[a-z_]+)`", document.read_text())
    }
    source = "".join(
        path.read_text()
        for package in ("streams", "agents", "serving")
        for path in (ROOT / package).rglob("*.py")
    )
    assert len(named) >= 8
    for metric in named:
        # The client library adds _total to a counter's name by itself.
        assert f'"{metric}"' in source or f'"{metric.removesuffix("_total")}"' in source, metric


def test_the_commands_named_in_documents_exist() -> None:
    from typing import Any

    import typer.main

    from sidstream.cli import app

    group: Any = typer.main.get_command(app)
    lines = [
        (document.name, words)
        for document in DOCUMENTS
        for words in re.findall(
            r"(?m:`|^    )(?:[A-Z_]+=\S+ )*sidstream ([a-z][^`\n]*)", document.read_text()
        )
    ]
    assert len(lines) > 10
    for document, line in lines:
        command = group
        for word in line.split():
            # A group such as `gate` may do something by itself, with options of its own.
            if not hasattr(command, "commands") or word.startswith("-"):
                break
            assert word in command.commands, f"{document}: sidstream {line}"
            command = command.commands[word]
        options = {
            name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        for option in re.findall(r"(?<= )--[a-z-]+", f" {line}"):
            assert option in options, f"{document}: sidstream {line}"
