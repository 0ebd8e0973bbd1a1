"""Claim: a thousand explorations veto a model that loses a fifth of the clicks, and seldom one at the margin.

Simulated explorations of eight candidates, drawn evenly; one in ten answers is clicked. A new policy draws
the candidates that are clicked less, so that its true rate is so much below the logged one. Prints one line
of JSON for each number of explorations and true fall: the share of trials in which the veto is given.

    python -m benchmarks.offpolicy_power
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from trainer.offline_checks.offpolicy import LoggedExplorations, judge_policy
from trainer.settings import OffPolicySettings

EXPLORATIONS = (1000, 2000, 5000, 10_000)
FALLS = (0.0, 0.1, 0.2, 0.3, 0.4)
CANDIDATES, RATE, PER_USER = 8, 0.1, 4


def simulated(count: int, random: np.random.Generator) -> LoggedExplorations:
    """So many explorations; the chance of a click falls with the place, from twice the rate to 0."""
    chance = RATE * np.linspace(2, 0, CANDIDATES)
    drawn = random.integers(CANDIDATES, size=count)
    starts = np.arange(count + 1) * CANDIDATES
    places = np.tile(np.log1p(np.arange(CANDIDATES, dtype=float)), count)
    users = [f"{number:016x}" for number in random.integers(2**62, size=count // PER_USER + 1).tolist()]
    return LoggedExplorations(
        prompts=[np.zeros((0, 3), dtype=np.int64)] * count, contexts=np.zeros((count, 0), dtype=np.int32),
        starts=starts, codes=np.zeros((count * CANDIDATES, 3), dtype=np.int64),
        features=np.stack((np.zeros(len(places)), places), axis=1), temperature=np.ones(count),
        drawn=starts[:-1] + drawn, propensity=np.full(count, 1 / CANDIDATES),
        reward=(random.random(count) < chance[drawn]).astype(float),
        users=np.array([users[at // PER_USER] for at in range(count)]), left_out={},
    )  # fmt: skip


def falling_policy(fall: float) -> np.ndarray:
    """Probabilities (candidates,), linear in the place, whose rate is `fall` below that of an even draw."""
    place = np.linspace(-1, 1, CANDIDATES)
    # An even draw's rate is RATE, and the chances are RATE * (1 - place).
    return (1 + fall * place / (place**2).mean()) / CANDIDATES


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=300)
    options = parser.parse_args()
    settings = OffPolicySettings.model_validate({"min_ess": 100})
    for count in EXPLORATIONS:
        for fall in FALLS:
            random = np.random.default_rng((count, round(100 * fall)))
            policy = np.tile(falling_policy(fall), count)
            verdicts = [
                judge_policy(policy, simulated(count, random), settings) for _ in range(options.trials)
            ]
            vetoed = float(np.mean([verdict.vetoed for verdict in verdicts]))
            ess = float(np.mean([verdict.ess for verdict in verdicts]))
            line = {"explorations": count, "true fall": fall, "vetoed": vetoed, "ess": ess}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
