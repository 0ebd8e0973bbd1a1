"""What comes next follows from what was seen: shadow, canary, trial, verdict, watch."""

import numpy as np
import pytest

from registry.experiment.decision import recompute
from registry.experiment.health import ArmHealth
from registry.experiment.interim_analyses import interim_analyses
from registry.experiment.next_move import Evidence, Move, next_move
from registry.experiment.outcomes import ArmOutcomes
from registry.settings import GateSettings, GuardSettings, RolloutSettings
from streams.errors import SidstreamError
from streams.events import Arm, Rollout
from trainer.plots.trial_plot import draw_trial

HOUR = 3_600_000
SFT, CHAMPION, DPO, ANCHOR = "challenger-sft", "champion", "challenger-dpo", "anchor"


def rollout(action="trial", step=1.0, **weights) -> Rollout:
    weights = weights or {SFT: 0.3, CHAMPION: 0.4, DPO: 0.3}
    arms = [Arm(name, f"b-{name}", weight, str(n)) for n, (name, weight) in enumerate(weights.items())]
    return Rollout.new(name="r", action=action, trial="t", salt="s", step=step, arms=arms)


def outcomes_of(seed: int, users: int, cvr: float, ctr: float = 0.2, cohorts: int = 6) -> ArmOutcomes:
    random = np.random.default_rng(seed)
    shown = random.poisson(4, (users, cohorts)) + 1
    clicked = random.binomial(shown, ctr)
    return ArmOutcomes(
        tuple(range(cohorts)), np.stack([shown, clicked, random.binomial(clicked, cvr)], axis=2)
    )


def outcomes(cvrs=(0.2, 0.2, 0.2), ctrs=(0.2, 0.2, 0.2), users=4000) -> dict[str, ArmOutcomes]:
    return {
        name: outcomes_of(n, int(users * share), cvr, ctr)
        for n, (name, share, cvr, ctr) in enumerate(
            zip((CHAMPION, SFT, DPO), (0.4, 0.3, 0.3), cvrs, ctrs, strict=True)
        )
    }


def health(**requests: int) -> dict[str, ArmHealth]:
    names = {"sft": SFT, "dpo": DPO, "champion": CHAMPION, "anchor": ANCHOR}
    return {names[name]: ArmHealth(count, 0, 0.0, {10.0: count}) for name, count in requests.items()}


def move(current: Rollout, mature=None, recent=None, health=None, gate=None, **settings) -> Move:
    evidence = Evidence(mature or {}, recent if recent is not None else mature or {}, health or {}, HOUR)
    return next_move(current, evidence, RolloutSettings(**settings), GuardSettings(), gate or GateSettings())


@pytest.mark.parametrize("action", ["start", "reject", "inconclusive", "rollback"])
def test_with_nothing_on_trial_the_next_thing_is_to_train(action):
    assert move(rollout(action, None, champion=1.0)).do == "train"


def test_a_shadow_waits_for_requests_and_goes_on_to_the_canary_and_then_to_full_weights():
    shadow = rollout(step=0.0, **{SFT: 0.0, CHAMPION: 1.0, DPO: 0.0})
    waiting = move(shadow, health=health(sft=400, dpo=299))
    assert (waiting.do, waiting.step) == ("wait", None)
    assert "challenger-dpo 299 of 300" in waiting.sentence
    assert move(shadow).do == "wait"
    onward = move(shadow, health=health(sft=400, dpo=300))
    assert (onward.do, onward.step) == ("advance", 0.1)
    canary = rollout(step=0.1, **{SFT: 0.03, CHAMPION: 0.94, DPO: 0.03})
    assert move(canary, health=health(sft=300, dpo=300)).step == 1.0
    assert move(canary, health=health(sft=300, dpo=300), steps=[0.1, 0.5, 1.0]).step == 0.5


def test_a_ramp_is_never_judged_by_the_gate():
    better = outcomes((0.1, 0.5, 0.5))
    assert move(rollout(step=0.5), better).do == "wait"
    assert move(rollout(), better).do == "conclude"


def test_a_guard_ends_the_trial_at_any_step():
    for step in (0.0, 0.1, 1.0):
        failing = health(sft=500) | {DPO: ArmHealth(500, 100, 0.0, {10.0: 500})}
        concluded = move(rollout(step=step), health=failing)
        assert (concluded.do, concluded.record["mode"]) == ("conclude", "guard")
        assert recompute(concluded.record) == ("reject", CHAMPION)


def test_the_guard_on_clicks_sees_the_cohorts_that_are_still_open():
    lost = outcomes(ctrs=(0.2, 0.2, 0.1))
    assert move(rollout(), {}, lost).do == "conclude"
    assert move(rollout(), {}, outcomes()).do == "wait"


def test_a_trial_goes_on_until_it_is_decided_or_over():
    same = outcomes()
    waiting = move(rollout(), same)
    assert (waiting.do, waiting.record["verdict"]) == ("wait", "inconclusive")
    assert "6 of 336 hours" in waiting.sentence
    over = move(rollout(), same, max_hours=6)
    assert (over.do, over.record["verdict"], over.record["winner"]) == ("conclude", "inconclusive", CHAMPION)
    won = move(rollout(), outcomes((0.1, 0.1, 0.3)))
    assert (won.do, won.record["winner"]) == ("conclude", DPO)
    assert recompute(won.record) == ("promote", DPO)


def test_mode_fixed_looks_once_at_the_end():
    better, fixed = outcomes((0.1, 0.1, 0.3)), GateSettings(mode="fixed")
    early = move(rollout(), better, gate=fixed)
    assert (early.do, early.record) == ("wait", None)
    assert move(rollout(), better, gate=fixed, max_hours=6).record["winner"] == DPO


def test_a_promoted_model_is_watched_before_the_next_training_and_taken_back_where_it_fails():
    promoted = rollout("promote", None, **{CHAMPION: 0.98, ANCHOR: 0.02})
    assert move(promoted, health=health(champion=999)).do == "wait"
    assert move(promoted, health=health(champion=1000)).do == "train"
    failing = move(promoted, health={CHAMPION: ArmHealth(500, 100, 0.0, {10.0: 500})} | health(anchor=20))
    assert (failing.do, failing.record["winner"]) == ("rollback", "previous")
    lost = {CHAMPION: outcomes_of(1, 9000, 0.2, 0.1), ANCHOR: outcomes_of(2, 300, 0.2, 0.2)}
    assert move(promoted, {}, lost).do == "rollback"


def test_the_ramp_must_rise_to_full_weight():
    for steps in ([], [0.1], [0.5, 0.1, 1.0], [-0.1, 1.0], [0.1, 0.1, 1.0]):
        with pytest.raises(ValueError, match="steps"):
            RolloutSettings(steps=steps)


def test_the_looks_end_with_what_the_record_says_and_make_a_picture():
    data = outcomes((0.1, 0.1, 0.3))
    record = move(rollout(), data).record
    path = interim_analyses(data, GateSettings(), "sequential")
    assert [entry["cohort"] for entry in path] == list(range(6))
    for comparison in record["comparisons"]:
        last = path[-1][f"{comparison['target']} against {comparison['control']}"]
        assert last == {metric: comparison[metric] for metric in ("cvr", "ctr", "opm", "value")}
    intervals = [entry[f"{DPO} against {CHAMPION}"]["cvr"]["difference_interval"] for entry in path]
    widths = [high - low for low, high in intervals]
    assert widths == sorted(widths, reverse=True)
    assert draw_trial(record, path).startswith(b"\x89PNG")
    with pytest.raises(SidstreamError, match="nothing to draw"):
        draw_trial(record, [])


def test_at_most_forty_looks_are_kept_and_the_last_is_one():
    outcomes = {CHAMPION: outcomes_of(0, 50, 0.2, cohorts=130), SFT: outcomes_of(1, 50, 0.2, cohorts=130)}
    path = interim_analyses(outcomes, GateSettings(), "fixed")
    assert len(path) == 40
    assert path[-1]["cohort"] == 129
