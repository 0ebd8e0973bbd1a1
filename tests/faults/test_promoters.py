"""Promoters that race, die or sleep: always one champion, and record, aliases and traffic agree after."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from harness.promoter_worker import Promoters, agree, decided, killed_before, stopped_before
from harness.registry_support import bundle
from registry.arms import CHAMPION, DPO
from registry.bundles.store import STATE, Registry
from registry.releases import release
from registry.releases.lease import lease_key, promotion_lease
from registry.settings import RegistrySettings, RolloutSettings
from streams.errors import SidstreamError
from streams.settings import KafkaSettings
from streams.wire.admin import create_topics, delete_topics
from tests.conftest import MlflowServer

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def promoters(
    kafka: KafkaSettings,
    redis_url: str,
    mlflow_server: MlflowServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Promoters]:
    """Four versions, the first in service. Shared, since a process of promoters takes seconds to warm up."""
    delete_topics(kafka)
    create_topics(kafka)
    folder = tmp_path_factory.mktemp("promoters")
    registry = Registry(
        RegistrySettings(
            tracking_uri=mlflow_server.address, name=f"p-{uuid.uuid4().hex[:8]}", cache=folder / "cache"
        )
    )
    for seed in range(1, 5):
        assert registry.register(bundle(folder, seed)) == str(seed)
    pool = Promoters(kafka, redis_url, registry, folder)
    try:
        pool.take({"action": "start", "version": "1"})
        yield pool
    finally:
        pool.close()


def test_a_conclusion_killed_at_any_write_leaves_one_champion_and_is_finished_by_the_next(promoters):
    champions = []
    writes = None
    while writes is None:
        # The winner must be another one than the champion.
        winner = "3" if promoters.champion() == "2" else "2"
        record = decided(promoters.trial("4", winner))
        writes = killed_before(promoters, {"action": "conclude", "record": record}, len(champions))
        champions.append(promoters.champion())
    assert len(champions) == writes + 1 > 12
    # Three copies of the record, then the note: before it nothing has happened, after it the step holds.
    assert champions[:4] == ["1"] * 4
    assert champions[4:8] == ["2", "3", "2", "3"]


def test_two_promoters_at_the_same_time_leave_one_champion(promoters):
    promoters.take({"action": "promote", "version": "1"})
    by_hand = [{"action": "promote", "version": version} for version in ("2", "3")]
    for patience in (0.0, 30.0):
        outcomes = promoters.race(*by_hand, patience=patience)
        refused = [row["refused"] for row in outcomes if "done" not in row]
        assert all(not patience and "another process" in sentence for sentence in refused)
        assert any("done" in row for row in outcomes)
        assert agree(promoters) in ("2", "3")
    promoters.take(by_hand[0])
    record = decided(promoters.trial("1", "4"))
    outcomes = promoters.race(
        {"action": "conclude", "record": record}, {"action": "rollback"}, patience=30.0
    )  # fmt: skip
    assert any("done" in row for row in outcomes)
    agree(promoters)


def test_a_promoter_stopped_for_longer_than_its_lease_does_not_undo_the_next_ones_step(promoters):
    promoters.take({"action": "promote", "version": "1"})
    step = {"action": "promote", "version": "2"}
    writes = promoters.end(promoters.begin(step))["writes"]
    note, alias, publish = 1, writes - 5, writes - 2
    by_hand = {"action": "promote", "version": "3"}
    trial = {"action": "trial", "sft": "1", "dpo": "4", "step": 0.0}
    for n, others in ((note, [by_hand]), (alias, [by_hand, trial]), (publish, [by_hand])):
        promoters.take({"action": "promote", "version": "1"})
        # After the check of the lease, right before the write: the worst moment.
        outcome = stopped_before(promoters, step, n, *others)
        assert "lease" in outcome["refused"]
        assert promoters.champion() == "3"
    assert stopped_before(promoters, step, writes, {"action": "rollback"}) is None


def test_a_promoter_that_has_lost_its_lease_changes_nothing(promoters):
    registry, champion = promoters.registry, promoters.champion()
    other = "2" if champion == "1" else "1"

    def late() -> None:
        with promotion_lease(promoters.redis, registry.name):
            promoters.redis.set(lease_key(registry.name), "another", px=60_000)
            release.promote(registry, promoters.client, other, RolloutSettings())

    with pytest.raises(SidstreamError, match="was lost on the way"):
        late()
    promoters.redis.delete(lease_key(registry.name))
    assert agree(promoters) == champion


def test_a_decision_made_twice_is_published_as_it_was_stored(promoters):
    promoters.take({"action": "promote", "version": "1"})
    record = decided(promoters.trial("2", "3"))
    promoters.take({"action": "conclude", "record": record})
    promoters.take({"action": "conclude", "record": record | {"ts": record["ts"] + 1}})
    assert agree(promoters) == "3"


def test_a_step_over_a_running_trial_leaves_no_challenger_behind(promoters):
    promoters.take({"action": "promote", "version": "1"})
    promoters.trial("2", "3")
    promoters.trial("4", None)
    agree(promoters)
    promoters.take({"action": "start", "version": "1"})
    assert agree(promoters) == "1"


def test_an_advance_that_was_cut_short_is_finished_by_repeating_it(promoters):
    promoters.take({"action": "promote", "version": "1"})
    promoters.trial("2", "3", 0.1)
    advance = {"action": "advance", "step": 1.0}
    assert promoters.end(promoters.begin(advance, at=1)) is None
    assert promoters.take(advance).step == 1
    agree(promoters)


def test_a_guard_takes_back_nothing_but_what_it_has_looked_at(promoters):
    promoters.take({"action": "promote", "version": "1"})
    watched = promoters.take({"action": "promote", "version": "2"})
    promoters.take({"action": "promote", "version": "3"})
    alarm = {"decision": "d", "trial": watched.trial, "mode": "guard"}
    with pytest.raises(SidstreamError, match="out of date"):
        release.rollback(promoters.registry, promoters.client, RolloutSettings(), alarm)
    assert agree(promoters) == "3"


def test_what_disagrees_is_said(promoters):
    registry = promoters.registry
    promoters.take({"action": "promote", "version": "2"})
    rollout = promoters.serving()
    assert release.disagreement(registry, rollout) is None
    assert "nothing serves" in release.disagreement(registry, None)
    registry.set_alias(CHAMPION, "3")
    assert "alias champion names version 3" in release.disagreement(registry, rollout)
    registry.set_alias(CHAMPION, "2")
    registry.set_alias(DPO, "3")
    assert "alias challenger-dpo names version 3" in release.disagreement(registry, rollout)
    registry.drop_alias(DPO)
    registry.tag("2", STATE, "rejected")
    assert "tag state of version 2 is rejected" in release.disagreement(registry, rollout)
    registry.tag("2", STATE, "promoted")
    registry.store_decision("2", rollout.decision | {"sentence": "another"})
    assert "is not the one that was published" in release.disagreement(registry, rollout)
