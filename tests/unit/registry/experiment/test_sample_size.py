"""Sample sizes against published formulas and the power that they promise."""

import json
import math

import pytest
from scipy import stats
from statsmodels.stats.power import NormalIndPower
from typer.testing import CliRunner

from registry.experiment.sample_size import (
    ExpectedRates,
    TrialArms,
    anchor_power,
    power,
    power_curve,
    power_curve_text,
    users_needed,
)
from registry.settings import GateSettings
from sidstream.cli import app
from streams.errors import SidstreamError

SETTINGS = GateSettings()
ALONE, BOTH, HELD_OUT = TrialArms(1), TrialArms(2), TrialArms(2, 0.07)
PLAIN = ExpectedRates(cvr=0.05, lift=0.2, ctr=0.05, impressions_per_user=7, design_effect=1.0)


def test_a_fixed_trial_of_one_challenger_needs_what_the_textbook_says():
    # Where CTR is certain to keep its margin, orders per click and per impression are left: with a power of
    # .9, sqrt(.9) each. CVR by statsmodels, whose one variance for both arms is the mean of both.
    users = users_needed(PLAIN, SETTINGS, "fixed", ALONE)
    passed = {}
    for name, rate, trials in (("CVR", 0.05, 0.35 * users), ("OPM", 0.0025, 7.0 * users)):
        variance = (rate * (1 - rate) + 1.2 * rate * (1 - 1.2 * rate)) / 2
        passed[name] = NormalIndPower().power(0.2 * rate / math.sqrt(variance), trials, 0.05, 1, "larger")
    assert passed["CVR"] * passed["OPM"] == pytest.approx(0.9, abs=1e-4)


def test_where_the_lift_is_large_the_margin_of_ctr_decides():
    expected = ExpectedRates(cvr=0.2, lift=2.0, ctr=0.05, impressions_per_user=7, design_effect=1.0)
    shown = (stats.norm.isf(0.05) + stats.norm.isf(0.1)) ** 2 * 0.95 * (1 + 0.81) / (0.05 * 0.01)
    assert users_needed(expected, SETTINGS, "fixed", ALONE) == pytest.approx(shown / 7, rel=1e-3)


@pytest.mark.parametrize("arms", [ALONE, BOTH, HELD_OUT])
@pytest.mark.parametrize("mode", ["fixed", "sequential"])
@pytest.mark.parametrize("target_power", [0.5, 0.8, 0.95])
def test_the_planned_users_give_the_power_that_was_asked_for_and_fewer_do_not(mode, target_power, arms):
    # With these figures every test matters.
    expected = ExpectedRates(cvr=0.2, lift=0.18, ctr=0.05, impressions_per_user=7)
    users = users_needed(expected, SETTINGS, mode, arms, target_power)
    assert power(users, expected, SETTINGS, mode, arms) >= target_power
    assert power(users - 1, expected, SETTINGS, mode, arms) < target_power
    double = ExpectedRates(0.2, 0.18, 0.05, 7, expected.design_effect * 2)
    assert users_needed(double, SETTINGS, mode, arms, target_power) == pytest.approx(2 * users, abs=2)


def test_each_further_condition_costs_users():
    users = [users_needed(PLAIN, SETTINGS, "fixed", arms) for arms in (ALONE, BOTH, HELD_OUT)]
    assert users[0] * 1.2 < users[1] < users[2] < users[0] * 2
    fewer_clicks = ExpectedRates(cvr=0.05, lift=0.2, ctr=0.05, design_effect=1.0, ctr_change=-0.04)
    assert users_needed(fewer_clicks, SETTINGS, "fixed", BOTH) > 1.3 * users[1]


def test_a_hold_out_too_small_for_the_gate_promotes_nothing_at_any_size_below_its_least():
    expected = ExpectedRates(cvr=0.2, lift=1.0, ctr=0.2, impressions_per_user=200)
    assert users_needed(expected, SETTINGS, "fixed", BOTH) == SETTINGS.min_users
    users = users_needed(expected, SETTINGS, "fixed", HELD_OUT)
    assert round(users * HELD_OUT.anchor) == SETTINGS.min_users
    assert anchor_power(users - 2, expected, SETTINGS, HELD_OUT) == 0
    assert anchor_power(users, expected, SETTINGS, HELD_OUT) > 0.99


def test_sequential_evidence_costs_more_than_a_fixed_trial_and_not_three_times_as_much():
    fixed, sequential = (users_needed(PLAIN, SETTINGS, mode, BOTH) for mode in ("fixed", "sequential"))
    assert 1.3 * fixed < sequential < 2.5 * fixed


def test_the_curve_rises_through_the_planned_point():
    users = users_needed(PLAIN, SETTINGS, "sequential", BOTH)
    points = power_curve(users, PLAIN, SETTINGS, "sequential", BOTH)
    assert [value for _, value in points] == sorted(value for _, value in points)
    assert dict(points)[users] >= 0.9
    rows = power_curve_text(points).splitlines()
    assert len(rows) == len(points)
    assert rows[-1].count("#") == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cvr": 0}, "cvr is 0"),
        ({"cvr": 0.9, "lift": 0.2}, "lift is 0.2"),
        ({"lift": -0.1}, "lift is -0.1"),
        ({"lift": math.nan}, "lift is nan"),
        ({"ctr": 1.0}, "ctr is 1.0"),
        ({"impressions_per_user": 0}, "impressions-per-user is 0"),
        ({"design_effect": 0}, "design-effect is 0"),
        # CTR -10 % with CVR +10 % sells less: no such model is ever promoted.
        ({"ctr_change": -0.1}, "ctr-change is -0.1: it must be small enough that more is ordered"),
    ],
)
def test_impossible_figures_are_refused_by_name(change, message):
    with pytest.raises(SidstreamError, match=message):
        ExpectedRates(**({"cvr": 0.05, "lift": 0.1} | change))


def test_what_no_trial_can_show_is_refused():
    with pytest.raises(SidstreamError, match=r"raise gate\.margin"):
        users_needed(PLAIN, GateSettings(margin=0), "fixed", ALONE)
    with pytest.raises(SidstreamError, match="power is 1"):
        users_needed(PLAIN, SETTINGS, "fixed", ALONE, 1.0)


def test_the_command_says_users_days_and_the_curve():
    line = ["gate", "plan", "--cvr", ".05", "--lift", ".2", "--users-per-day", "10000"]
    output = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)
    # 2 % are held out on the anchor, and the smallest arm has 30 % of the others.
    share = 0.98 * 0.3
    users = users_needed(ExpectedRates(0.05, 0.2), SETTINGS, "sequential", TrialArms(anchor=0.02 / share))
    planned = output["modes"]["sequential"]
    assert (planned["users_per_arm"], planned["days"]) == (users, math.ceil(users / (10_000 * share)))
    assert (planned["impressions_per_arm"], planned["held_out_users"]) == (
        7 * users,
        round(users * 0.02 / share),
    )
    assert output["modes"]["fixed"]["users_per_arm"] < users
    text = CliRunner().invoke(app, [*line, "--mode", "fixed"]).stdout
    assert f"{users:,} users an arm" in text
    assert "mode fixed" in text
    assert "#" * 40 in text


def test_the_command_warns_of_a_hold_out_that_can_never_decide_and_of_a_trial_that_ends_too_soon():
    line = ["gate", "plan", "--cvr", ".2", "--lift", ".3", "--ctr", ".2", "--users-per-day"]
    text = CliRunner().invoke(app, [*line, "300"]).stdout
    # 14 days of 300 users, 2 % of them.
    assert "warning: the hold-out of 2.0% has 84 users" in text
    assert "raise rollout.anchor to 2.4% at least" in text
    assert "before its users have come" in text
    assert "warning" not in CliRunner().invoke(app, [*line, "30000"]).stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "point"], "wants no evidence"),
        (["--mode", "test"], "use sequential, fixed or point"),
        (["--share", "0"], "share is 0"),
        (["--users-per-day", "-1"], "users-per-day is -1"),
    ],
)
def test_the_command_refuses_what_it_cannot_plan(options, message):
    result = CliRunner().invoke(app, ["gate", "plan", "--cvr", ".05", "--lift", ".2", *options])
    assert isinstance(result.exception, SidstreamError)
    assert message in str(result.exception)
