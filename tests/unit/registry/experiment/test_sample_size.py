"""Sample sizes against published formulas and the power that they promise."""

import json
import math

import pytest
from scipy import stats
from statsmodels.stats.power import NormalIndPower
from typer.testing import CliRunner

from registry.experiment.sample_size import ExpectedRates, power, power_curve, power_curve_text, users_needed
from registry.settings import GateSettings
from sidstream.cli import app
from streams.errors import SidstreamError

SETTINGS = GateSettings()
PLAIN = ExpectedRates(cvr=0.05, lift=0.2, ctr=0.05, impressions_per_user=7, design_effect=1.0)


def test_a_fixed_trial_needs_what_the_textbook_says():
    # Superiority decides here: (z_alpha + z_(beta/2))^2 (p(1-p) + q(1-q)) / (q - p)^2 clicks, .35 a user.
    clicks = (stats.norm.isf(0.05) + stats.norm.isf(0.1)) ** 2 * (0.05 * 0.95 + 0.06 * 0.94) / 0.01**2
    assert users_needed(PLAIN, SETTINGS, "fixed") == math.ceil(clicks / 0.35)
    # statsmodels, with one variance for both arms, as it has it: the mean of both.
    deviation = math.sqrt((0.05 * 0.95 + 0.06 * 0.94) / 2)
    published = NormalIndPower().solve_power(0.01 / deviation, alpha=0.05, power=0.9, alternative="larger")
    assert users_needed(PLAIN, SETTINGS, "fixed") == pytest.approx(published / 0.35, abs=1)


def test_where_the_lift_is_large_the_margin_of_ctr_decides():
    expected = ExpectedRates(cvr=0.2, lift=2.0, ctr=0.05, impressions_per_user=7, design_effect=1.0)
    shown = (stats.norm.isf(0.05) + stats.norm.isf(0.1)) ** 2 * 0.95 * (1 + 0.81) / (0.05 * 0.01)
    assert users_needed(expected, SETTINGS, "fixed") == math.ceil(shown / 7)


@pytest.mark.parametrize("mode", ["fixed", "sequential"])
@pytest.mark.parametrize("target_power", [0.5, 0.8, 0.95])
def test_the_planned_users_give_the_power_that_was_asked_for_and_fewer_do_not(mode, target_power):
    # With these figures both tests matter.
    expected = ExpectedRates(cvr=0.2, lift=0.18, ctr=0.05, impressions_per_user=7)
    users = users_needed(expected, SETTINGS, mode, target_power)
    assert power(users, expected, SETTINGS, mode) >= target_power
    assert power(users * 0.9, expected, SETTINGS, mode) < (1 + target_power) / 2
    double = ExpectedRates(0.2, 0.18, 0.05, 7, expected.design_effect * 2)
    assert users_needed(double, SETTINGS, mode, target_power) == pytest.approx(2 * users, abs=2)


def test_sequential_evidence_costs_more_than_a_fixed_trial_and_not_three_times_as_much():
    fixed, sequential = (users_needed(PLAIN, SETTINGS, mode) for mode in ("fixed", "sequential"))
    assert 1.5 * fixed < sequential < 2.5 * fixed


def test_the_curve_rises_through_the_planned_point():
    users = users_needed(PLAIN, SETTINGS, "sequential")
    points = power_curve(users, PLAIN, SETTINGS, "sequential")
    assert [value for _, value in points] == sorted(value for _, value in points)
    assert dict(points)[users] >= 0.8
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
    ],
)
def test_impossible_figures_are_refused_by_name(change, message):
    with pytest.raises(SidstreamError, match=message):
        ExpectedRates(**({"cvr": 0.05, "lift": 0.1} | change))


def test_what_no_trial_can_show_is_refused():
    with pytest.raises(SidstreamError, match=r"gate\.margin 0"):
        users_needed(PLAIN, GateSettings(margin=0), "fixed")
    with pytest.raises(SidstreamError, match="power is 1"):
        users_needed(PLAIN, SETTINGS, "fixed", 1.0)


def test_the_command_says_users_days_and_the_curve():
    line = ["gate", "plan", "--cvr", ".05", "--lift", ".2", "--users-per-day", "10000"]
    output = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)
    users = users_needed(ExpectedRates(0.05, 0.2), SETTINGS, "sequential")
    # 2 % are held out on the anchor, and the smallest arm has 30 % of the others.
    days = math.ceil(users / (10_000 * 0.98 * 0.3))
    assert output["modes"]["sequential"] == {"users_per_arm": users, "days": days}
    assert output["modes"]["fixed"]["users_per_arm"] < users
    text = CliRunner().invoke(app, [*line, "--mode", "fixed"]).stdout
    assert f"{users:,} users an arm" in text
    assert "mode fixed" in text
    assert "#" * 40 in text


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
