"""Claim: a closed loop that aligns ends with more sold than one that only fine-tunes, or that counts.

    python -m benchmarks.lineages --choose --seeds 1 2 3
    python -m benchmarks.lineages --seeds 4 5 6 7 8 --out lineages.jsonl --publish

Shops with the same shoppers, whose true chances are known and whose tastes turn by about 12 degrees a cycle.
In each, cycle after cycle: train from the champion on what was clicked and bought, put the candidates on
trial, let the gate judge, promote or not. The shops of a seed have one start, with the same first model and
the same first visits. They differ in what is tried beside the fine-tuned model: nothing, an aligned model, or
a control that learns no preferences (`benchmarks.lineage_variants`). What is bought is either a function of
an item's title or each shopper's own hidden taste (`streams.simulation.shoppers`).

Training, pairs, ranking and the gate are the product's own functions; Kafka, Redis, MLflow and the serving
process are left out (`benchmarks.cycles` runs the whole stack). Trainings have a number of steps and no time
budget: the same work on a machine that is busy. In the end the champion is judged by the true chances of what
it shows to 2,000 shoppers, without the noise of clicks. `--choose` measures the controls' strengths by the
same chances, after one cycle and without a trial; those in `benchmarks.lineage_variants` were chosen by it on
seeds 1 to 3, and no setting was chosen on the seeds of the table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.lineage_models import shop_items
from benchmarks.lineage_report import publish
from benchmarks.lineage_shop import LOOKS, SESSIONS_PER_LOOK, LineageShop
from benchmarks.lineage_variants import VARIANTS, CycleTrainer, Variant
from benchmarks.results import RESULTS, read_lines, report_progress
from registry.arms import CHAMPION, DPO, SFT
from sidstream.commands.train import set_thread_environment
from streams.replay import source_of
from trainer.settings import TrainerSettings

VALUES = ("title", "taste")
# A first model of about half a pass over the year, and a refresh of a tenth to a fifth of one over what its
# cycle has: what a minute and a few seconds of one core are.
FIRST_STEPS, STEPS, CYCLES = 300, 40, 6
# Histories as long as the prompts of pairs (`trainer.dpo.max_items`), and no time budgets.
SETTINGS: dict[str, Any] = {"max_items": 20, "validation_users": 500, "max_seconds": None}
STRENGTHS = {"rates": (0.25, 0.5, 1.0, 2.0), "heavy": (2.0, 5.0, 10.0, 20.0)}


def main() -> None:
    """Run every variant with every seed in every kind of shop, or choose the controls' strengths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[4, 5, 6, 7, 8])
    parser.add_argument("--values", nargs="+", choices=VALUES, default=list(VALUES))
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--cycles", type=int, default=CYCLES)
    parser.add_argument("--set", action="append", default=[], help="of trainer.dpo, for example lr=0.0002")
    parser.add_argument(
        "--out",
        type=Path,
        help="append a line of JSON a cycle to this file; lineages that it has are not run",
    )
    parser.add_argument("--choose", action="store_true", help="measure the controls' strengths instead")
    parser.add_argument("--publish", action="store_true", help="put the figures into docs/results")
    options = parser.parse_args()
    if options.publish and (options.set or options.choose):
        parser.error("the page is of the default settings: leave out --set and --choose, or --publish")
    set_thread_environment()
    changes = {
        name: json.loads(value)
        for name, _, value in (assignment.partition("=") for assignment in options.set)
    }
    settings = TrainerSettings.model_validate(SETTINGS | {"dpo": {"max_seconds": None} | changes})
    rows = read_lines(options.out) if options.out else []
    for value in options.values:
        for seed in options.seeds:
            run = (
                chosen(value, seed, settings)
                if options.choose
                else lineages(value, seed, settings, options, rows)
            )
            for row in run:
                print(json.dumps(row), flush=True)
                rows.append(row)
                if options.out:
                    with options.out.open("a") as out:
                        out.write(json.dumps(row) + "\n")
    if options.publish:
        publish(rows, "python -m benchmarks.lineages", RESULTS)


def start_of(value: str, seed: int, settings: TrainerSettings) -> tuple[LineageShop, CycleTrainer]:
    """A shop of a seed with its first model in service, and the trainer of its next cycles."""
    settings = settings.model_copy(update={"seed": seed})
    year = source_of("online-retail")
    items = shop_items(year, settings)
    shop, trainer = LineageShop(seed, value, year, items), CycleTrainer(items, settings, report_progress)
    shop.start(trainer.first_version(shop, FIRST_STEPS))
    return shop, trainer


def lineages(
    value: str, seed: int, settings: TrainerSettings, options: argparse.Namespace, rows: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The cycles of each variant of one seed that `rows` do not have, from one start."""
    ended = {(row["value"], row["seed"], row["variant"]) for row in rows if row["cycle"] == options.cycles}
    missing = [name for name in options.variants if (value, seed, name) not in ended]
    start: tuple[LineageShop, CycleTrainer] | None = None
    for name in missing:
        start = start or start_of(value, seed, settings)
        shop, trainer = start[0].copy(), start[1].copy()
        for cycle in range(1, options.cycles + 1):
            about = {"value": value, "seed": seed, "variant": name, "cycle": cycle}
            began = time.process_time()
            outcome = run_cycle(shop, trainer, VARIANTS[name])
            yield about | outcome | {"cpu_seconds": round(time.process_time() - began, 1)}


def run_cycle(shop: LineageShop, trainer: CycleTrainer, variant: Variant) -> dict[str, Any]:
    """Train, try, judge, promote, and turn tastes -> the verdict, and the true rates of arms and champion."""
    candidates = trainer.candidates(shop, variant, STEPS)
    arms = {CHAMPION: shop.arms[CHAMPION], **candidates}
    verdict = shop.try_out(candidates)
    rates = {arm: asdict(shop.true_rates(version)) for arm, version in arms.items()}
    row = {"did": verdict.verdict, "winner": verdict.winner, "sentence": verdict.sentence, "arms": rates}
    row |= rates[verdict.winner]
    shop.turn_tastes()
    return row


def chosen(value: str, seed: int, settings: TrainerSettings) -> Iterator[dict[str, Any]]:
    """True rates of one cycle's fine-tuned and aligned model, and of each control at each strength."""
    shop, trainer = start_of(value, seed, settings)
    # As much as a trial leaves, so that what is counted and learned is as of a later cycle.
    shop.visit(SESSIONS_PER_LOOK * LOOKS)
    about = {"value": value, "seed": seed}
    candidates = trainer.candidates(shop, VARIANTS["softmax_dpo"], STEPS)
    if DPO in candidates:
        yield about | {"model": "softmax_dpo"} | asdict(shop.true_rates(candidates[DPO]))
    yield about | {"model": "sft"} | asdict(shop.true_rates(candidates[SFT]))
    for strength in STRENGTHS["rates"]:
        moved = trainer.moved_by_rates(shop, candidates[SFT], strength)
        yield about | {"model": f"rates {strength:g}"} | asdict(shop.true_rates(moved))
    for weight in STRENGTHS["heavy"]:
        heavy = trainer.candidates(shop, Variant("heavy", strength=weight), STEPS)[DPO]
        yield about | {"model": f"heavy {weight:g}"} | asdict(shop.true_rates(heavy))
    asked = trainer.candidates(shop, VARIANTS["ric"], STEPS)[DPO]
    yield about | {"model": "ric"} | asdict(shop.true_rates(asked))


if __name__ == "__main__":
    main()
