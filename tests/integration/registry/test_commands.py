"""`codebook fit`, `gate`, `promote`, `rollback`, `arm` and `models` on Kafka, Redis and MLflow."""

import json

import numpy as np
import pytest
import redis
from typer.testing import CliRunner

from registry.arms import CHAMPION, DPO, SFT
from registry.bundles.embedder import WordLlamaEmbedder
from registry.experiment.decision import recompute
from registry.releases import release
from registry.releases.current_rollout import current_rollout
from registry.releases.rollout import assign
from registry.settings import RolloutSettings
from sidstream.cli import app
from sidstream.commands import registry as commands
from sidstream.commands.gate import gate
from streams.errors import SidstreamError
from streams.events import CatalogItem, SidAssignment
from streams.state import keys
from streams.wire.client import Client
from streams.wire.topic_reader import read_newest_events

pytestmark = pytest.mark.integration


def json_output(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def stack(fresh_stack, registry, monkeypatch):
    """Kafka, Redis and MLflow as the settings of the commands."""
    kafka, redis_address = fresh_stack()
    monkeypatch.setenv("SIDSTREAM_KAFKA__BOOTSTRAP", kafka.bootstrap)
    monkeypatch.setenv("SIDSTREAM_REDIS__URL", redis_address)
    monkeypatch.setenv("SIDSTREAM_CODEBOOK__SIZE", "8")
    for field, value in (
        ("TRACKING_URI", registry.tracking_uri),
        ("NAME", registry.name),
        ("CACHE", registry.cache),
    ):
        monkeypatch.setenv(f"SIDSTREAM_REGISTRY__{field}", str(value))
    return kafka, redis_address


def test_fitting_publishes_a_sid_for_every_item_and_a_codebook_that_agrees(stack, registry, capsys):
    kafka, _ = stack
    with pytest.raises(SidstreamError, match="the catalogue is empty"):
        commands.codebook_fit()
    words = ("red", "blue", "lamp", "mug", "tin", "zinc", "heart")
    with Client(kafka) as client:
        client.publish_all(
            CatalogItem.new(item_id=f"i{n}", title=f"{words[n % 7]} {words[n // 7 % 7]} {n % 13}")
            for n in range(300)
        )
        client.publish(CatalogItem.new(item_id="i0", title="a renamed lamp"))
        client.publish_raw("catalog", b"i1", b"no item")
    commands.codebook_fit(as_json=True)
    output = json_output(capsys)
    assert (output["items"], output["codebook"]) == (300, registry.current_codebook())
    sids = read_newest_events(kafka, SidAssignment)
    assert len(sids) == len({tuple(row.sid) for row in sids.values()}) == 300
    assert {row.codebook for row in sids.values()} == {output["codebook"]}
    # i0 is the first to choose a slot, so it has the greedy one of its newest title.
    (vector,) = WordLlamaEmbedder().embed(["a renamed lamp"])
    assert tuple(sids[f"{output['codebook']}/i0"].sid) == next(registry.codebook().candidates(vector))
    with pytest.raises(SidstreamError, match="--replace"):
        commands.codebook_fit()
    with pytest.raises(SidstreamError, match="nothing to replace"):
        commands.codebook_fit(replace=True, fresh=True)
    commands.codebook_fit(replace=True, as_json=True)
    after = json_output(capsys)
    assert after["replaced"] == output["codebook"] != after["codebook"]
    assert 150 < after["kept"] <= after["had"] == 300


def test_the_gate_judges_and_ends_the_running_trial(stack, registry, three, capsys):
    kafka, redis_address = stack
    with pytest.raises(SidstreamError, match="nothing is in service"):
        gate()
    with Client(kafka) as client:
        release.start(registry, client, three[0])
        with pytest.raises(SidstreamError, match="the last step was start"):
            gate()
        rollout = release.start_trial(registry, client, three[1], three[2], RolloutSettings())
    gate(conclude=True, as_json=True)
    early_output = json_output(capsys)
    assert (early_output["verdict"], early_output["concluded"]) == ("inconclusive", False)
    assert current_rollout(kafka, registry.name) == rollout
    random = np.random.default_rng(0)
    with redis.Redis.from_url(redis_address) as connection:
        pipeline = connection.pipeline()
        for n in range(3000):
            chosen = assign(rollout.trial, f"u{n}", rollout.arms)
            # Trials are drawn: with 20 impressions one draw in a hundred leaves the CTR in doubt.
            clicks = random.binomial(60, 0.2)
            orders = random.binomial(clicks, {CHAMPION: 0.2, SFT: 0.3, DPO: 0.4}[chosen.name])
            pipeline.hset(
                keys.sums(rollout.trial, f"u{n}"),
                mapping={
                    "arm": chosen.name,
                    "bundle": chosen.bundle,
                    "0:i": 60,
                    "0:c": int(clicks),
                    "0:o": int(orders),
                },
            )  # fmt: skip
        # What the agents write: the first hour is mature on every partition.
        rules = {"window_ms": 1, "lateness_ms": 1, "cohort_ms": 3_600_000, "partitions": 2}
        pipeline.hset(keys.outcomes_rules(), mapping=rules)
        for partition in range(2):
            pipeline.hset(keys.clock(partition), "outcomes", 3_700_000)
        pipeline.execute()
    gate()
    text = capsys.readouterr().out
    assert "challenger-dpo against challenger-sft: promote" in text
    assert "challenger-dpo against champion: promote" in text
    assert "verdict: promote challenger-dpo" in text
    assert current_rollout(kafka, registry.name) == rollout
    gate(conclude=True, as_json=True)
    output = json_output(capsys)
    assert (output["verdict"], output["winner"], output["concluded"]) == ("promote", DPO, True)
    assert sum(arm["users"] for arm in output["inputs"].values()) == 3000
    now = current_rollout(kafka, registry.name)
    assert (now.action, now.decision["decision"]) == ("promote", output["decision"])
    assert recompute(now.decision) == ("promote", DPO)
    run = CliRunner().invoke
    for record in (three[2], CHAMPION):
        assert f"verdict: {output['sentence']}" in run(app, ["gate", "recompute", record]).stdout
    with pytest.raises(SidstreamError, match="the last step was promote"):
        gate()
    commands.arm("u1", as_json=True)
    assert json_output(capsys) == {
        "arm": CHAMPION,
        "bundle": now.arms[0].bundle,
        "version": three[2],
        "trial": now.trial,
    }
    commands.rollback(as_json=True)
    assert json_output(capsys)["version"] == three[0]
    commands.promote(three[1], as_json=True)
    assert json_output(capsys)["version"] == three[1]
    assert current_rollout(kafka, registry.name).arms[0].version == three[1]
    commands.models(as_json=True)
    rows = {row["version"]: row for row in json_output(capsys)["models"]}
    assert rows[three[1]]["aliases"] == [CHAMPION]
    assert rows[three[2]]["kind"] == "dpo"
    commands.models()
    assert "champion" in capsys.readouterr().out


def test_an_inconclusive_trial_ends_only_when_asked_to(stack, registry, three, capsys):
    kafka, _ = stack
    with Client(kafka) as client:
        release.start(registry, client, three[0])
        release.start_trial(registry, client, three[1], None, RolloutSettings())
    gate(conclude=True, end=True, as_json=True)
    assert json_output(capsys)["concluded"] is True
    now = current_rollout(kafka, registry.name)
    assert (now.action, [arm.version for arm in now.arms]) == ("inconclusive", [three[0]])
