"""The gate alone on ten trials in a row: what a hold-out on the first model stops, and what it lets pass."""

from benchmarks.holdout import GATE, SERIES, run_series
from benchmarks.true_rate_shop import SimulatedShoppers
from harness.registry_support import arm_outcomes
from registry.arms import ANCHOR, CHAMPION, SFT
from registry.experiment.decision import judge
from registry.experiment.statistics import arm_sums

SHOPPERS = SimulatedShoppers()


def test_a_ratchet_goes_on_without_a_hold_out_and_ends_near_the_margin_with_one():
    without_hold_out, *_ = run_series(1, 0.0, SERIES["ratchet"], SHOPPERS)
    with_hold_out, *_ = run_series(1, 0.05, SERIES["ratchet"], SHOPPERS)
    assert without_hold_out < 0.7
    assert 0.85 < with_hold_out < 1


def test_a_hold_out_lets_good_models_pass():
    *_, without = run_series(1, 0.0, SERIES["good"], SHOPPERS)
    *_, with_hold_out = run_series(1, 0.05, SERIES["good"], SHOPPERS)
    assert min(without, with_hold_out) >= 6


def test_a_series_that_sells_no_more_for_each_page_ends_without_a_hold_out_too():
    _, orders, promotions = run_series(1, 0.0, SERIES["less"], SHOPPERS)
    assert promotions <= 1
    assert orders > 0.98


def test_a_hold_out_with_too_few_users_promotes_nothing_and_says_what_to_do():
    users = {
        name: arm_sums(arm_outcomes(cvr, seed).total())
        for name, cvr, seed in ((SFT, 0.3, 1), (CHAMPION, 0.2, 2))
    }
    users[ANCHOR] = arm_sums(arm_outcomes(0.2, 3, users=60).total())
    weights = {SFT: 0.49, CHAMPION: 0.49, ANCHOR: 0.015}
    decision = judge(users, GATE, "sequential", weights, {name: name for name in weights})
    assert decision.comparisons[-1].verdict == "promote"
    assert (decision.verdict, decision.winner) == ("inconclusive", CHAMPION)
    assert "anchor has 60 users" in decision.sentence
    assert "raise rollout.anchor" in decision.sentence
