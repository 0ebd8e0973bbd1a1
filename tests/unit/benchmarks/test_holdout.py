"""The gate alone on ten trials in a row: what a hold-out on the first model stops, and what it lets pass."""

from benchmarks.holdout import GATE, SERIES, series
from benchmarks.rated_shop import Crowd
from harness.registry_support import arm_outcomes
from registry.arms import ANCHOR, CHAMPION, SFT
from registry.experiment.decision import judge
from registry.experiment.statistics import arm_sums

CROWD = Crowd()


def test_a_ratchet_goes_on_without_a_hold_out_and_ends_near_the_margin_with_one():
    alone, _ = series(1, 0.0, SERIES["ratchet"], CROWD)
    held, _ = series(1, 0.05, SERIES["ratchet"], CROWD)
    assert alone < 0.7
    assert 0.85 < held < 1


def test_a_hold_out_lets_good_models_pass():
    _, without = series(1, 0.0, SERIES["good"], CROWD)
    _, held = series(1, 0.05, SERIES["good"], CROWD)
    assert min(without, held) >= 6


def test_a_hold_out_with_too_few_users_promotes_nothing_and_says_what_to_do():
    users = {
        name: arm_sums(arm_outcomes(cvr, seed).total())
        for name, cvr, seed in ((SFT, 0.3, 1), (CHAMPION, 0.2, 2))
    }
    users[ANCHOR] = arm_sums(arm_outcomes(0.2, 3, users=60).total())
    weights = {SFT: 0.49, CHAMPION: 0.49, ANCHOR: 0.015}
    made = judge(users, GATE, "sequential", weights, {name: name for name in weights})
    assert made.comparisons[-1].verdict == "promote"
    assert (made.verdict, made.winner) == ("inconclusive", CHAMPION)
    assert "anchor has 60 users" in made.sentence
    assert "raise rollout.anchor" in made.sentence
