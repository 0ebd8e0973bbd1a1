"""Start, trial, conclusion, promotion and rollback on a real MLflow server."""

import json

import pytest

from registry import release
from registry.decision import decide, recompute
from registry.settings import GateSettings, RolloutSettings
from registry.store import ANCHOR, CHAMPION, DPO, SFT
from streams.errors import SidstreamError
from streams.events import Arm, Rollout
from tests.registry_support import arm_seen, bundle

pytestmark = pytest.mark.integration


def decided(rollout: Rollout, cvrs=(0.2, 0.27, 0.35)):
    names = (CHAMPION, SFT, DPO)
    # As many users as the weights deal out: 40, 30 and 30 percent.
    data = {
        name: arm_seen(cvr, n, users)
        for n, (name, cvr, users) in enumerate(zip(names, cvrs, (2800, 2100, 2100), strict=True))
    }
    return decide(rollout.trial, rollout.arms, data, GateSettings())


def test_a_start_makes_champion_and_anchor_and_may_be_repeated(registry, three, outbox):
    first = release.start(registry, outbox, three[0])
    assert (registry.alias(CHAMPION), registry.alias(ANCHOR)) == (three[0], three[0])
    again = release.start(registry, outbox, three[0])
    assert (again.event_id, again.trial, again.arms) == (first.event_id, first.trial, first.arms)
    with pytest.raises(SidstreamError, match="is champion already"):
        release.start(registry, outbox, three[1])
    assert first.arms == [Arm("champion", registry.fetch(three[0]).id, 1.0, three[0])]


def started(registry, outbox, three) -> Rollout:
    release.start(registry, outbox, three[0])
    return release.start_trial(registry, outbox, three[1], three[2], RolloutSettings())


def test_a_trial_gives_the_challengers_their_shares_under_a_new_salt(registry, three, outbox):
    rollout = started(registry, outbox, three)
    assert [(arm.name, arm.version, arm.weight) for arm in rollout.arms] == [
        (CHAMPION, three[0], pytest.approx(0.4)), (SFT, three[1], pytest.approx(0.3)),
        (DPO, three[2], pytest.approx(0.3)),
    ]  # fmt: skip
    assert (registry.alias(SFT), registry.alias(DPO)) == (three[1], three[2])
    second = release.start_trial(registry, outbox, three[1], None, RolloutSettings())
    assert second.trial != rollout.trial
    assert registry.alias(DPO) is None
    assert sum(arm.weight for arm in second.arms) == pytest.approx(1)
    with pytest.raises(SidstreamError, match="with itself"):
        release.start_trial(registry, outbox, three[0], None, RolloutSettings())


def test_a_trial_needs_a_champion(registry, three, outbox):
    with pytest.raises(SidstreamError, match="nothing is in service"):
        release.start_trial(registry, outbox, three[1], three[2], RolloutSettings())
    assert outbox.events == []


def test_a_promotion_crowns_the_winner_and_stores_a_record_that_recomputes(registry, three, outbox):
    record = decided(started(registry, outbox, three))
    assert record["winner"] == DPO
    rollout = release.conclude(registry, outbox, record)
    assert (rollout.action, rollout.decision) == ("promote", record)
    assert [(arm.name, arm.version, arm.weight) for arm in rollout.arms] == [(CHAMPION, three[2], 1.0)]
    assert rollout.trial != record["trial"]
    assert registry.alias(CHAMPION) == three[2]
    assert (registry.alias(SFT), registry.alias(DPO), registry.alias(ANCHOR)) == (None, None, three[0])
    assert registry.tags(three[2])["previous-champion"] == three[0]
    for version in three:
        stored = registry.decision(version)
        assert stored == json.loads(json.dumps(record))
        assert recompute(stored) == ("promote", DPO)


@pytest.mark.parametrize(
    ("cvrs", "verdict"), [((0.2, 0.12, 0.13), "reject"), ((0.2, 0.2, 0.2), "inconclusive")]
)
def test_without_promotion_the_champion_serves_everybody_again(registry, three, outbox, cvrs, verdict):
    record = decided(started(registry, outbox, three), cvrs)
    assert record["verdict"] == verdict
    rollout = release.conclude(registry, outbox, record)
    assert rollout.action == verdict
    assert [(arm.version, arm.weight) for arm in rollout.arms] == [(three[0], 1.0)]
    assert (registry.alias(CHAMPION), registry.alias(SFT), registry.alias(DPO)) == (three[0], None, None)
    assert "previous-champion" not in registry.tags(three[0])


def test_a_conclusion_that_was_cut_short_is_finished_by_repeating_it(registry, three, outbox):
    record = decided(started(registry, outbox, three))
    outbox.broken = True
    with pytest.raises(SidstreamError, match="Kafka"):
        release.conclude(registry, outbox, record)
    assert outbox.events[-1].action == "trial"
    assert registry.alias(CHAMPION) == three[2]
    once = release.conclude(registry, outbox, record)
    twice = release.conclude(registry, outbox, record)
    assert (once.event_id, once.trial, once.arms) == (twice.event_id, twice.trial, twice.arms)
    assert registry.tags(three[2])["previous-champion"] == three[0]


def test_a_stale_or_forged_decision_is_refused(registry, three, outbox, tmp_path):
    rollout = started(registry, outbox, three)
    forged = decided(rollout, (0.2, 0.2, 0.2)) | {"verdict": "promote", "winner": DPO}
    with pytest.raises(SidstreamError, match="its sums say inconclusive"):
        release.conclude(registry, outbox, forged)
    swapped = decided(rollout) | {"winner": SFT}
    with pytest.raises(SidstreamError, match="winner"):
        release.conclude(registry, outbox, swapped)
    record = decided(rollout)
    later = registry.register(bundle(tmp_path, 9))
    release.start_trial(registry, outbox, later, None, RolloutSettings())
    with pytest.raises(SidstreamError, match="out of date"):
        release.conclude(registry, outbox, record)
    assert registry.alias(CHAMPION) == three[0]


def test_a_rollback_restores_the_predecessor_once_even_when_it_is_cut_short(registry, three, outbox):
    release.start(registry, outbox, three[0])
    release.promote(registry, outbox, three[1])
    release.promote(registry, outbox, three[2])
    outbox.broken = True
    with pytest.raises(SidstreamError, match="Kafka"):
        release.rollback(registry, outbox)
    rollout = release.rollback(registry, outbox)
    assert (rollout.action, rollout.arms[0].version, registry.alias(CHAMPION)) == (
        "rollback",
        three[1],
        three[1],
    )
    assert release.rollback(registry, outbox).arms[0].version == three[0]
    with pytest.raises(SidstreamError, match="none before it"):
        release.rollback(registry, outbox)
    assert registry.decision(three[2])["verdict"] == "rollback"


def test_a_promotion_by_hand_may_be_repeated_and_ends_a_trial(registry, three, outbox):
    started(registry, outbox, three)
    release.promote(registry, outbox, three[1])
    rollout = release.promote(registry, outbox, three[1])
    assert (rollout.action, [arm.version for arm in rollout.arms]) == ("promote", [three[1]])
    assert registry.tags(three[1])["previous-champion"] == three[0]
    assert registry.alias(SFT) is None


def test_a_damaged_bundle_is_never_put_in_service(registry, three, outbox, server):
    release.start(registry, outbox, three[0])
    version = registry.register(bundle_in_store := bundle(server[1].parent / registry.name, 77))
    for path in server[1].rglob("model.safetensors"):
        if path.read_bytes() == bytes([77]) * 100:
            path.write_bytes(b"x")
    with pytest.raises(SidstreamError, match="was changed"):
        release.promote(registry, outbox, version)
    assert registry.alias(CHAMPION) == three[0]
    assert [event.action for event in outbox.events] == ["start"]
    assert bundle_in_store.path.is_dir()
