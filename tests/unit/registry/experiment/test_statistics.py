"""The gate's arithmetic against independent computations and published formulas."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.proportion import test_proportions_2indep as proportions_2indep

from registry.experiment import statistics
from registry.experiment.statistics import Estimate


def users(count, seed=0, ctr=0.05, cvr=0.05):
    """Users (count, 3) with rates of their own, so that impressions of a user are not independent."""
    random = np.random.default_rng(seed)
    shown = 1 + random.poisson(6, count)
    clicked = random.binomial(shown, random.beta(2, 2 / ctr - 2, count))
    bought = random.binomial(clicked, random.beta(2, 2 / cvr - 2, count))
    return np.stack([shown, clicked, bought], axis=1)


def residual_variance(num, den):
    """Var(R) written out: the variance over users of num - R den, by users and the mean of den squared."""
    value = num.sum() / den.sum()
    return np.var(num - value * den, ddof=1) / len(num) / den.mean() ** 2


@pytest.mark.parametrize("seed", range(5))
def test_the_variance_is_that_of_the_users_residuals(seed):
    shown, clicked, bought = users(500, seed, 0.2, 0.3).T
    arm = statistics.arm_sums(np.stack([shown, clicked, bought], axis=1))
    ctr, cvr = statistics.ctr(arm), statistics.cvr(arm)
    assert ctr.value == clicked.sum() / shown.sum()
    assert cvr.value == bought.sum() / clicked.sum()
    assert ctr.variance == pytest.approx(residual_variance(clicked, shown), rel=1e-12)
    assert cvr.variance == pytest.approx(residual_variance(bought, clicked), rel=1e-12)


def test_the_variance_is_the_published_delta_formula():
    # Growthbook's ratio statistic: (var_n/d^2 + n^2 var_d/d^4 - 2 n cov/d^3) / users, with means n, d.
    shown, clicked, _ = users(800, 3, 0.2).T
    n, d = clicked.mean(), shown.mean()
    cov = np.cov(clicked, shown)
    published = (cov[0, 0] / d**2 + n**2 * cov[1, 1] / d**4 - 2 * n * cov[0, 1] / d**3) / len(shown)
    estimate = statistics.ctr(statistics.arm_sums(np.stack([shown, clicked, clicked * 0], axis=1)))
    assert estimate.variance == pytest.approx(published, rel=1e-9)


def test_the_variance_is_the_cluster_robust_one_of_a_regression():
    # The mean of impressions coded 0/1, clustered by user: OLS on a constant with cluster-robust errors.
    shown, clicked, _ = users(300, 5, 0.2).T
    outcome = np.concatenate(
        [np.r_[np.ones(c), np.zeros(s - c)] for s, c in zip(shown, clicked, strict=True)]
    )
    groups = np.repeat(np.arange(len(shown)), shown)
    fit = OLS(outcome, np.ones(len(outcome))).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False}
    )
    estimate = statistics.ctr(statistics.arm_sums(np.stack([shown, clicked, clicked * 0], axis=1)))
    assert estimate.value == pytest.approx(fit.params[0])
    # statsmodels divides by n, ours by n - 1.
    assert estimate.variance * (len(shown) - 1) / len(shown) == pytest.approx(fit.bse[0] ** 2, rel=1e-9)


def two_arms(seed):
    """Impressions of two arms in long form: clicked or not, target or control, user."""
    arms = {"target": users(400, seed, 0.2)[:, :2], "control": users(300, seed + 50, 0.22)[:, :2]}
    clicked, target, groups = [], [], []
    for n, (shown, clicks) in enumerate(np.concatenate(list(arms.values()))):
        clicked += [1] * clicks + [0] * (shown - clicks)
        target += [n < 400] * shown
        groups += [n] * shown
    estimates = [
        statistics.ctr(statistics.arm_sums(np.column_stack([rows, rows[:, 1] * 0]))) for rows in arms.values()
    ]
    return np.array(clicked), np.array(target, dtype=float), np.array(groups), *estimates


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("factor", [1.0, 0.9])
def test_both_fixed_tests_are_those_of_a_cluster_robust_regression(seed, factor):
    clicked, is_target, groups, target, control = two_arms(seed)
    # One column an arm, so that the margin is a linear contrast of the coefficients.
    fit = OLS(clicked, np.column_stack([is_target, 1 - is_target])).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False}
    )
    theirs = fit.t_test([1.0, -factor])
    ours = statistics.contrast(target, control, factor)
    assert ours.estimate == pytest.approx(theirs.effect.item())
    # statsmodels divides by n, ours by n - 1, and the arms have 400 and 300 users.
    assert ours.z == pytest.approx(theirs.tvalue.item(), rel=2e-3)
    adjusted = (399 / 400) * target.variance + factor**2 * (299 / 300) * control.variance
    assert adjusted**0.5 == pytest.approx(theirs.sd.item(), rel=1e-9)
    assert (theirs.pvalue / 2).item() == pytest.approx(min(ours.p_above, ours.p_below), rel=0.05)


def test_with_one_impression_a_user_the_test_is_that_of_two_proportions():
    arms = [np.array([[1, 1, 0]] * clicks + [[1, 0, 0]] * (2000 - clicks)) for clicks in (260, 220)]
    target, control = (statistics.ctr(statistics.arm_sums(arm)) for arm in arms)
    theirs = proportions_2indep(260, 2000, 220, 2000, method="wald", alternative="larger")
    ours = statistics.contrast(target, control)
    assert ours.z == pytest.approx(theirs.statistic, rel=1e-3)
    assert ours.p_above == pytest.approx(theirs.pvalue, rel=1e-2)


def test_clustering_matters():
    shown, clicked, _ = users(20_000, 1).T
    estimate = statistics.ctr(statistics.arm_sums(np.stack([shown, clicked, clicked * 0], axis=1)))
    naive = estimate.value * (1 - estimate.value) / shown.sum()
    assert estimate.variance > 1.05 * naive


@given(st.floats(-8, 8))
def test_tails_are_those_of_the_normal_distribution(z):
    assert statistics.upper_tail(z) == pytest.approx(stats.norm.sf(z), rel=1e-9)


def test_a_contrast_is_the_two_sample_z_test():
    target, control = Estimate(0.055, 0.0000010), Estimate(0.050, 0.0000012)
    test = statistics.contrast(target, control)
    z = 0.005 / np.sqrt(0.0000022)
    assert test.z == pytest.approx(z)
    assert (test.p_above, test.p_below) == pytest.approx((stats.norm.sf(z), stats.norm.cdf(z)))
    low, high = statistics.normal_interval(test.estimate, test.standard_error, 0.05)
    assert (low, high) == pytest.approx(stats.norm.interval(0.9, 0.005, np.sqrt(0.0000022)))
    shifted = statistics.contrast(target, control, 0.9)
    assert shifted.z == pytest.approx((0.055 - 0.045) / np.sqrt(0.0000010 + 0.81 * 0.0000012))


rates = st.floats(0.01, 0.9)
variances = st.floats(1e-8, 1e-3)


@given(rates, variances, rates, variances, st.floats(0.5, 1.5), st.sampled_from([0.01, 0.05, 0.1]))
def test_a_ratio_is_in_fiellers_interval_exactly_when_its_contrast_is_not_rejected(
    tv, tvar, cv, cvar, factor, alpha
):
    target, control = Estimate(tv, tvar), Estimate(cv, cvar)
    critical = statistics.quantile(1 - alpha)
    interval = statistics.ratio_interval(target, control, critical)
    if interval is None:
        assert cv / np.sqrt(cvar) <= critical * (1 + 1e-9)
        return
    z = abs(statistics.contrast(target, control, factor).z)
    if abs(z - critical) < 1e-6:
        return
    assert (interval[0] <= factor <= interval[1]) == (z < critical)


def test_at_the_ends_of_fiellers_interval_the_test_is_just_at_its_critical_value():
    target, control = Estimate(0.22, 0.0004), Estimate(0.20, 0.0003)
    for alpha in (0.01, 0.05, 0.2):
        low, high = statistics.ratio_interval(target, control, statistics.quantile(1 - alpha))
        assert statistics.contrast(target, control, low).z == pytest.approx(stats.norm.isf(alpha))
        assert statistics.contrast(target, control, high).z == pytest.approx(-stats.norm.isf(alpha))


def test_what_has_no_ratio_has_no_estimate():
    none = statistics.arm_sums(np.zeros((0, 3), dtype=np.int64))
    assert statistics.ctr(none) is None
    single_user = statistics.arm_sums(np.array([[10, 2, 1]]))
    assert statistics.ctr(single_user) is None
    unshown = statistics.arm_sums(np.array([[0, 0, 0], [0, 0, 0]]))
    assert statistics.ctr(unshown) is None
    alike = statistics.ctr(statistics.arm_sums(np.array([[30, 3, 0], [70, 7, 0], [10, 1, 0]])))
    assert alike.variance == 0.0
    assert statistics.contrast(alike, alike) is None


def test_sums_of_large_counts_are_exact():
    arm = statistics.arm_sums(np.full((3, 3), 10**8, dtype=np.int64))
    assert arm.impressions_squared == 3 * 10**16
    assert statistics.ctr(arm).variance == 0.0
