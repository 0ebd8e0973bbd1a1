"""The unattended cycle on Kafka, Redis and MLflow: from shadow to promotion, and back where a guard fires.

Training is replaced by bundles that are there already; everything that decides is the product's.
"""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import redis
from typer.testing import CliRunner

from harness.registry_support import bundle
from registry.arms import CHAMPION, DPO, SFT
from registry.experiment.decision import recompute
from registry.releases import release
from registry.releases.current_rollout import current_rollout
from registry.releases.rollout import arm_of
from registry.settings import RolloutSettings
from sidstream.cli import app
from sidstream.continuous_delivery import ContinuousDelivery
from sidstream.settings import load
from streams.errors import SidstreamError
from streams.state import keys
from streams.wire.client import Client
from trainer.cycle_result import CycleResult

pytestmark = pytest.mark.integration

HOUR = 3_600_000


class Shop:
    """What agents and serving would have written of the current rollout."""

    def __init__(self, connection, kafka, name) -> None:
        self.redis, self.kafka, self.name = connection, kafka, name
        self.cvr = {SFT: 0.2, CHAMPION: 0.2, DPO: 0.35, "anchor": 0.2}
        rules = {"window_ms": 1, "lateness_ms": 1, "cohort_ms": HOUR, "partitions": 1}
        self.redis.hset(keys.outcomes_rules(), mapping=rules)
        self.redis.hset(keys.clock(0), "outcomes", 3 * HOUR)

    def visits(self, users: int) -> None:
        rollout = current_rollout(self.kafka, self.name)
        random = np.random.default_rng(1)
        pipeline = self.redis.pipeline()
        for user in map(str, range(users)):
            arm = arm_of(rollout, user)
            clicks = random.binomial(20, 0.2)
            orders = random.binomial(clicks, self.cvr[arm.name])
            mapping = {
                "arm": arm.name,
                "bundle": arm.bundle,
                "0:i": 20,
                "0:c": int(clicks),
                "0:o": int(orders),
            }
            pipeline.hset(keys.sums(rollout.trial, user), mapping=mapping)
        pipeline.execute()

    def answers(self, count: int, failed: int = 0, failing: str = DPO) -> None:
        rollout = current_rollout(self.kafka, self.name)
        for arm in rollout.arms:
            bad = failed if arm.name == failing else 0
            mapping = {f"{arm.name}:n": count, f"{arm.name}:failed": bad, f"{arm.name}:le:10": count}
            self.redis.hset(keys.health(rollout.trial), mapping=mapping)


@pytest.fixture
def loop(fresh_stack, registry, outbox, tmp_path, monkeypatch):
    kafka, redis_address = fresh_stack()
    monkeypatch.setenv("SIDSTREAM_KAFKA__BOOTSTRAP", kafka.bootstrap)
    monkeypatch.setenv("SIDSTREAM_REDIS__URL", redis_address)
    monkeypatch.setenv("SIDSTREAM_REGISTRY__TRACKING_URI", registry.tracking_uri)
    monkeypatch.setenv("SIDSTREAM_REGISTRY__NAME", registry.name)
    monkeypatch.setenv("SIDSTREAM_REGISTRY__CACHE", str(registry.cache))
    monkeypatch.setenv("SIDSTREAM_TRAINER__SCHEDULE__EVERY_MINUTES", "0.000001")
    settings = load()
    numbers = iter(range(100))

    with Client(kafka) as client, redis.Redis.from_url(redis_address) as connection:

        @contextmanager
        def promoting():
            yield registry, client

        def train() -> CycleResult:
            number = next(numbers)
            if number == 3:
                raise SidstreamError("the new model failed its offline check: HR@10 fell")
            sft = registry.register(bundle(tmp_path, 2 * number, "sft" if number else "base"))
            if not number:
                event = release.start(registry, client, sft)
                return CycleResult(versions={"base": sft}, action=event.action)
            dpo = registry.register(bundle(tmp_path, 2 * number + 1, "dpo"))
            event = release.start_trial(registry, client, sft, dpo, settings.rollout, 0.0)
            return CycleResult(versions={"sft": sft, "dpo": dpo}, action=event.action, trial=event.trial)

        cycle = ContinuousDelivery(
            settings, registry, connection, lambda: current_rollout(kafka, registry.name), train, promoting
        )
        yield cycle, Shop(connection, kafka, registry.name), client


def test_a_model_goes_from_shadow_to_champion_and_back_when_it_fails(loop, registry, outbox):
    cycle, shop, _ = loop
    assert [cycle.turn().did for _ in range(2)] == ["train", "train"]
    assert "answered challenger-sft 0" in cycle.turn().sentence
    shop.answers(300)
    assert cycle.turn().did == "advance"
    assert cycle.turn().did == "wait"
    shop.answers(300)
    assert cycle.turn().did == "advance"
    early = cycle.turn()
    assert (early.did, early.record["verdict"]) == ("wait", "inconclusive")
    shop.visits(4000)
    won = cycle.turn()
    assert (won.did, won.record["winner"]) == ("promote", DPO)
    assert recompute(won.record) == ("promote", DPO)
    assert won.details["picture"] == f"decisions/{won.record['decision']}.png"
    assert registry.alias(CHAMPION) == won.record["arms"][DPO]["version"]
    watching = cycle.turn()
    assert (watching.did, watching.record) == ("wait", None)
    assert "0 of 1000 requests" in watching.sentence
    shop.answers(400, failed=100, failing=CHAMPION)
    rolled_back = cycle.turn()
    assert (rolled_back.did, rolled_back.record["mode"]) == ("rollback", "guard")
    assert registry.alias(CHAMPION) == won.record["arms"][CHAMPION]["version"]
    assert registry.tags(won.record["arms"][DPO]["version"])["state"] == "rolled-back"
    now = shop_now(shop)
    assert (now.action, now.arms[0].version, now.decision) == ("rollback", "1", rolled_back.record)
    assert cycle.turn().did == "train"  # the next candidates
    shop.answers(300, failed=60)
    ended = cycle.turn()
    assert (ended.did, ended.record["mode"]) == ("reject", "guard")
    refused = cycle.turn()
    assert refused.did == "refuse"
    shown = json.loads(CliRunner().invoke(app, ["history", "--json"]).stdout)
    assert shown["attention"] is None
    sentences = [entry["sentence"] for entry in shown["entries"] if entry["version"] is None]
    assert sentences == [f"refuse: {refused.sentence}"]
    states = {entry["version"]: entry["state"] for entry in shown["entries"] if entry["version"]}
    assert states == {
        "1": "promoted", "2": "inconclusive", "3": "rolled-back", "4": "rejected", "5": "rejected",
    }  # fmt: skip
    text = CliRunner().invoke(app, ["history"]).stdout
    assert won.record["sentence"] in text
    assert rolled_back.record["sentence"] in text


def shop_now(shop):
    return current_rollout(shop.kafka, shop.name)


def test_a_step_that_was_cut_short_is_finished_before_anything_else(loop, registry, outbox):
    cycle, shop, _ = loop
    assert cycle.turn().did == "train"
    version = registry.register(bundle(registry.cache.parent, 50))
    outbox.broken = True
    with pytest.raises(SidstreamError, match="Kafka"):
        release.promote(registry, outbox, version, RolloutSettings())
    assert shop_now(shop).arms[0].version != version
    assert "attention: the step promote" in CliRunner().invoke(app, ["history"]).stdout
    assert cycle.turn().did == "promote"
    assert shop_now(shop).arms[0].version == version == registry.alias(CHAMPION)


def test_a_trial_in_its_ramp_is_not_judged_by_hand(loop):
    cycle, _, _ = loop
    cycle.turn()
    cycle.turn()
    result = CliRunner().invoke(app, ["gate", "--conclude"])
    assert "0% of its ramp" in str(result.exception)


def test_the_point_rule_is_refused_for_an_unattended_cycle(monkeypatch):
    monkeypatch.setenv("SIDSTREAM_GATE__MODE", "point")
    result = CliRunner().invoke(app, ["cycle"])
    assert "gate.mode is point" in str(result.exception)
