"""Start, trial, conclusion, promotion and rollback on a real MLflow server."""

import json

import pytest

from harness.registry_support import arm_outcomes, bundle
from registry.arms import ANCHOR, CHAMPION, DPO, SFT
from registry.experiment.decision import decide, recompute
from registry.releases import release
from registry.releases.rollout import arm_of
from registry.settings import GateSettings, RolloutSettings
from streams.errors import SidstreamError
from streams.events import Arm, Rollout

pytestmark = pytest.mark.integration


def decided(rollout: Rollout, cvrs=(0.2, 0.27, 0.35)):
    names = (CHAMPION, SFT, DPO)
    # As many users as the weights deal out: 40, 30 and 30 percent.
    data = {
        name: arm_outcomes(cvr, n, users)
        for n, (name, cvr, users) in enumerate(zip(names, cvrs, (2800, 2100, 2100), strict=True))
    }
    return decide(rollout.trial, rollout.arms, data, GateSettings())


def test_a_start_makes_champion_and_anchor_and_may_be_repeated(registry, three, outbox):
    first = release.start(registry, outbox, three[0])
    assert (registry.alias(CHAMPION), registry.alias(ANCHOR)) == (three[0], three[0])
    repeated = release.start(registry, outbox, three[0])
    assert (repeated.event_id, repeated.trial, repeated.arms) == (first.event_id, first.trial, first.arms)
    with pytest.raises(SidstreamError, match="is champion already"):
        release.start(registry, outbox, three[1])
    assert first.arms == [Arm("champion", registry.fetch(three[0]).id, 1.0, three[0])]


def started(registry, outbox, three) -> Rollout:
    release.start(registry, outbox, three[0])
    return release.start_trial(registry, outbox, three[1], three[2], RolloutSettings())


def test_a_trial_gives_the_challengers_their_shares_under_a_new_salt(registry, three, outbox):
    rollout = started(registry, outbox, three)
    assert [(arm.name, arm.version, arm.weight) for arm in rollout.arms] == [
        (SFT, three[1], pytest.approx(0.3)), (CHAMPION, three[0], pytest.approx(0.4)),
        (DPO, three[2], pytest.approx(0.3)),
    ]  # fmt: skip
    assert (registry.alias(SFT), registry.alias(DPO)) == (three[1], three[2])
    second = release.start_trial(registry, outbox, three[1], None, RolloutSettings())
    assert second.trial != rollout.trial
    assert registry.alias(DPO) is None
    assert sum(arm.weight for arm in second.arms) == pytest.approx(1)
    for sft, dpo in ((three[0], three[1]), (three[1], three[1]), (three[1], three[0])):
        with pytest.raises(SidstreamError, match="with itself"):
            release.start_trial(registry, outbox, sft, dpo, RolloutSettings())


def test_a_trial_needs_a_champion(registry, three, outbox):
    with pytest.raises(SidstreamError, match="nothing is in service"):
        release.start_trial(registry, outbox, three[1], three[2], RolloutSettings())
    assert outbox.events == []


def test_a_promotion_crowns_the_winner_and_stores_a_record_that_recomputes(registry, three, outbox):
    record = decided(started(registry, outbox, three))
    assert record["winner"] == DPO
    rollout = release.conclude(registry, outbox, record, RolloutSettings())
    assert (rollout.action, rollout.decision) == ("promote", record)
    assert [(arm.name, arm.version, arm.weight) for arm in rollout.arms] == [
        (CHAMPION, three[2], pytest.approx(0.98)), (ANCHOR, three[0], 0.02),
    ]  # fmt: skip
    assert rollout.trial != record["trial"]
    assert registry.alias(CHAMPION) == three[2]
    assert (registry.alias(SFT), registry.alias(DPO), registry.alias(ANCHOR)) == (None, None, three[0])
    assert registry.tags(three[2])["previous-champion"] == three[0]
    states = [registry.tags(version)["state"] for version in three]
    assert states == ["promoted", "inconclusive", "promoted"]
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
    rollout = release.conclude(registry, outbox, record, RolloutSettings())
    assert rollout.action == verdict
    assert [(arm.version, arm.weight) for arm in rollout.arms] == [(three[0], 1.0)]
    assert (registry.alias(CHAMPION), registry.alias(SFT), registry.alias(DPO)) == (three[0], None, None)
    assert "previous-champion" not in registry.tags(three[0])


def test_a_trial_grows_by_steps_and_users_only_move_from_the_champion_to_a_challenger(
    registry, three, outbox
):
    release.start(registry, outbox, three[0])
    shadow = release.start_trial(registry, outbox, three[1], three[2], RolloutSettings(), 0.0)
    assert {arm.name: arm.weight for arm in shadow.arms} == {SFT: 0, CHAMPION: 1, DPO: 0}
    assert registry.tags(three[1])["state"] == "shadow"
    canary = release.advance(registry, outbox, 0.1, RolloutSettings())
    assert registry.tags(three[2])["state"] == "canary"
    full = release.advance(registry, outbox, 1.0, RolloutSettings())
    assert registry.tags(three[2])["state"] == "trial"
    assert len({shadow.trial, canary.trial, full.trial}) == 3
    assert shadow.salt == canary.salt == full.salt
    for user in map(str, range(3000)):
        path = [arm_of(rollout, user).name for rollout in (shadow, canary, full)]
        assert path == sorted(path, key=lambda name: name != CHAMPION)
        assert len(set(path) - {CHAMPION}) <= 1
    with pytest.raises(SidstreamError, match="at step 1"):
        release.advance(registry, outbox, 0.5, RolloutSettings())
    with pytest.raises(SidstreamError, match="out of date"):
        release.conclude(registry, outbox, decided(canary), RolloutSettings())
    assert release.conclude(registry, outbox, decided(full), RolloutSettings()).action == "promote"
    with pytest.raises(SidstreamError, match="no trial is running"):
        release.advance(registry, outbox, 1.0, RolloutSettings())


def test_the_hold_out_stays_on_the_anchor_in_and_between_trials(registry, three, outbox, tmp_path):
    release.start(registry, outbox, three[0])
    rollouts = [release.promote(registry, outbox, three[1], RolloutSettings())]
    rollouts.append(release.start_trial(registry, outbox, three[2], None, RolloutSettings()))
    rollouts.append(release.conclude(registry, outbox, decided(rollouts[-1]), RolloutSettings()))
    users = list(map(str, range(5000)))
    anchored = [{user for user in users if arm_of(rollout, user).name == ANCHOR} for rollout in rollouts]
    assert anchored[0] == anchored[1] == anchored[2]
    assert 50 < len(anchored[0]) < 150
    for rollout in rollouts:
        assert sum(arm.weight for arm in rollout.arms) == pytest.approx(1)


def test_an_anchor_of_an_earlier_codebook_keeps_its_hold_out_and_a_champion_of_one_comes_back(
    registry, three, outbox, tmp_path
):
    release.start(registry, outbox, three[0])
    newer = [registry.register(bundle(tmp_path, seed, codebook_seed=1)) for seed in (7, 8)]
    assert registry.fetch(three[0]).manifest.codebook != registry.fetch(newer[0]).manifest.codebook
    trial = release.start_trial(registry, outbox, newer[0], None, RolloutSettings())
    assert {arm.name: arm.version for arm in trial.arms} == {CHAMPION: three[0], SFT: newer[0]}
    for champion in newer:
        standing = release.promote(registry, outbox, champion, RolloutSettings())
        anchor = next(arm for arm in standing.arms if arm.name == ANCHOR)
        assert (anchor.version, anchor.weight) == (three[0], RolloutSettings().anchor)
    release.rollback(registry, outbox, RolloutSettings())
    restored = release.promote(registry, outbox, three[0], RolloutSettings())
    assert [(arm.name, arm.version) for arm in restored.arms] == [(CHAMPION, three[0])]


def test_a_trial_whose_begin_was_cut_short_is_begun_by_the_next_step(registry, three, outbox):
    release.start(registry, outbox, three[0])
    outbox.broken = True
    with pytest.raises(SidstreamError, match="Kafka"):
        release.start_trial(registry, outbox, three[1], three[2], RolloutSettings())
    assert "cut short" in release.unfinished(registry)
    begun = release.start_trial(registry, outbox, three[1], three[2], RolloutSettings())
    assert [event.action for event in outbox.events] == ["start", "trial"]
    assert outbox.events[-1] == begun
    assert release.unfinished(registry) is None


def test_a_conclusion_that_was_cut_short_is_finished_by_repeating_it(registry, three, outbox):
    record = decided(started(registry, outbox, three))
    outbox.broken = True
    with pytest.raises(SidstreamError, match="Kafka"):
        release.conclude(registry, outbox, record, RolloutSettings())
    assert outbox.events[-1].action == "trial"
    assert registry.alias(CHAMPION) == three[2]
    once = release.conclude(registry, outbox, record, RolloutSettings())
    twice = release.conclude(registry, outbox, record, RolloutSettings())
    assert (once.event_id, once.trial, once.arms) == (twice.event_id, twice.trial, twice.arms)
    assert registry.tags(three[2])["previous-champion"] == three[0]


def test_a_stale_or_forged_decision_is_refused(registry, three, outbox, tmp_path):
    rollout = started(registry, outbox, three)
    forged = decided(rollout, (0.2, 0.2, 0.2)) | {"verdict": "promote", "winner": DPO}
    with pytest.raises(SidstreamError, match="its sums say inconclusive"):
        release.conclude(registry, outbox, forged, RolloutSettings())
    swapped = decided(rollout) | {"winner": SFT}
    with pytest.raises(SidstreamError, match="winner"):
        release.conclude(registry, outbox, swapped, RolloutSettings())
    record = decided(rollout)
    later = registry.register(bundle(tmp_path, 9))
    release.start_trial(registry, outbox, later, None, RolloutSettings())
    with pytest.raises(SidstreamError, match="out of date"):
        release.conclude(registry, outbox, record, RolloutSettings())
    assert registry.alias(CHAMPION) == three[0]


def test_a_rollback_restores_the_predecessor_once_even_when_it_is_cut_short(registry, three, outbox):
    release.start(registry, outbox, three[0])
    release.promote(registry, outbox, three[1], RolloutSettings())
    release.promote(registry, outbox, three[2], RolloutSettings())
    outbox.broken = True
    with pytest.raises(SidstreamError, match="Kafka"):
        release.rollback(registry, outbox, RolloutSettings())
    rollout = release.rollback(registry, outbox, RolloutSettings())
    assert (rollout.action, rollout.arms[0].version, registry.alias(CHAMPION)) == (
        "rollback",
        three[1],
        three[1],
    )
    assert release.rollback(registry, outbox, RolloutSettings()).arms[0].version == three[0]
    with pytest.raises(SidstreamError, match="none before it"):
        release.rollback(registry, outbox, RolloutSettings())
    assert registry.decision(three[2])["verdict"] == "rollback"


def test_a_promotion_by_hand_may_be_repeated_and_ends_a_trial(registry, three, outbox):
    started(registry, outbox, three)
    release.promote(registry, outbox, three[1], RolloutSettings())
    rollout = release.promote(registry, outbox, three[1], RolloutSettings())
    assert (rollout.action, rollout.arms[0].version) == ("promote", three[1])
    assert registry.tags(three[1])["previous-champion"] == three[0]
    assert registry.alias(SFT) is None


def test_a_damaged_bundle_is_never_put_in_service(registry, three, outbox, mlflow_server):
    release.start(registry, outbox, three[0])
    version = registry.register(bundle_in_store := bundle(mlflow_server.artifacts.parent / registry.name, 77))
    for path in mlflow_server.artifacts.rglob("model.safetensors"):
        if path.read_bytes() == bytes([77]) * 100:
            path.write_bytes(b"x")
    with pytest.raises(SidstreamError, match="was changed"):
        release.promote(registry, outbox, version, RolloutSettings())
    assert registry.alias(CHAMPION) == three[0]
    assert [event.action for event in outbox.events] == ["start"]
    assert bundle_in_store.path.is_dir()


def test_the_champion_may_be_tried_against_itself_and_keeps_its_state(registry, three, outbox):
    release.start(registry, outbox, three[0])
    rollout = release.start_trial(registry, outbox, three[0], None, RolloutSettings())
    assert [(arm.name, arm.version) for arm in rollout.arms] == [(SFT, three[0]), (CHAMPION, three[0])]
    data = {SFT: arm_outcomes(0.2, 1, 3000), CHAMPION: arm_outcomes(0.2, 2, 4000)}
    record = decide(rollout.trial, rollout.arms, data, GateSettings())
    ended = release.conclude(registry, outbox, record, RolloutSettings())
    assert (ended.action, registry.alias(SFT)) == ("inconclusive", None)
    assert registry.tags(three[0])["state"] == "promoted"
    assert release.disagreement(registry, ended) is None
