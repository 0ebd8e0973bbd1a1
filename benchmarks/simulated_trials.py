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

Ints = npt.NDArray[np.int64]

LOOKS = 20
_COUNTS = ("impressions", "clicks", "orders")
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


@dataclass(frozen=True)
class UserLooks:
    """One entry for each look of each user that saw something: (N,), by user, then by look."""

    user: Ints
    look: Ints
    counts: tuple[Ints, Ints, Ints]  # impressions, clicks, orders

    def cumulative(self) -> tuple[Ints, Ints, Ints]:
        """The counts of the same user up to and including each entry."""
        is_first = np.diff(self.user, prepend=-1) != 0
        begin = np.maximum.accumulate(np.where(is_first, np.arange(len(self.user)), 0))

        def within_user(column: Ints) -> Ints:
            total = np.cumsum(column)
            return total - (total - column)[begin]

        shown, clicked, bought = map(within_user, self.counts)
        return shown, clicked, bought

    def capped(self, max_impressions: int) -> UserLooks:
        """As ArmOutcomes.capped, each look a cohort."""
        return self.where(self.cumulative()[0] <= max_impressions)

    def where(self, mask: npt.NDArray[np.bool_]) -> UserLooks:
        """The entries where the mask (N,) is true."""
        shown, clicked, bought = (column[mask] for column in self.counts)
        return UserLooks(self.user[mask], self.look[mask], (shown, clicked, bought))


def draw_arm(random: np.random.Generator, population: Population, users: int, truth: Truth) -> UserLooks:
    """What `users` users see, click and buy, by look."""
    activity = np.exp(population.spread * random.standard_normal(users) - population.spread**2 / 2)
    pages = random.poisson(population.pages * activity)
    user = np.repeat(np.arange(users), pages)
    arrival = random.integers(0, LOOKS, users)[user]
    look = arrival + (random.random(len(user)) * (LOOKS - arrival)).astype(np.int64)
    cells, pages_of_cell = np.unique(user * LOOKS + look, return_counts=True)
    user, look = np.divmod(cells, LOOKS)

    def rate(mean: float, factor: float) -> npt.NDArray[np.float64]:
        alpha, beta = mean * population.cohesion, (1 - mean) * population.cohesion
        return np.minimum(random.beta(alpha, beta, users) * factor, 1.0)[user]

    shown = population.page * pages_of_cell
    clicked = random.binomial(shown, rate(population.ctr, truth.ctr))
    bought = random.binomial(clicked, rate(population.cvr, truth.cvr))
    return UserLooks(user, look, (shown, clicked, bought))


def with_bot(users: UserLooks, max_impressions: int) -> UserLooks:
    """The users, and a bot that sees BOT_IMPRESSIONS evenly over all looks, clicks on every other item and
    buys nothing.

    It comes all the time, in BOT_COHORTS of the cohorts that the limit reads.
    """
    shown = BOT_IMPRESSIONS // BOT_COHORTS
    cohorts = ArmOutcomes(
        tuple(range(BOT_COHORTS)), np.tile(np.array([shown, shown // 2, 0]), (1, BOT_COHORTS, 1))
    )
    by_look = cohorts.capped(max_impressions).counts.reshape(LOOKS, -1, 3).sum(axis=1)
    look = np.flatnonzero(by_look[:, 0])
    bot = users.user.max(initial=-1) + 1
    shown_items, clicked, bought = (
        np.concatenate([of_users, of_bot])
        for of_users, of_bot in zip(users.counts, by_look[look].T, strict=True)
    )
    return UserLooks(
        np.concatenate([users.user, np.full(len(look), bot)]),
        np.concatenate([users.look, look]),
        (shown_items, clicked, bought),
    )


def sums_at_looks(users: UserLooks) -> list[ArmSums]:
    """The sums of an arm at each look, over the cohorts so far."""
    after = dict(zip(_COUNTS, users.cumulative(), strict=True))
    of_look = dict(zip(_COUNTS, users.counts, strict=True))
    is_first = np.diff(users.user, prepend=-1) != 0

    def up_to_look(change: Ints) -> list[int]:
        # Whole numbers far below 2^53: exact in doubles.
        total: list[int] = (
            np.cumsum(np.bincount(users.look, weights=change, minlength=LOOKS)).astype(np.int64).tolist()
        )
        return total

    def moment(left: str, right: str) -> list[int]:
        before = (after[left] - of_look[left]) * (after[right] - of_look[right])
        return up_to_look(after[left] * after[right] - before)

    columns = {"users": up_to_look(is_first.astype(np.int64))}
    columns |= {name: up_to_look(change) for name, change in of_look.items()}
    columns |= {f"{name}_squared": moment(name, name) for name in _COUNTS}
    for left, right in (("impressions", "clicks"), ("clicks", "orders"), ("impressions", "orders")):
        columns[f"{left}_{right}"] = moment(left, right)
    return [ArmSums(**{name: column[n] for name, column in columns.items()}) for n in range(LOOKS)]


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
        counted = users.capped(scenario.max_impressions)
        arms[name] = sums_at_looks(with_bot(counted, scenario.max_impressions) if n == bots_arm else counted)
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
