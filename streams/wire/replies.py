"""Answers: one thread reads `recommendations` and hands each to the request that waits for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import msgspec

from streams.errors import SidstreamError
from streams.events import EventError, Recommendation, decode

log = logging.getLogger(__name__)

# How long one poll waits: it bounds the delay of a time-out and of `close`.
_POLL_MS = 100
# Connecting, learning the partitions and their ends; a broker that answers needs a fraction of a second.
_START_S = 30.0


class RecommendationReader(Protocol):
    """The part of a Kafka consumer that reading answers needs."""

    def poll(self, timeout_ms: int) -> Mapping[Any, Iterable[Any]]:
        """Records by partition, each with a `value`."""

    def close(self) -> None:
        """Close its connections."""


class _RequestIdOnly(msgspec.Struct):
    """The only field that is decoded of answers to other clients."""

    request_id: str


class _PendingRequest(NamedTuple):
    future: Future[Recommendation]
    deadline: float
    timeout: float


def no_answer_error(request_id: str, timeout: float) -> SidstreamError:
    """The error for a request without an answer in time."""
    return SidstreamError(
        f"no answer to request {request_id} within {timeout:g} s: check that serving runs "
        "(`sidstream status`) and that a model is in service (`sidstream models`)"
    )


class Replies:
    """Requests that wait for an answer, and the thread that reads the answers. Thread-safe.

    `open_reader` connects a consumer at the end of every partition; it is called in the thread. When the
    thread dies, all waiting requests fail with its error, and the next `start` starts a new thread.
    """

    def __init__(self, open_reader: Callable[[], RecommendationReader]) -> None:
        self._open_reader = open_reader
        self._waiting: dict[str, _PendingRequest] = {}
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._reading = False  # guarded by _lock: the reader is at the end, and the thread runs
        self._stop = threading.Event()
        self._request_id_decoder = msgspec.json.Decoder(_RequestIdOnly)

    def start(self) -> None:
        """Return when every answer from now on is read. Raises SidstreamError where that fails."""
        if self._reading:
            return
        with self._starting:
            if self._stop.is_set():
                raise SidstreamError("the client is closed: make a new one")
            if self._reading:
                return
            started: Future[None] = Future()
            self._thread = threading.Thread(
                target=self._run, args=(started,), name="sidstream-replies", daemon=True
            )
            self._thread.start()
            try:
                started.result(_START_S)
            except TimeoutError as error:
                raise SidstreamError(
                    f"answers could not be read within {_START_S:g} s: check Kafka with `sidstream status`"
                ) from error

    def expect(self, request_id: str, timeout: float) -> Future[Recommendation]:
        """A future for the answer to `request_id`, failing with SidstreamError after `timeout` seconds."""
        waiting = _PendingRequest(Future(), time.monotonic() + timeout, timeout)
        with self._lock:
            if self._stop.is_set():
                raise SidstreamError("the client is closed: make a new one")
            if not self._reading:
                raise SidstreamError("answers are not being read: ask again")
            if request_id in self._waiting:
                raise SidstreamError(
                    f"request {request_id} waits for its answer already: give each its own id"
                )
            self._waiting[request_id] = waiting
        return waiting.future

    def fail(self, request_id: str, error: SidstreamError) -> None:
        """Fail the future of `request_id` with `error`, if it still waits."""
        with self._lock:
            waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            waiting.future.set_exception(error)

    def close(self) -> None:
        """Stop the thread and fail the requests that wait. Returns when the thread has ended."""
        self._stop.set()
        with self._starting:
            if self._thread is not None:
                self._thread.join()

    def _run(self, started: Future[None]) -> None:
        try:
            reader = self._open_reader()
            try:
                with self._lock:
                    self._reading = True
                started.set_result(None)
                while not self._stop.is_set():
                    for records in reader.poll(timeout_ms=_POLL_MS).values():
                        for record in records:
                            self._deliver(record.value)
                    self._expire()
            finally:
                reader.close()
            self._fail_all("the client was closed before the answer came")
        except Exception as error:
            # Whatever ended the thread, no request may wait for it any longer.
            log.warning("reading answers ended", exc_info=error)
            reason = f"reading answers from Kafka ended ({type(error).__name__}: {error}): ask again"
            self._fail_all(reason)
            if not started.done():
                started.set_exception(error if isinstance(error, SidstreamError) else SidstreamError(reason))

    def _deliver(self, value: bytes | None) -> None:
        try:
            request_id = self._request_id_decoder.decode(value or b"").request_id
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return  # not an answer to a request of this client
        with self._lock:
            waiting = self._waiting.pop(request_id, None)
        if waiting is None:
            return
        try:
            waiting.future.set_result(decode(Recommendation, value))
        except EventError as error:
            waiting.future.set_exception(
                SidstreamError(f"the answer to request {request_id} breaks the contract: {error}")
            )

    def _expire(self) -> None:
        now = time.monotonic()
        with self._lock:
            expired_ids = [
                request_id for request_id, waiting in self._waiting.items() if waiting.deadline <= now
            ]
            expired = [(request_id, self._waiting.pop(request_id)) for request_id in expired_ids]
        for request_id, waiting in expired:
            waiting.future.set_exception(no_answer_error(request_id, waiting.timeout))

    def _fail_all(self, reason: str) -> None:
        """Refuse new requests and fail the waiting ones, under one lock, so that none comes in between."""
        with self._lock:
            self._reading = False
            pending, self._waiting = self._waiting, {}
        for waiting in pending.values():
            waiting.future.set_exception(SidstreamError(reason))
