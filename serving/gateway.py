"""The HTTP gateway: a request becomes a trigger on Kafka, and the agent's answer becomes the response.

It knows no model and no catalogue: it serves what a Kafka client would get. The schemas of the request and
the response are generated from the event types, so that they always agree with them.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import msgspec
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from serving.settings import GatewaySettings
from streams.errors import SidstreamError
from streams.events import SCHEMA_VERSION, EventError, Recommendation, Trigger, decode, encode

log = logging.getLogger(__name__)

# A body with 1,000 exclusions of 128 characters is 130 kB; the topics refuse more than 256 kB by default.
_MAX_BODY = 262_144
# How long one reading of Kafka's state is reused: frequent probes then cost no calls of Kafka.
_READY_FRESH_S = 1.0
# The client gives up by itself after the time-out; this is for a client that cannot.
_GRACE_S = 1.0
# Fields that a caller over HTTP may leave out.
_FILLED_IN = ("schema_version", "event_id", "ts", "request_id")


class TriggerClient(Protocol):
    """Puts a trigger on Kafka and waits for its answer: streams.wire.client.Client."""

    def submit(self, trigger: Trigger, timeout: float = ...) -> Any:
        """A concurrent.futures.Future of the Recommendation."""


def create_app(
    settings: GatewaySettings, connect: Callable[[], TriggerClient], waiting_for: Callable[[], str | None]
) -> FastAPI:
    """The application.

    `connect()` makes the client, when the first request needs it; `waiting_for()` names what is missing for
    an answer (None: nothing). Both may block, and raise SidstreamError when Kafka does not answer.
    """
    link = _KafkaLink(connect, waiting_for)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(link.close)

    app = FastAPI(
        title="sidstream", version="1.0.0", lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Recommendations over HTTP: the same call as a trigger on Kafka.",
    )  # fmt: skip
    registry = CollectorRegistry()
    _add_token_check_and_metrics(app, settings, registry)
    _add_recommend(app, settings, link)
    _add_health_and_metrics(app, registry, link)
    _add_event_schemas(app)
    return app


def _add_token_check_and_metrics(
    app: FastAPI, settings: GatewaySettings, registry: CollectorRegistry
) -> None:
    """Middleware for /v1: it refuses requests without the token, and counts and times all of them."""
    requests = Counter("sidstream_gateway_requests", "HTTP requests to /v1", ["status"], registry=registry)
    seconds = Histogram("sidstream_gateway_seconds", "Time to answer a request to /v1", registry=registry)

    @app.middleware("http")
    async def guard(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        if not request.url.path.startswith("/v1/"):
            return await call(request)
        begun = time.perf_counter()
        answer = await call(request) if _authorised(settings, request) else _problem(
            401, "send the header `Authorization: Bearer <token>` with the gateway's token"
        )  # fmt: skip
        seconds.observe(time.perf_counter() - begun)
        requests.labels(str(answer.status_code)).inc()
        return answer


def _add_recommend(app: FastAPI, settings: GatewaySettings, link: _KafkaLink) -> None:
    """POST /v1/recommend."""
    under_way: set[str] = set()

    @app.post("/v1/recommend", summary="Recommend items to a user", openapi_extra=_operation(settings))
    async def recommend(request: Request) -> Response:
        try:
            trigger = _trigger(await _body(request))
        except EventError as error:
            return _problem(400, error.detail)
        if trigger.request_id in under_way:
            return _problem(409, f"request {trigger.request_id} is under way: give each its own request_id")
        under_way.add(trigger.request_id)
        try:
            return Response(
                encode(await link.ask(trigger, settings.timeout_s)), media_type="application/json"
            )
        except (SidstreamError, TimeoutError) as error:
            # Readiness costs a call of Kafka, so it is read only now that no answer came.
            waiting = await link.waiting(reuse=False)
            if waiting is not None:
                return _problem(503, f"not ready: {waiting}", {"Retry-After": "2"})
            return _problem(504, str(error) or f"no answer within {settings.timeout_s:g} s; ask again")
        finally:
            under_way.discard(trigger.request_id)


def _add_health_and_metrics(app: FastAPI, registry: CollectorRegistry, link: _KafkaLink) -> None:
    """GET /health/live, /health/ready and /metrics.

    They are FastAPI's, not those of streams.wire.health_server: the gateway has one public port, and its
    OpenAPI document lists them.
    """

    @app.get("/health/live", summary="The gateway runs")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready", summary="Kafka answers, the topics exist and a serving agent runs")
    async def ready() -> Response:
        waiting = await link.waiting(reuse=True)
        if waiting is None:
            return _json(200, {"status": "ready"})
        return _json(503, {"status": "waiting", "for": waiting})

    @app.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _add_event_schemas(app: FastAPI) -> None:
    """Add the schemas of the event types to the OpenAPI document; FastAPI does not know these types."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        document = build()
        document.setdefault("components", {}).setdefault("schemas", {}).update(_schemas())
        return document

    app.openapi = openapi  # type: ignore[method-assign]


class _KafkaLink:
    """The client, connected when it is first needed, and the last reading of what answers wait for."""

    def __init__(self, connect: Callable[[], TriggerClient], waiting_for: Callable[[], str | None]) -> None:
        self._connect = connect
        self._waiting_for = waiting_for
        self._client: TriggerClient | None = None
        self._connecting = asyncio.Lock()
        self._reading = asyncio.Lock()
        self._read_at = float("-inf")
        self._waiting: str | None = None

    async def ask(self, trigger: Trigger, timeout: float) -> Recommendation:
        """The answer to a trigger. Raises SidstreamError, or TimeoutError where Kafka itself is stuck."""
        async with asyncio.timeout(timeout + _GRACE_S):
            async with self._connecting:
                if self._client is None:
                    self._client = await asyncio.to_thread(self._connect)
            # In a thread: sending blocks while Kafka is away.
            pending = asyncio.wrap_future(await asyncio.to_thread(self._client.submit, trigger, timeout))
            pending.add_done_callback(lambda done: done.cancelled() or done.exception())
            # Shielded: the client still owns the future when our caller has gone.
            answer: Recommendation = await asyncio.shield(pending)
            return answer

    async def waiting(self, reuse: bool) -> str | None:
        """What answers wait for, None: nothing. With `reuse`, a reading that is a second old counts."""
        async with self._reading:
            if not reuse or time.monotonic() - self._read_at > _READY_FRESH_S:
                try:
                    self._waiting = await asyncio.to_thread(self._waiting_for)
                except SidstreamError as error:
                    self._waiting = str(error)
                self._read_at = time.monotonic()
            return self._waiting

    def close(self) -> None:
        close = getattr(self._client, "close", None)
        if close is not None:
            close()


def _authorised(settings: GatewaySettings, request: Request) -> bool:
    if settings.token is None:
        return True
    header = request.headers.get("authorization", "")
    # Compared in constant time: how much of a guess is right must not show in how long it takes.
    return hmac.compare_digest(header.encode(), f"Bearer {settings.token.get_secret_value()}".encode())


async def _body(request: Request) -> dict[str, Any]:
    """The request's JSON object. Raises EventError."""
    read = bytearray()
    async for part in request.stream():
        read += part
        if len(read) > _MAX_BODY:
            raise EventError(
                "too_large", f"the body is larger than {_MAX_BODY:,} bytes; send fewer exclusions"
            )
    try:
        body = msgspec.json.decode(bytes(read))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventError("malformed_json", f"the body is not JSON ({error}); send one JSON object") from error
    if not isinstance(body, dict):
        raise EventError("invalid_field", 'the body is not a JSON object; send {"user_id": ...}')
    return body


def _trigger(body: dict[str, Any]) -> Trigger:
    """A trigger from a body that may leave out the fields of _FILLED_IN. Raises EventError."""
    filled = {
        "schema_version": SCHEMA_VERSION, "event_id": uuid.uuid4().hex, "request_id": uuid.uuid4().hex,
        "ts": time.time_ns() // 1_000_000,
    }  # fmt: skip
    return decode(Trigger, msgspec.json.encode(filled | body))


def _json(status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    return _json(status, {"error": detail}, headers)


def _schemas() -> dict[str, Any]:
    """JSON Schemas of the request and the response, from the event types."""
    _, schemas = msgspec.json.schema_components(
        [Trigger, Recommendation], ref_template="#/components/schemas/{name}"
    )
    request = schemas.pop("Trigger")
    request["title"] = "RecommendRequest"
    request["required"] = [name for name in request["required"] if name not in _FILLED_IN]
    return {
        **schemas,
        "RecommendRequest": request,
        "Problem": {
            "type": "object",
            "required": ["error"],
            "properties": {"error": {"type": "string", "description": "what is wrong, and the remedy"}},
        },
    }


def _operation(settings: GatewaySettings) -> dict[str, Any]:
    """The OpenAPI operation of POST /v1/recommend; FastAPI cannot derive it, as msgspec parses the bodies."""

    def content(name: str, description: str) -> dict[str, Any]:
        schema = {"schema": {"$ref": f"#/components/schemas/{name}"}}
        return {"description": description, "content": {"application/json": schema}}

    operation: dict[str, Any] = {
        "requestBody": {"required": True, **content("RecommendRequest", "who asks, and from which item")},
        "responses": {
            "200": content("Recommendation", "ranked items, best first"),
            "400": content("Problem", "a field is missing or wrong"),
            "409": content("Problem", "a request with this request_id is under way"),
            "503": content("Problem", "Kafka, a topic or the serving agents are not there"),
            "504": content("Problem", "no answer in time"),
        },
    }
    if settings.token is not None:
        operation["responses"]["401"] = content("Problem", "no token, or a wrong one")
    return operation
