"""Simulated trials for benchmarks of the gate: users of heavy-tailed activity, a bot, a truth for each arm.

Users arrive at some look and come back at later ones. How often a user comes is lognormal: a tenth of the
users see about half of what is shown. Every user has rates of click and purchase of their own
(beta-distributed). A look is a cohort, and what counts of a user is what the gate counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from registry.arms import ANCHOR, CHAMPION, DPO, SFT
from registry.experiment.outcomes import ArmOutcomes
from registry.experiment.statistics import ArmSums, ctr, cvr, opm
from registry.settings import RolloutSettings

LOOKS = 20
BOT_IMPRESSIONS = 20_000
# A trial of two weeks has 336 hourly cohorts; this is a multiple of LOOKS near it, of 50 impressions each.
BOT_COHORTS = 400


@dataclass(frozen=True)
class Population:
    """Users who each open `pages` pages of `page` items on average (Poisson, times a lognormal activity).

    Beta-distributed rates, whose means are `ctr` and `cvr`, have a + b = `cohesion`: between users they vary
    by sqrt(mean (1 - mean) / (cohesion + 1)). `spread`: standard deviation of the logarithm of activity.
    """

    name: str
    ctr: float
    cvr: float
    page: int
    pages: float
    cohesion: float = 40.0
    spread: float = 1.0


@dataclass(frozen=True)
class Truth:
    """An arm's rates over the champion's."""

    ctr: float = 1.0
    cvr: float = 1.0


@dataclass(frozen=True)
class Scenario:
    """Trials with a truth: `users` dealt to champion, challengers and hold-out by the default weights."""

    population: Population
    users: int
    max_impressions: int
    sft: Truth = Truth()
    dpo: Truth = Truth()
    has_bot: bool = True


def arm_weights(rollout: RolloutSettings) -> dict[str, float]:
    """The shares of users of a trial with both challengers and the hold-out; they sum to 1."""
    shares = {CHAMPION: rollout.champion, SFT: rollout.sft, DPO: rollout.dpo}
    total = sum(shares.values())
    of_others = (1 - rollout.anchor) / total
    return {name: share * of_others for name, share in shares.items()} | {ANCHOR: rollout.anchor}


def draw_arm(random: np.random.Generator, population: Population, users: int, truth: Truth) -> ArmOutcomes:
    """What `users` users see, click and buy, by look. Users who never come have zeros."""
    activity = np.exp(population.spread * random.standard_normal(users) - population.spread**2 / 2)
    pages = random.poisson(population.pages * activity)
    user = np.repeat(np.arange(users), pages)
    arrival = random.integers(0, LOOKS, users)[user]
    look = arrival + (random.random(len(user)) * (LOOKS - arrival)).astype(np.int64)
    counts = np.zeros((users * LOOKS, 3), np.int64)
    counts[:, 0] = population.page * np.bincount(user * LOOKS + look, minlength=len(counts))
    cells = np.flatnonzero(counts[:, 0])

    def rate(mean: float, factor: float) -> npt.NDArray[np.float64]:
        alpha, beta = mean * population.cohesion, (1 - mean) * population.cohesion
        return np.minimum(random.beta(alpha, beta, users) * factor, 1.0)[cells // LOOKS]

    counts[cells, 1] = random.binomial(counts[cells, 0], rate(population.ctr, truth.ctr))
    counts[cells, 2] = random.binomial(counts[cells, 1], rate(population.cvr, truth.cvr))
    return ArmOutcomes(tuple(range(LOOKS)), counts.reshape(users, LOOKS, 3))


def bot_outcomes(max_impressions: int) -> ArmOutcomes:
    """A bot that sees BOT_IMPRESSIONS evenly over all looks, clicks on every other item and buys nothing.

    It comes all the time, in BOT_COHORTS of the cohorts that the limit reads; by look, after the limit.
    """
    shown = BOT_IMPRESSIONS // BOT_COHORTS
    cohorts = ArmOutcomes(
        tuple(range(BOT_COHORTS)), np.tile(np.array([shown, shown // 2, 0]), (1, BOT_COHORTS, 1))
    )
    counts = cohorts.capped(max_impressions).counts.reshape(1, LOOKS, -1, 3).sum(axis=2)
    return ArmOutcomes(tuple(range(LOOKS)), counts)


def sums_at_looks(outcomes: ArmOutcomes) -> list[ArmSums]:
    """The sums of an arm at each look, over the cohorts so far."""
    # Whole numbers far below 2^53: exact in doubles, and products of doubles are quick.
    shown, clicked, bought = np.cumsum(outcomes.counts, axis=1, dtype=np.float64).transpose(2, 0, 1)

    def moment(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        product: npt.NDArray[np.float64] = np.einsum("ul,ul->l", left, right)
        return product

    columns = {
        "users": (shown > 0).sum(axis=0),
        "impressions": shown.sum(axis=0),
        "clicks": clicked.sum(axis=0),
        "orders": bought.sum(axis=0),
        "impressions_squared": moment(shown, shown),
        "clicks_squared": moment(clicked, clicked),
        "orders_squared": moment(bought, bought),
        "impressions_clicks": moment(shown, clicked),
        "clicks_orders": moment(clicked, bought),
        "impressions_orders": moment(shown, bought),
    }
    return [ArmSums(**{name: int(column[n]) for name, column in columns.items()}) for n in range(LOOKS)]


def draw_trial(
    random: np.random.Generator, scenario: Scenario, weights: Mapping[str, float]
) -> list[dict[str, ArmSums]]:
    """The sums of every arm at each look; champion and hold-out have the population's rates."""
    sizes = random.multinomial(scenario.users, list(weights.values()))
    bots_arm = int(random.choice(len(weights), p=list(weights.values()))) if scenario.has_bot else -1
    truths = {SFT: scenario.sft, DPO: scenario.dpo}
    arms = {}
    for n, name in enumerate(weights):
        users = draw_arm(random, scenario.population, int(sizes[n]), truths.get(name, Truth()))
        outcomes = users.capped(scenario.max_impressions)
        if n == bots_arm:
            bot = bot_outcomes(scenario.max_impressions)
            outcomes = ArmOutcomes(bot.cohorts, np.concatenate([outcomes.counts, bot.counts]))
        arms[name] = sums_at_looks(outcomes)
    return [{name: sums[look] for name, sums in arms.items()} for look in range(LOOKS)]


def pilot(population: Population, max_impressions: int, users: int = 200_000) -> tuple[float, float, float]:
    """What a shop knows of itself before a trial: impressions a user who comes, the share of users who come,
    and the design effect, the largest of the three metrics'."""
    outcomes = draw_arm(np.random.default_rng(0), population, users, Truth())
    arm = sums_at_looks(outcomes.capped(max_impressions))[-1]
    effects = []
    for metric, count, of in (
        (ctr, arm.clicks, arm.impressions),
        (cvr, arm.orders, arm.clicks),
        (opm, arm.orders, arm.impressions),
    ):
        estimate = metric(arm)
        assert estimate is not None
        effects.append(estimate.variance / (count / of * (1 - count / of) / of))
    return arm.impressions / arm.users, arm.users / users, max(effects)
