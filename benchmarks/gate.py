"""Claim: looked at 20 times, the gate promotes at most one useless model in 20, and it finds good ones.

Trials of simulated users are judged by the gate itself at 20 looks. Every user has rates of click and
purchase of their own (beta-distributed), arrives at some look, and comes back at later ones: for each of two
populations 2,000 trials without an effect and 2,000 in which CTR truly falls by 12 % while CVR rises by 20 %,
and 1,000 trials of each size that `sidstream gate plan` gives for CVR +20 %.

Prints one line of JSON a figure, with the 95 % binomial interval
(Clopper and Pearson), and writes docs/results/gate.jsonl and the table of docs/results/gate.md.

    python -m benchmarks.gate
    python -m benchmarks.gate --quick     # a hundredth of the trials; writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.results import exact_share, line, publish_shares
from registry.experiment.gate import MODES, compare
from registry.experiment.sample_size import ExpectedRates, users_needed
from registry.experiment.statistics import ArmSums
from registry.settings import GateSettings

LOOKS = 20
SEED = 20
SETTINGS = GateSettings.model_validate({})
# Trials handed to a process at once.
_CHUNK = 20


@dataclass(frozen=True)
class Population:
    """Users: `impressions` of one user on average (Poisson); beta-distributed rates, whose means these are.

    Rates have a + b = `cohesion`: between users they vary by sqrt(mean (1 - mean) / (cohesion + 1)).
    """

    name: str
    ctr: float = 0.05
    cvr: float = 0.05
    impressions: float = 7.0
    cohesion: float = 40.0


@dataclass(frozen=True)
class Scenario:
    """Trials with a truth: the target's rates are the control's times `ctr` and `cvr`."""

    population: Population
    users: int
    ctr: float = 1.0
    cvr: float = 1.0
    modes: tuple[str, ...] = MODES


ADS = Population("simulated users: CTR .05, CVR .05, 7 impressions")
SHOP = Population("simulated users: CTR .2, CVR .2, 20 impressions", 0.2, 0.2, 20.0)


def arm_sums_at_looks(
    random: np.random.Generator, population: Population, users: int, ctr: float, cvr: float
) -> Iterator[ArmSums]:
    """The sums of one arm at each look, users in the order of their arrival.

    A Poisson number of impressions, each clicked with the user's rate, is two independent Poisson numbers of
    clicked and of passed ones; clicks split likewise. So events are drawn, and users without any are free.
    """
    arrival = random.integers(0, LOOKS, users)

    def rate(mean: float) -> npt.NDArray[np.float64]:
        return random.beta(mean * population.cohesion, (1 - mean) * population.cohesion, users)

    click, buy = rate(population.ctr * ctr), rate(population.cvr * cvr)

    def cumulative(mean: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        who = np.repeat(np.arange(users), random.poisson(mean))
        first = arrival[who]
        when = first + (random.random(len(who)) * (LOOKS - first)).astype(np.int64)
        counts = np.bincount(when * users + who, minlength=LOOKS * users).reshape(LOOKS, users)
        return np.cumsum(counts, axis=0).astype(np.float64)

    orders = cumulative(population.impressions * click * buy)
    clicks = orders + cumulative(population.impressions * click * (1 - buy))
    shown = clicks + cumulative(population.impressions * (1 - click))
    # Whole numbers far below 2^53: exact in doubles, and products of doubles are quick.
    for i, c, o in zip(shown, clicks, orders, strict=True):
        # Not `@`: BLAS would start threads, which only wait for those of the other process.
        products = (np.einsum("n,n->", *two) for two in ((i, i), (c, c), (o, o), (i, c), (c, o)))
        figures = (i.sum(), c.sum(), o.sum(), *products)
        yield ArmSums(int((i > 0).sum()), *map(int, figures))


def simulate_trial(seed: np.random.SeedSequence, scenario: Scenario) -> set[str]:
    """What happened in one trial: `<mode> <verdict> once` (at any look), `... last`, and CVR claims."""
    random = np.random.default_rng(seed)
    target = arm_sums_at_looks(random, scenario.population, scenario.users, scenario.ctr, scenario.cvr)
    control = arm_sums_at_looks(random, scenario.population, scenario.users, 1.0, 1.0)
    outcomes = set()
    for look, (t, c) in enumerate(zip(target, control, strict=True), 1):
        for mode in scenario.modes:
            comparison = compare("t", "c", {"t": t, "c": c}, SETTINGS, mode)
            outcomes.add(f"{mode} {comparison.verdict} once")
            if look == LOOKS:
                outcomes.add(f"{mode} {comparison.verdict} last")
            if (
                comparison.cvr
                and comparison.cvr["p_above"] is not None
                and comparison.cvr["p_above"] < SETTINGS.alpha
            ):
                outcomes.add(f"{mode} higher once")
    return outcomes


def _chunk(job: tuple[list[np.random.SeedSequence], Scenario]) -> Counter[str]:
    seeds, scenario = job
    return sum((Counter(simulate_trial(seed, scenario)) for seed in seeds), Counter())


def count_trials(pool: ProcessPoolExecutor, scenario: Scenario, trials: int, label: str) -> Counter[str]:
    """Counts over trials, the same for any number of processes."""
    seeds = np.random.SeedSequence(SEED).spawn(trials)
    jobs = [(seeds[n : n + _CHUNK], scenario) for n in range(0, trials, _CHUNK)]
    counts: Counter[str] = Counter()
    for done, chunk_counts in enumerate(pool.map(_chunk, jobs), 1):
        counts += chunk_counts
        if sys.stderr.isatty() or done % 10 == 0:
            _progress(f"{label}: {min(done * _CHUNK, trials):,} of {trials:,} trials")
    _progress("")
    return counts


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()
    elif text:
        print(text, file=sys.stderr)


def share_line(
    population: Population, metric: str, claim: str, mode: str, count: int, of: int
) -> dict[str, Any]:
    """One line of the results: a share, and its 95 % interval."""
    return line(
        claim, population.name, f"gate, mode {mode}", metric, seed=SEED, command="python -m benchmarks.gate",
        **exact_share(count, of),
    )  # fmt: skip


def figures(pool: ProcessPoolExecutor, trials: int, scale: float) -> Iterator[dict[str, Any]]:
    """Every figure of the benchmark; `users_of` scales the arms (1: as published)."""
    for population, users in ((ADS, 20_000), (SHOP, 4_000)):
        users = round(users * scale)

        def metric_of(
            what: str, truth: str, population: Population = population, users: int = users
        ) -> tuple[Any, str]:
            return population, f"{what}; {truth}, {users:,} users an arm, {LOOKS} looks"

        truth = "no effect"
        null_counts = count_trials(pool, Scenario(population, users), trials, f"{truth}, {population.name}")
        for mode, outcome, what, claim in (
            ("sequential", "promote once", "promoted at any look", "at most .05"),
            ("fixed", "promote once", "promoted at any look", "none: it is made for one look"),
            ("fixed", "promote last", "promoted at the last look", "at most .05"),
            ("point", "promote once", "promoted at any look", "none: the published rule"),
            ("point", "promote last", "promoted at the last look", "none: the published rule"),
            ("sequential", "higher once", "CVR found higher at any look", "at most .05"),
            ("fixed", "higher once", "CVR found higher at any look", "none: it is made for one look"),
            ("sequential", "reject once", "rejected at any look", "at most .10: two harms"),
        ):
            yield share_line(*metric_of(what, truth), claim, mode, null_counts[f"{mode} {outcome}"], trials)
        truth = "CTR -12 %, CVR +20 %"
        harm_counts = count_trials(
            pool, Scenario(population, users, ctr=0.88, cvr=1.2), trials, f"{truth}, {population.name}"
        )
        for mode, claim in (
            ("sequential", "at most .05"),
            ("fixed", "none: it is made for one look"),
            ("point", "none: the published rule"),
        ):
            yield share_line(
                *metric_of("promoted at any look", truth),
                claim,
                mode,
                harm_counts[f"{mode} promote once"],
                trials,
            )
    truth = "CVR +20 %, CTR 0"
    for mode in ("sequential", "fixed"):
        expected = ExpectedRates(ADS.cvr, 0.2, ADS.ctr, ADS.impressions)
        users = round(users_needed(expected, SETTINGS, mode, 0.8) * scale)
        alternative_trials = max(trials // 2, 1)
        gain_counts = count_trials(
            pool, Scenario(ADS, users, cvr=1.2, modes=(mode,)), alternative_trials, f"{truth}, mode {mode}"
        )
        for outcome, what in (("last", "promoted at the last look"), ("once", "promoted at any look")):
            if mode == "sequential" or outcome == "last":
                metric = f"{what}; {truth}, {users:,} users an arm (planned for .8), {LOOKS} looks"
                yield share_line(
                    ADS,
                    metric,
                    "at least .80",
                    mode,
                    gain_counts[f"{mode} promote {outcome}"],
                    alternative_trials,
                )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a hundredth of the trials; writes nothing")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="the figures do not depend on it"
    )
    options = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(options.processes) as pool:
        for row in figures(pool, 20 if options.quick else 2000, 0.1 if options.quick else 1.0):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if not options.quick:
        publish_shares("gate", rows, ["users", "trial and figure", "mode"], cells)


def cells(row: dict[str, Any]) -> list[str]:
    """A line's first cells in the table for people."""
    metric, _, truth = row["metric"].partition("; ")
    return [row["dataset"].partition(": ")[2], f"{truth}: {metric}", row["model"].split()[-1]]


if __name__ == "__main__":
    main()
