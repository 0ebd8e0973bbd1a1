"""A file of events is read line by line, in event time; a bad line is named, unless it is wanted as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from streams.errors import SidstreamError
from streams.events import CatalogItem, Click
from streams.replay import JsonLines, source_of

CLICK = b'{"schema_version":1,"event_id":"%s","ts":%d,"user_id":"u","item_id":"i"}'
T = 1_767_225_600_000


def click(event_id: str, ts: int) -> bytes:
    return CLICK % (event_id.encode(), ts)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def test_lines_come_in_event_time_and_catalogue_items_apart(file: Path) -> None:
    item = b'{"schema_version":1,"event_id":"c","ts":%d,"item_id":"i","title":"a thing"}' % T
    lines = [
        ("clicks", click("b", T + 2)),
        ("clicks", click("a", T + 1)),
        ("catalog", item),
        ("clicks", click("c", T + 2)),
    ]
    file.write_bytes(b"\n".join(b'{"topic":"%s","value":%s}' % (t.encode(), v) for t, v in lines) + b"\n\n")
    log = source_of(str(file))
    assert [event.event_id for event in log.events()] == ["a", "b", "c"]
    assert [event.event_id for event in log.events(T + 2)] == ["b", "c"]
    assert log.count() == 3
    (only,) = log.catalogue()
    assert isinstance(only, CatalogItem)


def test_a_topic_may_be_given_for_all_lines(file: Path) -> None:
    file.write_bytes(click("a", T))
    (event,) = JsonLines(file, "clicks").events()
    assert isinstance(event, Click)
    with pytest.raises(SidstreamError, match="topic 'click' is unknown"):
        JsonLines(file, "click")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b'{"topic":"clicks","value":{"schema_version":1}}', "line 2 is no event of clicks: invalid_field"),
        (b'{"topic":"nowhere","value":{}}', "line 2: topic 'nowhere' is unknown"),
        (b'{"value":{}}', "line 2 is not"),
        (b"{", "line 2 is not"),
        (b"\xff\xfe", "line 2 is not"),
    ],
)
def test_a_bad_line_is_an_error_that_names_it(file: Path, line: bytes, named: str) -> None:
    file.write_bytes(b'{"topic":"clicks","value":%s}\n%s\n' % (click("a", T), line))
    with pytest.raises(SidstreamError, match=named):
        list(JsonLines(file).events())


def test_raw_lines_are_sent_as_they_are_in_the_files_order(file: Path) -> None:
    bad = [b"not json", b"\xff\xfe", b'{"user_id":"u9","price":-1}']
    file.write_bytes(b"\n".join(bad))
    assert [(r.topic, r.key, r.value) for r in JsonLines(file, "purchases").records()] == [
        ("purchases", b"", b"not json"),
        ("purchases", b"", b"\xff\xfe"),
        ("purchases", b"u9", b'{"user_id":"u9","price":-1}'),
    ]
    file.write_bytes(b'{"topic": "catalog", "value": {"item_id":  "i1", "title": ""}}')
    assert [tuple(r) for r in JsonLines(file).records()] == [
        ("catalog", b"i1", b'{"item_id":  "i1", "title": ""}')
    ]
    file.write_bytes(b'{"item_id": "i1", "codebook": "0b"}\n{"item_id": "i1"}')
    assert [r.key for r in JsonLines(file, "sids").records()] == [b"0b/i1", b""]
