"""The health server answers what a scraper and a probe ask, and nothing that the worker does not know."""

from __future__ import annotations

import json
import urllib.request
from urllib.error import HTTPError

import pytest
from prometheus_client import CollectorRegistry, Counter

from streams.errors import SidstreamError
from streams.wire.health_server import HealthServer

HOST = "127.0.0.1"


@pytest.fixture
def registry():
    registry = CollectorRegistry()
    Counter("sidstream_events", "Events", registry=registry).inc(3)
    return registry


@pytest.fixture
def start(registry):
    servers = []

    def start_server(waiting_for=None, port=0):
        servers.append(HealthServer(HOST, port, registry, "SIDSTREAM_X__METRICS_PORT", waiting_for))
        return servers[-1]

    yield start_server
    for server in servers:
        server.close()


def get(server, path, **headers):
    """Status, content type and body of a GET."""
    request = urllib.request.Request(f"http://{HOST}:{server.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def test_metrics_are_plain_text_or_openmetrics_as_the_scraper_asks(start):
    server = start()
    status, kind, text = get(server, "/metrics")
    assert (status, kind.split(";")[0]) == (200, "text/plain")
    assert "sidstream_events_total 3.0" in text
    _, kind, text = get(server, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")


def test_readiness_is_a_503_with_what_is_waited_for_until_nothing_is(start):
    waiting = ["the catalogue"]
    server = start(lambda: waiting[0] if waiting else None)
    status, _, body = get(server, "/health/ready")
    assert (status, json.loads(body)) == (503, {"status": "waiting", "for": "the catalogue"})
    assert get(server, "/health/live")[0] == 200
    waiting.clear()
    status, _, body = get(server, "/health/ready")
    assert (status, json.loads(body)) == (200, {"status": "ready"})


def test_a_worker_without_readiness_has_no_such_path_and_says_which_it_has(start):
    server = start()
    status, _, body = get(server, "/health/ready")
    assert (status, json.loads(body)) == (404, {"error": "try /health/live or /metrics"})
    assert json.loads(get(server, "/health/live")[2]) == {"status": "live"}


def test_a_taken_port_is_refused_with_the_setting_that_changes_it(start):
    port = start().port
    with pytest.raises(SidstreamError, match="set SIDSTREAM_X__METRICS_PORT to a free port"):
        start(port=port)
