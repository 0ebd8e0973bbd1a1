"""The gateway answers what the agent answered, and says in HTTP's terms what went wrong."""

from __future__ import annotations

import re
import threading
from concurrent.futures import Future

import pytest
from fastapi.testclient import TestClient

from serving.gateway import create_app
from serving.settings import GatewaySettings
from streams.errors import SidstreamError
from streams.events import RankedItem, Recommendation, decode


def answer_to(trigger) -> Recommendation:
    return Recommendation.new(
        request_id=trigger.request_id, user_id=trigger.user_id, scene=trigger.scene,
        items=[RankedItem(item_id=f"i{n}", sid=[1, n], score=-float(n)) for n in range(trigger.k)],
    )  # fmt: skip


class AnsweringClient:
    """Stands for the Kafka client: keeps the triggers and answers each by `answer`."""

    def __init__(self, answer=answer_to):
        self.answer = answer
        self.triggers = []
        self.closed = False

    def submit(self, trigger, timeout=30.0):
        self.triggers.append(trigger)
        future: Future = Future()
        try:
            future.set_result(self.answer(trigger))
        except SidstreamError as error:
            future.set_exception(error)
        return future

    def close(self):
        self.closed = True


def http(client=None, waiting=lambda: None, **settings):
    client = client or AnsweringClient()
    return TestClient(create_app(GatewaySettings(**settings), lambda: client, waiting))


def test_a_request_needs_no_more_than_a_user_and_its_answer_is_the_agents():
    client = AnsweringClient()
    with http(client) as caller:
        answer = caller.post("/v1/recommend", json={"user_id": "u", "item_id": "i", "k": 3, "scene": "home"})
    assert answer.status_code == 200
    recommendation = decode(Recommendation, answer.content)
    (trigger,) = client.triggers
    assert (trigger.user_id, trigger.item_id, trigger.k, trigger.scene) == ("u", "i", 3, "home")
    assert (recommendation.request_id, recommendation.scene) == (trigger.request_id, "home")
    assert [item.item_id for item in recommendation.items] == ["i0", "i1", "i2"]
    assert client.closed


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"item_id": "i"}', "user_id"),
        (b'{"user_id": ""}', "user_id is ''"),
        (b'{"user_id": "u", "k": 500}', "k is 500"),
        (b'{"user_id": "u", "exclude": "i"}', "exclude is 'i'"),
        (b'{"user_id": "u", "schema_version": 2}', "schema_version is 2"),
        (b'{"user_id": "u", "ts": 32503680000000}', "more than a day ahead"),
        (b"{user_id", "not JSON"),
        (b'"u"', "not a JSON object"),
        (b"\xff", "not JSON"),
        (b'{"user_id": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "not JSON"),
        (b'{"user_id": "' + b"u" * 300_000 + b'"}', "larger than"),
    ],
)
def test_a_wrong_body_is_refused_with_the_field_and_never_sent(body, says):
    client = AnsweringClient()
    with http(client) as caller:
        answer = caller.post("/v1/recommend", content=body)
    assert (answer.status_code, says in answer.json()["error"]) == (400, True), answer.text
    assert client.triggers == []


def late(trigger):
    raise SidstreamError(f"no answer to request {trigger.request_id}: check that serving runs")


@pytest.mark.parametrize(("waiting", "status"), [(None, 504), ("no serving agent has joined", 503)])
def test_no_answer_is_a_504_with_the_remedy_or_a_503_where_nobody_could_answer(waiting, status):
    with http(AnsweringClient(late), lambda: waiting) as caller:
        answer = caller.post("/v1/recommend", json={"user_id": "u"})
    assert answer.status_code == status
    assert (waiting or "check that serving runs") in answer.json()["error"]


def test_kafka_that_does_not_answer_is_a_503():
    def refuse():
        raise SidstreamError("Kafka at h:1 does not answer")

    with TestClient(create_app(GatewaySettings(), refuse, refuse)) as caller:
        answers = [caller.post("/v1/recommend", json={"user_id": "u"}), caller.get("/health/ready")]
        assert caller.get("/health/live").status_code == 200
    assert [answer.status_code for answer in answers] == [503, 503]
    assert all("Kafka at h:1" in answer.text for answer in answers)


def test_a_client_that_is_stuck_is_a_504():
    stuck = threading.Event()

    class Stuck(AnsweringClient):
        def submit(self, trigger, timeout=30.0):
            assert stuck.wait(60)
            return super().submit(trigger)

    with http(Stuck(), timeout_s=0.01) as caller:
        try:
            assert caller.post("/v1/recommend", json={"user_id": "u"}).status_code == 504
        finally:
            stuck.set()


def test_a_request_id_under_way_is_refused_to_the_second_caller():
    first_is_here, go_on = threading.Event(), threading.Event()

    def wait(trigger):
        first_is_here.set()
        assert go_on.wait(60)
        return answer_to(trigger)

    with http(AnsweringClient(wait), timeout_s=60) as caller:
        first = []
        body = {"user_id": "u", "request_id": "r"}
        asking = threading.Thread(target=lambda: first.append(caller.post("/v1/recommend", json=body)))
        asking.start()
        assert first_is_here.wait(60)
        second = caller.post("/v1/recommend", json=body)
        go_on.set()
        asking.join(60)
        third = caller.post("/v1/recommend", json=body)
    assert [answer.status_code for answer in (first[0], second, third)] == [200, 409, 200]


def test_with_a_token_only_its_bearer_is_served_and_health_stays_open():
    client = AnsweringClient()
    with http(client, token="s3cret") as caller:
        answers = [
            caller.post("/v1/recommend", json={"user_id": "u"}, headers=headers).status_code
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer s3cret"})
        ]
        assert caller.get("/health/live").status_code == 200
    assert answers == [401, 401, 200]
    assert len(client.triggers) == 1


def test_readiness_names_what_is_waited_for():
    with http(waiting=lambda: "no topic triggers") as caller:
        answer = caller.get("/health/ready")
    assert (answer.status_code, answer.json()["for"]) == (503, "no topic triggers")
    with http() as caller:
        assert caller.get("/health/ready").json() == {"status": "ready"}


def test_metrics_count_requests_by_status():
    with http() as caller:
        caller.post("/v1/recommend", json={"user_id": "u"})
        caller.post("/v1/recommend", json={})
        text = caller.get("/metrics").text
    assert 'sidstream_gateway_requests_total{status="200"} 1.0' in text
    assert 'sidstream_gateway_requests_total{status="400"} 1.0' in text
    assert "sidstream_gateway_seconds_count 2.0" in text


def test_openapi_describes_the_request_and_the_answer_by_the_event_types():
    with http() as caller:
        document = caller.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert schemas["RecommendRequest"]["required"] == ["user_id"]
    assert schemas["RecommendRequest"]["properties"]["k"]["maximum"] == 100
    assert set(schemas["RankedItem"]["properties"]) == {"item_id", "sid", "score"}
    operation = document["paths"]["/v1/recommend"]["post"]
    assert {"200", "400", "409", "503", "504"} <= set(operation["responses"])
    # Every reference leads somewhere.
    text = caller.get("/openapi.json").text
    for reference in set(re.findall(r'"#/components/schemas/(\w+)"', text)):
        assert reference in schemas
