"""Claim: a ratchet, each model 5 % worse on CTR and better on CVR, is stopped by the anchor.

The unattended cycle is run for 10 verdicts on simulated shoppers whose true rates are known for every version
of the model. Each legal step loses less than gate.margin and sells more for each page, so no comparison with
the champion objects; only the hold-out on the first model sees what is lost in all. Training is replaced by
bundles with a truth, Kafka by a list; what sums, decides and releases is the product: the agents' stage of
outcomes on Redis, the unattended cycle with its ramp, guards and gate, and the registry on MLflow.

Runs: `anchor` (the product's defaults), `none` (the hold-out is off, so the ratchet goes on) and `point` (the
published rule, which `sidstream cycle` refuses; the hold-out is on).

Prints one line of JSON a verdict; --out appends the figures to that file and puts the tables into
docs/results/cycles.md. Trials are salted at random, so figures move a little between runs.

    python -m benchmarks.ratchet --out docs/results/cycles.jsonl
    python -m benchmarks.ratchet --runs anchor --seeds 1 --cycles 4
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import RESULTS, line, markdown_table, put_table, read_lines, write_lines
from benchmarks.true_rate_shop import SimulatedShoppers, TrueRates, TrueRateShop
from harness.registry_support import Outbox, bundle
from harness.servers import local_mlflow, local_redis
from registry.arms import CHAMPION
from registry.bundles.bundle import BundleKind
from registry.bundles.store import Registry
from registry.releases import lease, release
from sidstream.continuous_delivery import ContinuousDelivery, Turn
from sidstream.settings import Settings
from streams.events import Rollout
from trainer.cycle_result import CycleResult

COMMAND = "python -m benchmarks.ratchet"
RUNS: dict[str, dict[str, Any]] = {
    "anchor": {},
    "none": {"rollout": {"anchor": 0.0}},
    "point": {"gate": {"mode": "point"}},
}
VERDICTS = ("promote", "reject", "inconclusive")
_DAYS_PER_LOOK = 2


@dataclass(frozen=True)
class Ratchet:
    """What training makes of a champion: both candidates have `ctr` of its CTR, and more CVR.

    So much more by default that they sell 6 to 10 % more for each page.
    """

    ctr: float = 0.95
    cvr: tuple[float, float] = (1.12, 1.16)
    aligned: float = 1.01  # CVR of the aligned sibling over the tuned one's


@dataclass
class RatchetRun:
    """One run: a row for each verdict, with the true rates of the champion over those of the first model."""

    run: str
    seed: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def stopped(self) -> dict[str, Any] | None:
        """The first cycle in which the anchor refused what no comparison with the champion rejects."""
        return next((row for row in self.rows if row["refused_by_anchor"]), None)


@contextmanager
def unattended_cycle(
    settings: Settings, registry: Registry, url: str, shoppers: SimulatedShoppers, ratchet: Ratchet, seed: int
) -> Iterator[tuple[ContinuousDelivery, TrueRateShop, Outbox]]:
    """The unattended cycle on a shop of simulated users, training replaced by bundles with a truth."""
    shop, outbox, bundle_numbers = TrueRateShop(url, shoppers, settings, seed), Outbox(), iter(range(256))
    random = np.random.default_rng([seed, 1])

    def register(kind: BundleKind, rates: TrueRates) -> str:
        with tempfile.TemporaryDirectory() as folder:
            new_bundle = bundle(Path(folder), next(bundle_numbers), kind)
            shop.truth[new_bundle.id] = rates
            return registry.register(new_bundle)

    def train() -> CycleResult:
        if registry.alias(CHAMPION) is None:
            first = register("base", shoppers.first)
            event = release.start(registry, outbox, first)
            return CycleResult(versions={"base": first}, action=event.action)
        parent = shop.truth[registry.fetch(CHAMPION).id]
        ctr, cvr = parent.ctr * ratchet.ctr, parent.cvr * random.uniform(*ratchet.cvr)
        sft, dpo = (
            register("sft", TrueRates(ctr, cvr)),
            register("dpo", TrueRates(ctr, cvr * ratchet.aligned)),
        )
        event = release.start_trial(registry, outbox, sft, dpo, settings.rollout, settings.rollout.steps[0])
        return CycleResult(versions={"sft": sft, "dpo": dpo}, action=event.action, trial=event.trial)

    @contextmanager
    def promoting() -> Iterator[tuple[Registry, Outbox]]:
        with lease.promotion_lease(shop.redis, registry.name):
            yield registry, outbox

    def current() -> Rollout | None:
        newest = outbox.events[-1] if outbox.events else None
        assert newest is None or isinstance(newest, Rollout)
        return newest

    try:
        yield ContinuousDelivery(settings, registry, shop.redis, current, train, promoting), shop, outbox
    finally:
        shop.close()


def run_ratchet(
    run: str, seed: int, cycles: int, registry: Registry, url: str, settings: Settings,
    shoppers: SimulatedShoppers, ratchet: Ratchet,
) -> RatchetRun:  # fmt: skip
    """`cycles` verdicts of one run."""
    ratchet_run, began = RatchetRun(run, seed), time.monotonic()
    with unattended_cycle(settings, registry, url, shoppers, ratchet, seed) as (cycle, shop, outbox):
        last_verdict_at = (0, 0)
        while len(ratchet_run.rows) < cycles:
            turn = cycle.turn()
            rollout = outbox.events[-1]
            assert isinstance(rollout, Rollout)
            if turn.did in (*VERDICTS, "rollback", "refuse"):
                champion = next(arm for arm in rollout.arms if arm.name == CHAMPION)
                ratchet_run.rows.append(
                    _row(turn, len(ratchet_run.rows) + 1, shop.truth[champion.bundle], shoppers.first)
                    | {
                        "days": shop.day_number - last_verdict_at[0],
                        "requests": shop.requests - last_verdict_at[1],
                    }
                )
                last_verdict_at = shop.day_number, shop.requests
                progress = {"run": run, "seed": seed, "seconds": round(time.monotonic() - began, 1)}
                print(json.dumps(progress | ratchet_run.rows[-1]), flush=True)
            elif not turn.acted:
                for _ in range(_DAYS_PER_LOOK):
                    shop.day(rollout)
    ratchet_run.seconds = time.monotonic() - began
    return ratchet_run


def _row(turn: Turn, cycle: int, champion: TrueRates, first: TrueRates) -> dict[str, Any]:
    record = turn.record or {}
    last = (record.get("comparisons") or [{}])[-1].get("verdict")
    anchor = (record.get("anchor") or {}).get("verdict")
    refused = anchor == "reject" or (last == "promote" and anchor == "inconclusive")
    return {
        "cycle": cycle, "did": turn.did, "ctr": round(champion.ctr / first.ctr, 4),
        "cvr": round(champion.cvr / first.cvr, 4),
        "refused_by_anchor": refused and last != "reject",
        "sentence": turn.sentence,
    }  # fmt: skip


def settings_of(mlflow: str, name: str, cache: Path, changed: dict[str, Any]) -> Settings:
    """The product's defaults; cohorts of a day, so that a look reads 14 of them and not 336."""
    return Settings.model_validate({
        "registry": {"tracking_uri": mlflow, "name": name, "cache": str(cache)},
        "agents": {"cohort_s": 24 * 3600},
        "trainer": {"schedule": {"every_minutes": 1e-9}},
    } | changed)  # fmt: skip


def _job(job: tuple[str, int, int, str, dict[str, Any], SimulatedShoppers]) -> RatchetRun:
    name, seed, cycles, mlflow, changed, shoppers = job
    with tempfile.TemporaryDirectory() as folder, local_redis(Path(folder) / "redis") as url:
        settings = settings_of(mlflow, f"{name}-{seed}", Path(folder) / "cache", RUNS[name] | changed)
        return run_ratchet(
            name, seed, cycles, Registry(settings.registry), url, settings, shoppers, Ratchet()
        )


def figures(ratchet_run: RatchetRun, dataset: str) -> Iterator[dict[str, Any]]:
    """The lines of one run."""
    claim = {
        "anchor": "stopped by the anchor",
        "none": "none: no hold-out",
        "point": "none: the published rule",
    }
    figures_of_run: dict[str, Any] = {
        "promotions": sum(row["did"] == "promote" for row in ratchet_run.rows),
        "first cycle refused by the anchor": ratchet_run.stopped["cycle"] if ratchet_run.stopped else None,
        "true CTR of the champion over the first model's, at the end": ratchet_run.rows[-1]["ctr"],
        "the same after each cycle": [row["ctr"] for row in ratchet_run.rows],
    }
    for metric, value in figures_of_run.items():
        yield line(
            claim[ratchet_run.run],
            dataset,
            f"run {ratchet_run.run}",
            f"{metric}; {len(ratchet_run.rows)} cycles",
            value,
            ratchet_run.seed,
            COMMAND,
        )


def table(runs: Sequence[RatchetRun]) -> list[str]:
    """For people: a row a run, and what the anchor said when it first refused."""
    rows, refusals = [], []
    for ratchet_run in runs:
        name, seed, stopped = ratchet_run.run, str(ratchet_run.seed), ratchet_run.stopped
        promoted = sum(row["did"] == "promote" for row in ratchet_run.rows)
        rates = " ".join(f"{row['ctr']:.3f}" for row in ratchet_run.rows)
        first_refusal = f"cycle {stopped['cycle']}" if stopped else "never"
        rows.append([name, seed, str(promoted), rates, first_refusal, f"{ratchet_run.seconds / 60:.1f}"])
        if stopped:
            refusals.append(f"- {name}, seed {seed}, cycle {stopped['cycle']}: {stopped['sentence']}.")
    headings = [
        "run", "seed", "promotions", "true CTR over the first model's, after each cycle",
        "first refused by the anchor", "minutes",
    ]  # fmt: skip
    return [*markdown_table(headings, rows), "", *refusals]


def publish(out: Path, lines: Sequence[dict[str, Any]], mark: str, rows: Sequence[str]) -> None:
    """Put the lines into `out`, in place of those of the same command; and the table where
    docs/results/cycles.md has its mark."""
    other_lines = [row for row in read_lines(out) if row["command"] != lines[0]["command"]]
    write_lines(out, [*other_lines, *lines])
    put_table(RESULTS / "cycles.md", f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n", rows)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--cycles", type=int, default=10, help="verdicts of a run")
    parser.add_argument("--users", type=int, default=SimulatedShoppers.users, help="shoppers")
    parser.add_argument("--anchor", type=float, help="share of users held out; default: settings")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="file of JSON lines to put the figures into")
    options = parser.parse_args()
    shoppers = SimulatedShoppers(users=options.users)
    with tempfile.TemporaryDirectory() as folder, local_mlflow(Path(folder)) as mlflow:
        anchor = {} if options.anchor is None else {"rollout": {"anchor": options.anchor}}
        jobs = [
            (name, seed, options.cycles, mlflow, {} if name == "none" else anchor, shoppers)
            for seed in range(1, options.seeds + 1)
            for name in options.runs
        ]
        runs, dataset = [], f"simulated users: {json.dumps(asdict(shoppers))}"
        with ProcessPoolExecutor(options.processes) as pool:
            for ratchet_run in pool.map(_job, jobs):
                runs.append(ratchet_run)
                if options.out:
                    lines = [figure for finished in runs for figure in figures(finished, dataset)]
                    publish(options.out, lines, "ratchet", table(runs))
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
