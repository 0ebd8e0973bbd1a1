"""Claim: a ratchet, each model 5 % worse on CTR and a little better on CVR, is stopped by the anchor.

The unattended cycle is run for 10 verdicts on simulated shoppers whose true rates are known for every version
of the model. Each legal step loses less than gate.margin, so no comparison with the champion objects; only
the hold-out on the first model sees what is lost in all. Training is replaced by bundles with a truth, Kafka
by a list; what sums, decides and releases is the product: the agents' stage of outcomes on Redis, the
unattended cycle with its ramp, guards and gate, and the registry on MLflow.

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

from benchmarks.rated_shop import Crowd, Rates, Shop
from benchmarks.results import RESULTS, line, put_table
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
_LOOK_DAYS = 2


@dataclass(frozen=True)
class Ratchet:
    """What training makes of a champion: both candidates have `ctr` of its CTR, and more CVR."""

    ctr: float = 0.95
    cvr: tuple[float, float] = (1.04, 1.06)
    aligned: float = 1.01  # CVR of the aligned sibling over the tuned one's


@dataclass
class Ran:
    """One run: a row a verdict, with the champion's true rates over the first model's."""

    run: str
    seed: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def stopped(self) -> dict[str, Any] | None:
        """The first cycle in which the anchor refused what no comparison with the champion rejects."""
        return next((row for row in self.rows if row["refused_by_anchor"]), None)


@contextmanager
def cycle_of(
    settings: Settings, registry: Registry, url: str, crowd: Crowd, ratchet: Ratchet, seed: int
) -> Iterator[tuple[ContinuousDelivery, Shop, Outbox]]:
    """The unattended cycle on a shop of simulated users, training replaced by bundles with a truth."""
    shop, outbox, made = Shop(url, crowd, settings, seed), Outbox(), iter(range(256))
    random = np.random.default_rng([seed, 1])

    def register(kind: BundleKind, rates: Rates) -> str:
        with tempfile.TemporaryDirectory() as folder:
            one = bundle(Path(folder), next(made), kind)
            shop.truth[one.id] = rates
            return registry.register(one)

    def train() -> CycleResult:
        if registry.alias(CHAMPION) is None:
            first = register("base", crowd.first)
            event = release.start(registry, outbox, first)
            return CycleResult(versions={"base": first}, action=event.action)
        parent = shop.truth[registry.fetch(CHAMPION).id]
        ctr, cvr = parent.ctr * ratchet.ctr, parent.cvr * random.uniform(*ratchet.cvr)
        sft, dpo = register("sft", Rates(ctr, cvr)), register("dpo", Rates(ctr, cvr * ratchet.aligned))
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


def run(
    run: str, seed: int, cycles: int, registry: Registry, url: str, settings: Settings,
    crowd: Crowd, ratchet: Ratchet,
) -> Ran:  # fmt: skip
    """`cycles` verdicts of one run."""
    ran, began = Ran(run, seed), time.monotonic()
    with cycle_of(settings, registry, url, crowd, ratchet, seed) as (cycle, shop, outbox):
        since = (0, 0)
        while len(ran.rows) < cycles:
            turn = cycle.turn()
            rollout = outbox.events[-1]
            assert isinstance(rollout, Rollout)
            if turn.did in (*VERDICTS, "rollback", "refuse"):
                champion = next(arm for arm in rollout.arms if arm.name == CHAMPION)
                ran.rows.append(
                    _row(turn, len(ran.rows) + 1, shop.truth[champion.bundle], crowd.first)
                    | {"days": shop.day_number - since[0], "requests": shop.requests - since[1]}
                )
                since = shop.day_number, shop.requests
                told = {"run": run, "seed": seed, "seconds": round(time.monotonic() - began, 1)}
                print(json.dumps(told | ran.rows[-1]), flush=True)
            elif not turn.acted:
                for _ in range(_LOOK_DAYS):
                    shop.day(rollout)
    ran.seconds = time.monotonic() - began
    return ran


def _row(turn: Turn, cycle: int, champion: Rates, first: Rates) -> dict[str, Any]:
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


def _job(job: tuple[str, int, int, str, dict[str, Any], Crowd]) -> Ran:
    name, seed, cycles, mlflow, changed, crowd = job
    with tempfile.TemporaryDirectory() as folder, local_redis(Path(folder) / "redis") as url:
        settings = settings_of(mlflow, f"{name}-{seed}", Path(folder) / "cache", RUNS[name] | changed)
        return run(name, seed, cycles, Registry(settings.registry), url, settings, crowd, Ratchet())


def figures(ran: Ran, dataset: str) -> Iterator[dict[str, Any]]:
    """The lines of one run."""
    claim = {
        "anchor": "stopped by the anchor",
        "none": "none: no hold-out",
        "point": "none: the published rule",
    }
    found: dict[str, Any] = {
        "promotions": sum(row["did"] == "promote" for row in ran.rows),
        "first cycle refused by the anchor": ran.stopped["cycle"] if ran.stopped else None,
        "true CTR of the champion over the first model's, at the end": ran.rows[-1]["ctr"],
        "the same after each cycle": [row["ctr"] for row in ran.rows],
    }
    for metric, value in found.items():
        yield line(
            claim[ran.run],
            dataset,
            f"run {ran.run}",
            f"{metric}; {len(ran.rows)} cycles",
            value,
            ran.seed,
            COMMAND,
        )


def table(made: Sequence[Ran]) -> list[str]:
    """For people: a row a run, and what the anchor said when it first refused."""
    rows = [
        "| run | seed | promotions | true CTR over the first model's, after each cycle | first refused by "
        "the anchor | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for ran in made:
        stopped = f"cycle {ran.stopped['cycle']}" if ran.stopped else "never"
        promoted = sum(row["did"] == "promote" for row in ran.rows)
        path = " ".join(f"{row['ctr']:.3f}" for row in ran.rows)
        rows.append(f"| {ran.run} | {ran.seed} | {promoted} | {path} | {stopped} | {ran.seconds / 60:.1f} |")
    said = [
        f"- {ran.run}, seed {ran.seed}, cycle {ran.stopped['cycle']}: {ran.stopped['sentence']}."
        for ran in made
        if ran.stopped
    ]
    return [*rows, "", *said]


def publish(out: Path, lines: Sequence[dict[str, Any]], mark: str, rows: Sequence[str]) -> None:
    """Put the lines into `out`, in place of those of the same command; and the table where
    docs/results/cycles.md has its mark."""
    kept = [json.loads(one) for one in out.read_text().splitlines()] if out.exists() else []
    kept = [one for one in kept if one["command"] != lines[0]["command"]]
    out.write_text("".join(json.dumps(one) + "\n" for one in [*kept, *lines]))
    put_table(RESULTS / "cycles.md", f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n", rows)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--cycles", type=int, default=10, help="verdicts of a run")
    parser.add_argument("--users", type=int, default=Crowd.users, help="shoppers")
    parser.add_argument("--anchor", type=float, help="share of users held out; default: settings")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="file of JSON lines to put the figures into")
    args = parser.parse_args()
    crowd = Crowd(users=args.users)
    with tempfile.TemporaryDirectory() as folder, local_mlflow(Path(folder)) as mlflow:
        jobs = [
            (name, seed, args.cycles, mlflow,
             {} if args.anchor is None or name == "none" else {"rollout": {"anchor": args.anchor}}, crowd)
            for seed in range(1, args.seeds + 1) for name in args.runs
        ]  # fmt: skip
        made, dataset = [], f"simulated users: {json.dumps(asdict(crowd))}"
        with ProcessPoolExecutor(args.processes) as pool:
            for ran in pool.map(_job, jobs):
                made.append(ran)
                if args.out:
                    lines = [one for other in made for one in figures(other, dataset)]
                    publish(args.out, lines, "ratchet", table(made))
    print("\n".join(table(made)))


if __name__ == "__main__":
    main()
