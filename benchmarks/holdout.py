"""Claim: a hold-out of 2 % ends a ratchet near the margin, and hardly ever a series of good models.

The gate alone (registry.experiment.decision.judge) on simulated users, 10 trials in a row, 200 times for each
size of the hold-out: shoppers, arms and candidates as in benchmarks.ratchet, seven looks a trial, sums drawn
in place of events. In the series `ratchet` every candidate has 5 % less CTR than its champion and 12 to 16 %
more CVR, in the series `less` only 4 to 6 % more, which is what the published rule promotes and sells no
more; in the series `good` it has 6 to 10 % more CVR and loses no clicks. The held-out users are the same in
all trials of a series, so what sets them apart by chance stays.

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
from benchmarks.results import exact_share, line, markdown_table
from benchmarks.true_rate_shop import SimulatedShoppers, TrueRates
from registry.arms import ANCHOR, CHAMPION, DPO, SFT
from registry.experiment.decision import judge
from registry.experiment.statistics import arm_sums
from registry.settings import GateSettings, RolloutSettings

COMMAND = "python -m benchmarks.holdout"
SERIES = {
    "ratchet": Ratchet(),
    "less": Ratchet(cvr=(1.04, 1.06)),
    "good": Ratchet(ctr=1.0, cvr=(1.06, 1.10)),
}
SIZES = (0.0, 0.01, 0.02, 0.05, 0.1)
TRIALS, LOOKS = 10, 7
GATE = GateSettings.model_validate({})
ROLLOUT = RolloutSettings.model_validate({})


def run_series(
    seed: int, hold_out: float, ratchet: Ratchet, shoppers: SimulatedShoppers
) -> tuple[float, float, int]:
    """The last champion's true CTR and orders per impression over the first model's, and the promotions."""
    random, first = np.random.default_rng(seed), shoppers.first

    def user_rates(mean: float) -> Any:
        return random.beta(mean * shoppers.cohesion, (1 - mean) * shoppers.cohesion, shoppers.users)

    click, buy = user_rates(first.ctr), user_rates(first.cvr)
    is_held_out = random.random(shoppers.users) < hold_out
    champion, promotions = first, 0
    for _ in range(TRIALS):
        cvr = champion.cvr * random.uniform(*ratchet.cvr)
        truth = {SFT: TrueRates(champion.ctr * ratchet.ctr, cvr), CHAMPION: champion,
                 DPO: TrueRates(champion.ctr * ratchet.ctr, cvr * ratchet.aligned)}  # fmt: skip
        shares = np.array([ROLLOUT.sft, ROLLOUT.champion, ROLLOUT.dpo])
        arm = random.choice(len(truth), shoppers.users, p=shares / shares.sum())
        weights = dict(zip(truth, (1 - hold_out) * shares, strict=True))
        if hold_out and promotions:
            arm[is_held_out] = len(truth)
            truth[ANCHOR], weights[ANCHOR] = first, hold_out
        ctr, cvrs = (
            mean * np.array([getattr(rates, name) for rates in truth.values()])[arm] / getattr(first, name)
            for mean, name in ((click, "ctr"), (buy, "cvr"))
        )
        user_sums = np.zeros((shoppers.users, 3), np.int64)
        for _ in range(LOOKS):
            visits = random.random(shoppers.users) < shoppers.days / LOOKS
            shown_items = 10 * visits * (1 + random.poisson(shoppers.requests - 1, shoppers.users))
            shown_items[user_sums[:, 0] + shown_items > GATE.max_impressions_per_user] = 0
            clicked = random.binomial(shown_items, np.minimum(ctr, 1.0))
            user_sums += np.stack(
                [shown_items, clicked, random.binomial(clicked, np.minimum(cvrs, 1.0))], axis=1
            )
            arms = {
                name: arm_sums(user_sums[(arm == n) & (user_sums[:, 0] > 0)]) for n, name in enumerate(truth)
            }
            decision = judge(arms, GATE, GATE.mode, weights, {name: name for name in truth})
            if decision.verdict != "inconclusive":
                break
        if decision.verdict == "promote":
            champion, promotions = truth[decision.winner], promotions + 1
    orders = champion.ctr * champion.cvr / (first.ctr * first.cvr)
    return champion.ctr / first.ctr, orders, promotions


def figures(pool: ProcessPoolExecutor, times: int, shoppers: SimulatedShoppers) -> Iterator[dict[str, Any]]:
    """Every figure of the benchmark."""
    for name, ratchet in SERIES.items():
        for hold_out in SIZES:
            jobs = (range(times), repeat(hold_out), repeat(ratchet), repeat(shoppers))
            results = list(pool.map(run_series, *jobs, chunksize=10))
            ctr, orders, promotions = np.array(results).T
            figures_of_size: list[dict[str, Any]] = [
                {"metric": "promotions of 10, mean", "value": round(float(promotions.mean()), 2)},
                {"metric": "last champion's true CTR over the first's, median",
                 "value": round(float(np.median(ctr)), 4)},
                {"metric": "the same, lowest", "value": round(float(ctr.min()), 4)},
                {"metric": "true orders per impression over the first's, median",
                 "value": round(float(np.median(orders)), 4)},
                # A step below the margin is .857, two are .815.
                *({"metric": f"true CTR below {bound}"} | exact_share(int((ctr < bound).sum()), times)
                  for bound in (0.9, 0.85)),
            ]  # fmt: skip
            for figure in figures_of_size:
                claim = "bounded near the margin" if name == "ratchet" and hold_out else "for comparison"
                model = f"gate alone, series {name}, hold-out {hold_out:.0%}"
                yield line(claim, f"simulated users: {json.dumps(asdict(shoppers))}", model,
                           seed=times, command=COMMAND, **figure)  # fmt: skip


def table(lines: list[dict[str, Any]]) -> list[str]:
    """A row a series and size."""
    rows: dict[str, list[str]] = {}
    for figure in lines:
        interval = "" if figure["low"] is None else f" ({figure['low']:.3f} to {figure['high']:.3f})"
        rows.setdefault(figure["model"], []).append(f"{figure['value']:g}{interval}")
    headings = [
        "series",
        "hold-out",
        *(figure["metric"] for figure in lines[: len(next(iter(rows.values())))]),
    ]
    table_rows = []
    for model, values in rows.items():
        _, name, size = model.split(", ")
        table_rows.append([name.split()[1], size.split()[1], *values])
    return markdown_table(headings, table_rows)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=200, help="series of each kind")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="file of JSON lines to put the figures into")
    options = parser.parse_args()
    lines = []
    with ProcessPoolExecutor(options.processes) as pool:
        for figure in figures(pool, options.times, SimulatedShoppers()):
            print(json.dumps(figure), flush=True)
            lines.append(figure)
    if options.out:
        publish(options.out, lines, "holdout", table(lines))


if __name__ == "__main__":
    main()
