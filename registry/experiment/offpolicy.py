"""Off-policy estimates: the value of a policy from rewards that another policy logged, by reweighting.

Every function takes n logged rows: `w` (n,) = target probability / logged propensity of the action that was
taken, `r` (n,) the reward, `users` (n,) whose row it is (numbers or names). Rows of one user are not
independent, so variances are over users: rows of a user are one cluster. An estimate is None where there are
fewer than two users, or nothing has weight.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from registry.experiment.statistics import Estimate, normal_interval

Floats = npt.NDArray[np.float64]


def _ratio(num: Floats, den: Floats, users: npt.NDArray[np.generic]) -> Estimate | None:
    """V = sum(num) / sum(den) over rows, with the user-clustered variance of the delta method.

    Var(V) = G / (G - 1) * sum_g (sum_{i in g} num_i - V den_i)^2 / sum(den)^2 with G users (Deng, Knoblich
    and Lu 2018, section 3; the sandwich of Liang and Zeger 1986). A user's number of rows is random too, so
    a mean is such a ratio as well, with den = 1.
    """
    names, of = np.unique(users, return_inverse=True)
    total = float(den.sum())
    if len(names) < 2 or total <= 0:
        return None
    value = float(num.sum()) / total
    # Divided before they are squared: the square of a very small total is zero.
    residuals = np.bincount(of, weights=(num - value * den) / total, minlength=len(names))
    return Estimate(value, len(names) / (len(names) - 1) * float(residuals @ residuals))


def mean(values: Floats, users: npt.NDArray[np.generic]) -> Estimate | None:
    """The mean of rows (n,): of the rewards, the value of the policy that logged them."""
    return _ratio(values, np.ones(len(values)), users)


def ips(w: Floats, r: Floats, users: npt.NDArray[np.generic]) -> Estimate | None:
    """Inverse propensity scoring, mean(w r) (Horvitz and Thompson 1952). Unbiased; may leave r's range."""
    return mean(w * r, users)


def clipped_ips(w: Floats, r: Floats, users: npt.NDArray[np.generic], clip: float) -> Estimate | None:
    """mean(min(w, clip) r) (Ionides 2008, "Truncated importance sampling"). Biased downward for r >= 0."""
    return mean(np.minimum(w, clip) * r, users)


def snips(w: Floats, r: Floats, users: npt.NDArray[np.generic]) -> Estimate | None:
    """Self-normalised IPS, sum(w r) / sum(w) (Swaminathan and Joachims 2015, "The self-normalized estimator
    for counterfactual learning"). Slightly biased; stays within the range of r."""
    return _ratio(w * r, w, users)


def doubly_robust(
    w: Floats, r: Floats, q_chosen: Floats, q_pi: Floats, users: npt.NDArray[np.generic]
) -> Estimate | None:
    """mean(q_pi + w (r - q_chosen)) (Dudik, Langford and Li 2011, equation 1).

    `q_chosen` (n,) is a model's reward of the action that was taken, `q_pi` (n,) its mean reward under the
    target policy. Unbiased where the propensities are right, whatever the model; exact where the model is.
    """
    return doubly_robust_contrast(w, r, q_chosen, q_pi, users, 0.0)


def doubly_robust_contrast(
    w: Floats, r: Floats, q_chosen: Floats, q_pi: Floats, users: npt.NDArray[np.generic], factor: float
) -> Estimate | None:
    """Doubly robust value of the target minus `factor` times the mean reward that was logged.

    Both come from the same rows: one mean of q_pi + w (r - q_chosen) - factor r, so that its variance has
    their covariance in it.
    """
    return mean(q_pi + w * (r - q_chosen) - factor * r, users)


def effective_sample_size(w: Floats) -> float:
    """(sum w)^2 / sum(w^2) (Kish 1965): how many rows of equal weight say as much. 0 without weight."""
    # Scaled first: the squares of very large or small weights have no place in a float.
    top = float(np.max(w, initial=0.0))
    if top <= 0:
        return 0.0
    scaled = w / top
    return float(scaled.sum() ** 2 / (scaled @ scaled))


def interval(estimate: Estimate, alpha: float) -> tuple[float, float]:
    """The two-sided 1 - 2 alpha interval of the normal approximation: each end is a one-sided alpha bound."""
    return normal_interval(estimate.value, math.sqrt(estimate.variance), alpha)
