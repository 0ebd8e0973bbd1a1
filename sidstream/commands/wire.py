"""`sidstream replay`, `publish`, `topics` and `contract`: the wire, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sidstream.console import emit, progress
from streams.errors import SidstreamError

if TYPE_CHECKING:
    from streams.replay import EventSource
    from streams.replay.engine import ReplaySummary
    from streams.settings import KafkaSettings

Json = Annotated[bool, typer.Option("--json", help="print one line of JSON")]


def replay(
    source: Annotated[str, typer.Argument(help="online-retail, rees46, or a file of JSON lines")],
    since: Annotated[
        str | None, typer.Option("--from", help="first time: ISO date (UTC) or milliseconds since 1970")
    ] = None,
    until: Annotated[str | None, typer.Option("--to", help="end time, itself not included")] = None,
    speed: Annotated[str, typer.Option(help="times faster than it happened, or max")] = "max",
    catalog: Annotated[
        bool, typer.Option("--catalog/--no-catalog", help="send the items and users' profiles first")
    ] = True,
    only: Annotated[str | None, typer.Option(help="catalog or events: send only these")] = None,
    topic: Annotated[str | None, typer.Option(help="topic of every line of the file")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="send the file's lines as they are, unchecked")] = False,
    data: Annotated[
        Path | None, typer.Option(envvar="SIDSTREAM_DATA", help="REES46's CSV, or a folder that has it")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a log of the past to Kafka as events, in event time, every one confirmed.

    Example: sidstream replay online-retail --from 2011-11-01 --speed max
    """
    from sidstream.settings import load
    from streams.replay import source_of
    from streams.replay.engine import parse_speed, parse_time
    from streams.replay.engine import replay as send
    from streams.wire.admin import create_topics

    if only not in (None, "catalog", "events"):
        raise SidstreamError(f"--only is {only!r}: give catalog or events, or leave it out")
    start = parse_time(since) if since else None
    end = parse_time(until) if until else None
    pace = parse_speed(speed)
    log = source_of(source, data, topic)
    kafka = load().kafka
    create_topics(kafka)
    if raw:
        replayed = _replay_lines(kafka, log, source)
    else:
        send_catalog, send_events = catalog and only != "events", only != "catalog"
        total = log.count(start, end) if send_events else 0
        total += sum(1 for _ in (*log.catalogue(), *log.profiles())) if send_catalog else 0
        with progress(f"replay {source}", total) as advance:
            replayed = send(kafka, log, start, end, pace, send_catalog, send_events, advance)
    rate = replayed.record_count / replayed.seconds if replayed.seconds else 0.0
    counts = ", ".join(f"{count:,} on {name}" for name, count in sorted(replayed.topics.items()))
    emit(
        {
            "sent": replayed.record_count, "topics": replayed.topics,
            "first_ts": replayed.first_ts, "last_ts": replayed.last_ts,
            "seconds": round(replayed.seconds, 3), "per_second": round(rate),
        },
        as_json,
        f"{replayed.record_count:,} events confirmed in {replayed.seconds:.1f} s ({rate:,.0f}/s): "
        f"{counts or 'nothing to send'}",
    )  # fmt: skip


def _replay_lines(kafka: KafkaSettings, log: EventSource, name: str) -> ReplaySummary:
    """Send the lines of a file as they are."""
    from streams.replay import JsonLines
    from streams.replay.engine import replay_raw

    if not isinstance(log, JsonLines):
        raise SidstreamError(f"--raw sends the lines of a file, {name} is none: give a file of JSON lines")
    with progress(f"replay {name}", None) as advance:
        return replay_raw(kafka, log.records(), advance)


def publish(
    topic: Annotated[str, typer.Argument(help="the event's topic, such as clicks")],
    event: Annotated[str, typer.Argument(help="the event as JSON; - reads it from standard input")] = "-",
    as_json: Json = False,
) -> None:
    """Check one event and publish it; event_id, ts and schema_version are filled in where absent.

    Example: sidstream publish clicks '{"user_id": "17850", "item_id": "85123A"}'
    """
    import json
    import sys

    from sidstream.settings import load
    from streams.events import BY_TOPIC, EventError
    from streams.wire.client import Client

    kind = BY_TOPIC.get(topic)
    if kind is None:
        raise SidstreamError(f"topic {topic!r} is unknown: it is one of {', '.join(BY_TOPIC)}")
    text = sys.stdin.read() if event == "-" else event
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise SidstreamError(f"the event is {text.strip()[:60]!r}: give one JSON object")
        published = kind.new(**fields)
    except json.JSONDecodeError as error:
        raise SidstreamError(
            f"the event is no JSON ({error}): give one JSON object, in single quotes"
        ) from error
    except EventError as error:
        raise SidstreamError(f"not published: {error}") from error
    with Client(load().kafka) as client:
        position = client.publish(published)
    emit(
        {**position._asdict(), "event_id": published.event_id},
        as_json,
        f"{published.event_id} stands on {position.topic}, partition {position.partition}, "
        f"offset {position.offset}",
    )


def topics_create(as_json: Json = False) -> None:
    """Create the topics that are missing; check the partitions of those that exist.

    Example: sidstream topics create
    """
    from sidstream.settings import load
    from streams.wire.admin import create_topics

    created = create_topics(load().kafka)
    emit(
        {"created": created},
        as_json,
        f"created: {', '.join(created)}" if created else "every topic stands already",
    )


def topics_list(as_json: Json = False) -> None:
    """List the topics with partitions, cleanup policy and how many records each holds.

    Example: sidstream topics list
    """
    from sidstream.settings import load
    from streams.wire.admin import offset_spans
    from streams.wire.topics import all_topics

    kafka = load().kafka
    spans_by_topic = offset_spans(kafka)
    rows = []
    for topic in all_topics(kafka):
        partition_spans = spans_by_topic.get(topic.name)
        rows.append(
            {
                "topic": topic.name,
                "key": topic.event.key_name(),
                "cleanup": topic.configs["cleanup.policy"],
                "partitions": len(partition_spans) if partition_spans else None,
                "offsets": {
                    str(number): [span.begin, span.end] for number, span in (partition_spans or {}).items()
                },
                "records": sum(span.end - span.begin for span in partition_spans.values())
                if partition_spans
                else None,
            }
        )
    lines = [f"{'topic':<16} {'key':<16} {'cleanup':<8} partitions {'records':>12}"]
    for row in rows:
        if row["partitions"] is None:
            lines.append(f"{row['topic']:<16} missing: create it with `sidstream topics create`")
        else:
            lines.append(
                f"{row['topic']:<16} {row['key']:<16} {row['cleanup']:<8} "
                f"{row['partitions']:>10} {row['records']:>12,}"
            )
    emit({"topics": rows}, as_json, "\n".join(lines))


def topics_delete(
    yes: Annotated[bool, typer.Option("--yes", help="do it: every event in them is lost")] = False,
    as_json: Json = False,
) -> None:
    """Delete the topics with all events in them. Redis keeps the histories that were built from them.

    Example: sidstream topics delete --yes
    """
    from sidstream.settings import load
    from streams.wire.admin import delete_topics

    if not yes:
        raise SidstreamError("topics delete loses every event of every topic: say so with --yes")
    deleted = delete_topics(load().kafka)
    emit({"deleted": deleted}, as_json, f"deleted: {', '.join(deleted)}" if deleted else "no topic stands")


def contract(
    folder: Annotated[Path, typer.Argument(help="where to write")] = Path("docs/reference"),
    as_json: Json = False,
) -> None:
    """Write the published contract: a JSON Schema per event, and an AsyncAPI 3 document.

    Example: sidstream contract docs/reference
    """
    from sidstream.settings import read
    from streams.contract import write_documents

    files = write_documents(read().kafka, folder)
    emit({"files": [str(path) for path in files]}, as_json, f"{len(files)} files in {folder}")
