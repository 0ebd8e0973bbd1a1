"""The ways in for people without a Kafka client: the gateway and `sidstream recommend`."""

from __future__ import annotations

import json
from functools import partial

import pytest
import typer
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from harness.servers import wait_until
from serving.gateway import create_app
from serving.readiness import waiting_for
from serving.settings import GatewaySettings, ServingSettings
from sidstream.commands import serving as commands
from streams.events import CatalogItem
from streams.wire.admin import delete_topics
from streams.wire.client import Client
from tests.integration.serving.test_serving import (
    PATIENCE_S,
    BundlesByVersion,
    catalogue,
    item,
    rollout,
    running,
)
from tests.tiny_bundle import write_tiny_bundle

pytestmark = pytest.mark.integration

GROUP = ServingSettings().group
SIZES = (4, 4, 4)


@pytest.fixture
def served(fresh_stack, tmp_path):
    """Kafka's settings, with an agent that answers from a bundle."""
    kafka, redis_url = fresh_stack()
    source = BundlesByVersion(v1=write_tiny_bundle(tmp_path / "v1", SIZES, 1))
    with Client(kafka) as client:
        client.publish_all(catalogue(range(32)))
        client.publish(
            CatalogItem.new(item_id=item(3), title="[bold]Mug[/bold] with a bracket", price=2.5, category="c")
        )
        client.publish(rollout(champion=("v1", source.bundles["v1"])))
    with running(kafka, redis_url, source) as agent:
        agent.wait_ready()
        yield kafka, source.bundles["v1"].id


def test_the_gateway_answers_over_http_what_the_agent_answers_over_kafka(served):
    kafka, bundle = served
    app = create_app(
        GatewaySettings(timeout_s=PATIENCE_S), partial(Client, kafka), partial(waiting_for, kafka, GROUP)
    )
    with TestClient(app) as caller:
        assert caller.get("/health/ready").json() == {"status": "ready"}
        body = {"user_id": "u", "item_id": item(0), "k": 5, "exclude": [item(3)]}
        answer = caller.post("/v1/recommend", json=body)
    assert answer.status_code == 200
    assert (answer.json()["bundle"], answer.json()["fallback"]) == (bundle, "trigger_only")
    item_ids = [answer["item_id"] for answer in answer.json()["items"]]
    assert len(item_ids) == 5
    assert not {item(0), item(3)} & set(item_ids)


def test_the_gateway_says_what_is_missing_until_an_agent_runs(fresh_stack):
    kafka, redis_url = fresh_stack()
    app = create_app(
        GatewaySettings(timeout_s=0.5), partial(Client, kafka), partial(waiting_for, kafka, GROUP)
    )
    with TestClient(app) as caller:
        wait_until(
            lambda: "no serving agent" in caller.get("/health/ready").text,
            PATIENCE_S,
            "the last agent to leave",
        )
        answer = caller.post("/v1/recommend", json={"user_id": "u"})
        assert (answer.status_code, "no serving agent" in answer.json()["error"]) == (503, True)
        with running(kafka, redis_url, BundlesByVersion()) as agent:
            agent.wait_ready()
            wait_until(lambda: caller.get("/health/ready").status_code == 200, PATIENCE_S, "the gateway")
    delete_topics(kafka)
    assert "create it with" in (waiting_for(kafka, GROUP) or "")


def run(kafka, monkeypatch, *arguments: str):
    monkeypatch.setenv("SIDSTREAM_KAFKA__BOOTSTRAP", kafka.bootstrap)
    monkeypatch.setenv("SIDSTREAM_KAFKA__PARTITIONS", str(kafka.partitions))
    monkeypatch.setenv("COLUMNS", "120")
    app = typer.Typer()
    app.command()(commands.recommend)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_recommend_prints_titles_prices_bundle_and_arm(served, monkeypatch):
    kafka, bundle = served
    as_json = json.loads(run(kafka, monkeypatch, "--user", "u", "--item", item(0), "-k", "31", "--json"))
    assert (as_json["bundle"], as_json["arm"], as_json["fallback"]) == (bundle, "champion", "trigger_only")
    assert len(as_json["items"]) == 31
    mug = next(answer for answer in as_json["items"] if answer["item_id"] == item(3))
    assert (mug["title"], mug["price"]) == ("[bold]Mug[/bold] with a bracket", 2.5)
    printed = run(kafka, monkeypatch, "--user", "u", "--item", item(0), "-k", "31")
    assert "on the page of 'Item 0'" in printed
    assert f"bundle {bundle}, arm champion" in printed
    assert "[bold]Mug[/bold] with a bracket" in printed
    assert "2.50" in printed
