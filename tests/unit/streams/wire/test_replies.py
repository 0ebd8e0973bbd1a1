"""A request for an answer always ends: with its own answer, a time-out, or the reason why none can come."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from streams.errors import SidstreamError
from streams.events import Recommendation, encode
from streams.wire.replies import Replies


class Script:
    """A consumer that gives what a test puts in: bytes, or an error to raise."""

    def __init__(self) -> None:
        self.given: list[bytes | Exception] = []
        self.there = threading.Condition()
        self.closed = threading.Event()

    def give(self, *values: bytes | Exception) -> None:
        with self.there:
            self.given.extend(values)
            self.there.notify()

    def poll(self, timeout_ms: int) -> dict[Any, list[Any]]:
        with self.there:
            self.there.wait_for(lambda: self.given, timeout_ms / 1000)
            given, self.given = self.given, []
        for value in given:
            if isinstance(value, Exception):
                raise value
        return {0: [SimpleNamespace(value=value) for value in given]}

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def replies(script: Script) -> Any:
    started = Replies(lambda: script)
    started.start()
    yield started
    started.close()


def answer(request_id: str) -> bytes:
    return encode(Recommendation.new(request_id=request_id, user_id="u", items=[]))


def error_text(future: Future[Any]) -> str:
    error = future.exception(timeout=10)
    assert isinstance(error, SidstreamError)
    return str(error)


def test_each_request_gets_its_own_answer_in_whatever_order_they_come(
    replies: Replies, script: Script
) -> None:
    waiting = {f"r{n}": replies.expect(f"r{n}", 30) for n in range(20)}
    script.give(*[answer(request_id) for request_id in reversed(waiting)])
    assert all(future.result(10).request_id == request_id for request_id, future in waiting.items())


def test_answers_to_others_and_bytes_that_are_no_answer_change_nothing(
    replies: Replies, script: Script
) -> None:
    future = replies.expect("mine", 30)
    deep = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    script.give(answer("theirs"), b"", b"\xff\xfe", b"{", b"[]", b'{"request_id": 7}', deep, answer("mine"))
    assert future.result(10).request_id == "mine"


def test_an_answer_that_breaks_the_contract_fails_its_request_only(replies: Replies, script: Script) -> None:
    broken, whole = replies.expect("broken", 30), replies.expect("whole", 30)
    script.give(b'{"schema_version":1,"request_id":"broken"}', answer("whole"))
    assert "answer to request broken breaks the contract" in error_text(broken)
    assert whole.result(10).request_id == "whole"


def test_a_request_without_an_answer_fails_and_says_what_to_check(replies: Replies) -> None:
    text = error_text(replies.expect("lost", 0.05))
    assert "no answer to request lost within 0.05 s" in text
    assert "sidstream status" in text


def test_when_reading_dies_everybody_who_waits_is_told_why(replies: Replies, script: Script) -> None:
    waiting = [replies.expect(f"r{n}", 600) for n in range(3)]
    script.give(RuntimeError("the wire was cut"))
    for future in waiting:
        assert "RuntimeError: the wire was cut" in error_text(future)
    assert script.closed.wait(10)


def test_after_reading_died_a_new_start_reads_again(script: Script) -> None:
    scripts = [script, Script()]
    opened = iter(scripts)
    replies = Replies(lambda: next(opened))
    replies.start()
    first = replies.expect("r1", 600)
    script.give(RuntimeError("gone"))
    error_text(first)
    assert script.closed.wait(10)

    with pytest.raises(SidstreamError, match="ask again"):
        replies.expect("between", 1)

    replies.start()
    second = replies.expect("r2", 600)
    scripts[1].give(answer("r2"))
    assert second.result(10).request_id == "r2"
    replies.close()


def test_whoever_starts_while_another_does_waits_until_the_reader_stands_at_the_end() -> None:
    at_the_end, opening = threading.Event(), threading.Event()
    script = Script()

    def open_slowly() -> Script:
        opening.set()
        at_the_end.wait(10)
        return script

    replies = Replies(open_slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(replies.start)
        assert opening.wait(10)
        second = pool.submit(replies.start)
        with pytest.raises(TimeoutError):
            second.result(0.2)
        at_the_end.set()
        first.result(10)
        second.result(10)
    replies.close()


def test_a_reader_that_cannot_be_opened_fails_the_start_with_its_reason() -> None:
    def refuse() -> Script:
        raise SidstreamError("topic recommendations does not exist: create it")

    with pytest.raises(SidstreamError, match="topic recommendations does not exist"):
        Replies(refuse).start()


def test_two_requests_of_one_id_are_refused(replies: Replies) -> None:
    replies.expect("twice", 30)
    with pytest.raises(SidstreamError, match="request twice waits"):
        replies.expect("twice", 30)


def test_closing_ends_the_thread_and_whoever_waits(script: Script) -> None:
    before = set(threading.enumerate())
    replies = Replies(lambda: script)
    replies.start()
    future = replies.expect("r", 600)
    replies.close()
    assert set(threading.enumerate()) == before
    assert script.closed.is_set()
    assert "closed before the answer came" in error_text(future)
    with pytest.raises(SidstreamError, match="client is closed"):
        replies.expect("late", 1)
    with pytest.raises(SidstreamError, match="client is closed"):
        replies.start()
