"""Claim: a hold-out of 2 % ends a ratchet near the margin, and hardly ever a series of good models.

The gate alone (registry.experiment.decision.judge) on simulated users, 10 trials in a row, 200 times for each
size of the hold-out: shoppers, arms and candidates as in benchmarks.ratchet, seven looks a trial, sums drawn
in place of events. In the series `ratchet` every candidate has 5 % less CTR than its champion and 4 to 6 %
more CVR, in the series `good` it has only the latter. The held-out users are the same in all trials of a
series, so what sets them apart by chance stays.

Prints one line of JSON a figure; --out puts them into that file, and the table into docs/results/cycles.md.

    python -m benchmarks.holdout --out docs/results/cycles.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ratchet import Ratchet, publish
from benchmarks.rated_shop import Crowd, Rates
from benchmarks.results import line, share
from registry.arms import ANCHOR, CHAMPION, DPO, SFT
from registry.experiment.decision import judge
from registry.experiment.statistics import arm_sums
from registry.settings import GateSettings, RolloutSettings

COMMAND = "python -m benchmarks.holdout"
SERIES = {"ratchet": Ratchet(), "good": Ratchet(ctr=1.0)}
SIZES = (0.0, 0.01, 0.02, 0.05, 0.1)
TRIALS, LOOKS = 10, 7
GATE = GateSettings.model_validate({})
ROLLOUT = RolloutSettings.model_validate({})


def series(seed: int, held: float, ratchet: Ratchet, crowd: Crowd) -> tuple[float, int]:
    """True CTR of the last champion over the first model's, and the number of promotions."""
    random, first = np.random.default_rng(seed), crowd.first

    def own(mean: float) -> Any:
        return random.beta(mean * crowd.cohesion, (1 - mean) * crowd.cohesion, crowd.users)

    click, buy = own(first.ctr), own(first.cvr)
    kept = random.random(crowd.users) < held
    champion, promotions = first, 0
    for _ in range(TRIALS):
        cvr = champion.cvr * random.uniform(*ratchet.cvr)
        truth = {SFT: Rates(champion.ctr * ratchet.ctr, cvr), CHAMPION: champion,
                 DPO: Rates(champion.ctr * ratchet.ctr, cvr * ratchet.aligned)}  # fmt: skip
        shares = np.array([ROLLOUT.sft, ROLLOUT.champion, ROLLOUT.dpo])
        arm = random.choice(len(truth), crowd.users, p=shares / shares.sum())
        weights = dict(zip(truth, (1 - held) * shares, strict=True))
        if held and promotions:
            arm[kept] = len(truth)
            truth[ANCHOR], weights[ANCHOR] = first, held
        ctr, cvrs = (
            mean * np.array([getattr(rates, name) for rates in truth.values()])[arm] / getattr(first, name)
            for mean, name in ((click, "ctr"), (buy, "cvr"))
        )
        seen = np.zeros((crowd.users, 3), np.int64)
        for _ in range(LOOKS):
            came = random.random(crowd.users) < crowd.days / LOOKS
            shown = 10 * came * (1 + random.poisson(crowd.requests - 1, crowd.users))
            clicked = random.binomial(shown, np.minimum(ctr, 1.0))
            seen += np.stack([shown, clicked, random.binomial(clicked, np.minimum(cvrs, 1.0))], axis=1)
            arms = {name: arm_sums(seen[(arm == n) & (seen[:, 0] > 0)]) for n, name in enumerate(truth)}
            made = judge(arms, GATE, GATE.mode, weights, {name: name for name in truth})
            if made.verdict != "inconclusive":
                break
        if made.verdict == "promote":
            champion, promotions = truth[made.winner], promotions + 1
    return champion.ctr / first.ctr, promotions


def figures(pool: ProcessPoolExecutor, times: int, crowd: Crowd) -> Iterator[dict[str, Any]]:
    """Every figure of the benchmark."""
    for name, ratchet in SERIES.items():
        for held in SIZES:
            ended = list(pool.map(series, range(times), repeat(held), repeat(ratchet), repeat(crowd),
                                  chunksize=10))  # fmt: skip
            ctr = np.array([end for end, _ in ended])
            promotions = float(np.mean([count for _, count in ended]))
            found: list[dict[str, Any]] = [
                {"metric": "promotions of 10, mean", "value": round(promotions, 2)},
                {"metric": "last champion's true CTR over the first's, median",
                 "value": round(float(np.median(ctr)), 4)},
                {"metric": "the same, lowest", "value": round(float(ctr.min()), 4)},
                # A step below the margin is .857, two are .815.
                *({"metric": f"the same below {bound}"} | share(int((ctr < bound).sum()), times)
                  for bound in (0.9, 0.85)),
            ]  # fmt: skip
            for one in found:
                claim = "bounded near the margin" if name == "ratchet" and held else "for comparison"
                model = f"gate alone, series {name}, hold-out {held:.0%}"
                yield line(claim, f"simulated users: {json.dumps(asdict(crowd))}", model,
                           seed=times, command=COMMAND, **one)  # fmt: skip


def table(lines: list[dict[str, Any]]) -> list[str]:
    """A row a series and size."""
    rows: dict[str, list[str]] = {}
    for one in lines:
        interval = "" if one["low"] is None else f" ({one['low']:.3f} to {one['high']:.3f})"
        rows.setdefault(one["model"], []).append(f"{one['value']:g}{interval}")
    head = ["series", "hold-out", *(one["metric"] for one in lines[: len(next(iter(rows.values())))])]
    made = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for model, values in rows.items():
        _, name, size = model.split(", ")
        made.append(f"| {name.split()[1]} | {size.split()[1]} | {' | '.join(values)} |")
    return made


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=200, help="series of each kind")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="file of JSON lines to put the figures into")
    args = parser.parse_args()
    lines = []
    with ProcessPoolExecutor(args.processes) as pool:
        for one in figures(pool, args.times, Crowd()):
            print(json.dumps(one), flush=True)
            lines.append(one)
    if args.out:
        publish(args.out, lines, "holdout", table(lines))


if __name__ == "__main__":
    main()
