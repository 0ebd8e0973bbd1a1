"""Claim: looked at 20 times, the gate promotes at most 1 in 20 models that sell no more, and finds good ones.

Trials of simulated users are judged by the whole judgement (registry.experiment.decision.judge): the
aligned challenger against the tuned one, the one that goes on against the champion, the fallback, the
hold-out. Users' activity is heavy-tailed, and one of them is a bot of 20,000 impressions
(benchmarks.simulated_trials). 2,000 trials without an effect; 1,000 of challengers that keep the published
rule and sell less for each page, and of each size that `sidstream gate plan` gives.

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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.results import exact_share, line, publish_shares
from benchmarks.simulated_trials import (
    LOOKS,
    Population,
    Scenario,
    Truth,
    arm_weights,
    draw_trial,
    pilot,
)
from registry.arms import ANCHOR, CHAMPION, SFT
from registry.experiment.decision import Judgement, judge
from registry.experiment.gate import MODES
from registry.experiment.sample_size import ExpectedRates, TrialArms, users_needed
from registry.settings import GateSettings, RolloutSettings

SEED = 20
SETTINGS = GateSettings.model_validate({})
WEIGHTS = arm_weights(RolloutSettings.model_validate({}))
# Trials handed to a process at once.
_CHUNK = 20
_SHARES_OF_POINT = "none: point estimates"

SHOP = Population("CTR .2, CVR .2, pages of 10", 0.2, 0.2, 10, 2.0)
ADS = Population("CTR .05, CVR .05, pages of 7", 0.05, 0.05, 7, 1.0)
# Challengers that the published rule may promote, and what they sell for each page shown.
SELLERS_OF_LESS = {
    "CTR x.92, CVR x1.06 (orders x.975)": Truth(0.92, 1.06),
    "CTR x.95, CVR x1.04 (orders x.988)": Truth(0.95, 1.04),
    "CTR x.90, CVR x1.05 (orders x.945)": Truth(0.9, 1.05),
    "CTR x.94, CVR x1/.94 (orders x1)": Truth(0.94, 1 / 0.94),
}
PLANNED_LIFT, PLANNED_POWER = 0.15, 0.9


@dataclass(frozen=True)
class Trial:
    """A scenario and the modes that judge it."""

    scenario: Scenario
    modes: tuple[str, ...]


def simulate_trial(seed: np.random.SeedSequence, trial: Trial) -> set[str]:
    """What the judgement said of one trial: `<mode> <verdict or winner> once` (at any look), `... last`.

    `<mode> published once`: the published rule's two tests were passed by a challenger against the champion.
    In mode sequential the first verdict that is not inconclusive ends the trial, as in the unattended cycle.
    """
    looks = draw_trial(np.random.default_rng(seed), trial.scenario, WEIGHTS)
    outcomes = set()
    for mode in trial.modes:
        for number, arms in enumerate(looks, 1):
            judgement = judge(arms, SETTINGS, mode, WEIGHTS, {name: name for name in WEIGHTS})
            if _passes_published_tests(judgement):
                outcomes.add(f"{mode} published once")
            outcomes |= {f"{mode} {judgement.verdict} once", f"{mode} {judgement.winner} once"}
            if number == LOOKS:
                outcomes |= {f"{mode} {judgement.verdict} last", f"{mode} {judgement.winner} last"}
            if mode == "sequential" and judgement.verdict != "inconclusive":
                break
    return outcomes


def _passes_published_tests(judgement: Judgement) -> bool:
    """True where CVR is shown to be higher than the champion's and CTR to keep the margin, by tests at alpha.

    Whatever the orders per impression say; `p_above` at alpha, as without a second challenger.
    """
    return any(
        metrics.control == CHAMPION
        and all(
            metric is not None and metric["p_above"] is not None and metric["p_above"] < SETTINGS.alpha
            for metric in (metrics.cvr, metrics.ctr)
        )
        for metrics in judgement.comparisons
    )


def _chunk(job: tuple[list[np.random.SeedSequence], Trial]) -> Counter[str]:
    seeds, trial = job
    return sum((Counter(simulate_trial(seed, trial)) for seed in seeds), Counter())


def count_trials(pool: ProcessPoolExecutor, trial: Trial, trials: int, label: str) -> Counter[str]:
    """Counts over trials, the same for any number of processes."""
    seeds = np.random.SeedSequence(SEED).spawn(trials)
    jobs = [(seeds[n : n + _CHUNK], trial) for n in range(0, trials, _CHUNK)]
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


@dataclass(frozen=True)
class Bench:
    """Runs scenarios of `trials` trials and makes lines of counts."""

    pool: ProcessPoolExecutor
    trials: int

    def half(self) -> Bench:
        """A bench with half of the trials."""
        return replace(self, trials=max(self.trials // 2, 1))

    def lines(
        self, scenario: Scenario, truth: str, figures: list[tuple[str, str, str, str]]
    ) -> Iterator[dict[str, Any]]:
        """A line for each figure: (mode, what is counted, its words, claim)."""
        name = scenario.population.name
        modes = tuple(mode for mode in MODES if any(mode == figure[0] for figure in figures))
        counts = count_trials(self.pool, Trial(scenario, modes), self.trials, f"{truth}, {name}")
        for mode, counted, words, claim in figures:
            yield line(
                claim,
                f"simulated users: {name}",
                f"gate, mode {mode}",
                f"{words}; {truth}, {scenario.users:,} users",
                seed=SEED,
                command="python -m benchmarks.gate",
                **exact_share(counts[f"{mode} {counted}"], self.trials),
            )


_PROMOTED = [
    ("sequential", "promote once", "promoted at any look", "at most .05"),
    ("fixed", "promote last", "promoted at the last look", "at most .05"),
]


def errors(bench: Bench) -> Iterator[dict[str, Any]]:
    """Trials without an effect, and of challengers that sell no more for each page."""
    cap = SETTINGS.max_impressions_per_user
    null = Scenario(SHOP, 14_000, cap)
    yield from bench.lines(
        null,
        "no effect",
        [
            *_PROMOTED,
            ("fixed", "promote once", "promoted at any look", "none: it is made for one look"),
            ("point", "promote once", "promoted at any look", _SHARES_OF_POINT),
            ("point", "promote last", "promoted at the last look", _SHARES_OF_POINT),
            ("sequential", "reject once", "rejected at any look", "at most .15: three harms"),
        ],
    )
    yield from bench.lines(Scenario(ADS, 20_000, cap), "no effect", _PROMOTED)
    yield from bench.lines(
        replace(null, sft=Truth(cvr=0.8)), "DPO without an effect beside an SFT of CVR x.8", _PROMOTED
    )
    for truth, less in SELLERS_OF_LESS.items():
        # So many users that the published rule's tests see the rise of CVR.
        scenario = Scenario(SHOP, 30_000, cap, sft=less, dpo=less)
        yield from bench.half().lines(
            scenario,
            truth,
            [
                *_PROMOTED,
                ("sequential", "published once", "the published rule's tests passed at any look", "none"),
                ("fixed", "published once", "the published rule's tests passed at any look", "none"),
            ],
        )


def planned_users(population: Population, mode: str) -> int:
    """Users to deal so that the smallest arm has as many who come as the plan asks for."""
    shown, coming, design_effect = pilot(population, SETTINGS.max_impressions_per_user)
    expected = ExpectedRates(population.cvr, PLANNED_LIFT, population.ctr, shown, design_effect)
    arms = TrialArms(anchor=WEIGHTS[ANCHOR] / WEIGHTS[SFT])
    return round(users_needed(expected, SETTINGS, mode, arms, PLANNED_POWER) / WEIGHTS[SFT] / coming)


def powers(bench: Bench) -> Iterator[dict[str, Any]]:
    """Trials of the planned size: an aligned challenger that is better by the planned lift."""
    cap = SETTINGS.max_impressions_per_user
    for mode, counted in (("sequential", "once"), ("fixed", "last")):
        users = planned_users(SHOP, mode)
        for has_bot, limit, words in (
            (True, cap, "with the bot"),
            (False, cap, "without the bot"),
            (True, 10**9, "with the bot, gate.max_impressions_per_user off"),
        ):
            scenario = Scenario(SHOP, users, limit, dpo=Truth(cvr=1 + PLANNED_LIFT), has_bot=has_bot)
            claim = f"at least {PLANNED_POWER:.2f}" if limit == cap else "for comparison"
            truth = f"DPO's CVR x{1 + PLANNED_LIFT:g}, planned for {PLANNED_POWER:g}, {words}"
            figure = (mode, f"challenger-dpo {counted}", "DPO promoted", claim)
            yield from bench.half().lines(scenario, truth, [figure])


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
        bench = Bench(pool, 20 if options.quick else 2000)
        for part in (errors, powers):
            for row in part(bench):
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
