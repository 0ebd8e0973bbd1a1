"""Always-valid tests against the integral that they are, and on trials without an effect."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from registry.experiment import sequential, statistics
from registry.experiment.gate import compare
from registry.experiment.statistics import ArmSums, Estimate
from registry.settings import GateSettings

scales = st.floats(1e-3, 1.0)


@settings(deadline=None)  # the first quadrature imports scipy
@given(st.floats(-6, 6), scales, scales)
def test_the_likelihood_ratio_is_the_mixture_integral(z, error, tau):
    estimate = z * error

    def mixed(theta):
        return stats.norm.pdf(estimate, theta, error) * stats.norm.pdf(theta, 0, tau)

    # In theta the integrand is a normal density: ten standard deviations around its mean are all of it.
    spread = math.sqrt(1 / (1 / error**2 + 1 / tau**2))
    centre = estimate * spread**2 / error**2
    numerator, _ = integrate.quad(mixed, centre - 10 * spread, centre + 10 * spread, epsabs=0, epsrel=1e-10)
    direct = numerator / stats.norm.pdf(estimate, 0, error)
    assert sequential.log_likelihood_ratio(estimate, error**2, tau) == pytest.approx(
        math.log(direct), rel=1e-6, abs=1e-6
    )


@given(scales, scales, st.sampled_from([0.005, 0.05, 0.2]))
def test_at_the_boundary_the_likelihood_ratio_is_one_over_twice_alpha(error, tau, alpha):
    z = sequential.boundary(error**2, tau, alpha)
    assert sequential.log_likelihood_ratio(z * error, error**2, tau) == pytest.approx(-math.log(2 * alpha))
    assert z > statistics.quantile(1 - alpha)


rates = st.floats(0.01, 0.9)
variances = st.floats(1e-8, 1e-3)


@given(rates, variances, rates, variances, st.sampled_from([0.9, 1.0]), st.sampled_from([0.01, 0.05]))
def test_p_values_boundary_and_intervals_say_the_same(tv, tvar, cv, cvar, factor, alpha):
    target, control = Estimate(tv, tvar), Estimate(cv, cvar)
    tau = sequential.prior_scale(target, control, 0.1)
    test = statistics.contrast(target, control, factor)
    critical = sequential.boundary(test.standard_error**2, tau, alpha)
    if abs(abs(test.z) - critical) < 1e-6 * critical:
        return
    above, below = sequential.p_values(test, tau)
    assert (above < alpha) == (test.z > critical)
    assert (below < alpha) == (test.z < -critical)
    low, high = sequential.difference_interval(test, tau, alpha)
    assert (low > 0, high < 0) == (above < alpha, below < alpha)
    ratio = sequential.ratio_interval(target, control, tau, alpha)
    if ratio is not None:
        assert (ratio[0] > factor, ratio[1] < factor) == (above < alpha, below < alpha)


def test_at_the_ends_of_the_ratios_interval_the_contrast_is_just_at_its_boundary():
    target, control = Estimate(0.22, 0.0001), Estimate(0.20, 0.00008)
    low, high = sequential.ratio_interval(target, control, 0.02, 0.05)
    assert low < 1.1 < high
    for end, sign in ((low, 1), (high, -1)):
        test = statistics.contrast(target, control, end)
        assert sign * test.z == pytest.approx(sequential.boundary(test.standard_error**2, 0.02, 0.05))


def test_without_a_scale_there_is_no_evidence():
    test = statistics.contrast(Estimate(0.3, 1e-6), Estimate(0.2, 1e-6))
    assert sequential.p_values(test, 0.0) == (pytest.approx(0.5), 1.0)
    assert sequential.difference_interval(test, 0.0, 0.05) is None
    assert sequential.ratio_interval(Estimate(0.3, 1e-6), Estimate(0.2, 1e-6), 0.0, 0.05) is None


def test_a_control_without_an_order_is_measured_by_the_target():
    assert sequential.prior_scale(Estimate(0.3, 1e-4), Estimate(0.0, 0.0), 0.1) == pytest.approx(0.03)
    assert sequential.prior_scale(Estimate(0.3, 1e-4), Estimate(0.2, 1e-4), 0.1) == pytest.approx(0.02)


def looks(random, experiments, users, count):
    """Cumulative sums at each look of users with rates of their own: (experiments, looks, moments)."""
    shape = (experiments, users, count)
    clicks = random.poisson(1.0, shape).cumsum(axis=2).astype(float)
    rate = random.beta(8, 32, (experiments, users, 1))
    orders = (
        random.binomial(np.diff(clicks, axis=2, prepend=0).astype(int), rate).cumsum(axis=2).astype(float)
    )
    moments = (clicks, orders, clicks**2, orders**2, clicks * orders)
    return np.stack([moment.sum(axis=1) for moment in moments], axis=2)


def as_sums(users, row):
    clicks, orders, clicks2, orders2, product = (int(value) for value in row)
    # Five impressions a click for everybody: CTR neither varies nor differs, and CVR is what is judged.
    return ArmSums(users, 5 * clicks, clicks, orders, 25 * clicks2, clicks2, orders2, 5 * clicks2, product)


def test_without_an_effect_repeated_looks_fool_the_fixed_test_and_not_the_sequential_one():
    random = np.random.default_rng(5)
    experiments, users, count = 400, 300, 20
    target, control = (looks(random, experiments, users, count) for _ in range(2))
    settings = GateSettings()
    rejections = {"sequential": 0, "fixed": 0}
    for t, c in zip(target, control, strict=True):
        arms = [{"t": as_sums(users, x), "c": as_sums(users, y)} for x, y in zip(t, c, strict=True)]
        for mode in rejections:
            # Once is enough: this is somebody who stops at the first good look.
            rejections[mode] += any(
                compare("t", "c", arm, settings, mode).cvr["p_above"] < settings.alpha for arm in arms
            )
    # 20 looks with alpha .05: the level, and what is known of repeated tests (a quarter).
    assert rejections["sequential"] / experiments <= 0.05
    assert rejections["fixed"] / experiments > 0.15
