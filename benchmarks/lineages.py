"""Claim: a closed loop that aligns ends with more sold than one that only fine-tunes, or that counts.

    python -m benchmarks.lineages --choose --seeds 1 2 3
    python -m benchmarks.lineages --seeds 5 6 7 8 9 --out lineages.jsonl --publish

Shops with the same shoppers, whose true chances are known and whose tastes turn by about 12 degrees a cycle.
In each, cycle after cycle: train from the champion on what was clicked and bought, put the candidates on
trial, let the gate judge, promote or not. The shops of a seed have one start, with the same first model and
the same first visits. They differ in what is tried beside the fine-tuned model: nothing, an aligned model, or
a control that learns no preferences (`benchmarks.lineage_variants`). What is bought is either a function of
an item's title or each shopper's own hidden taste (`streams.simulation.shoppers`).

Training, pairs and the gate are the product's own functions; Kafka, Redis, MLflow and the serving
process are left out (`benchmarks.cycles` runs the whole stack). Trainings have a number of steps and no time
budget: the same work on a machine that is busy. In the end the champion is judged by the true chances of what
it shows to 2,000 shoppers, without the noise of clicks. `--choose` measures the controls' strengths by the
same chances, after one cycle and without a trial; those in `benchmarks.lineage_variants` come from
other seeds than those of the table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.lineage_models import ModelVersion, ShopItems, shop_items
from benchmarks.lineage_report import publish
from benchmarks.lineage_shop import LOOKS, SESSIONS_PER_LOOK, LineageShop
from benchmarks.lineage_variants import VARIANTS, CycleTrainer
from benchmarks.results import RESULTS, read_lines, report_progress
from registry.arms import CHAMPION
from sidstream.commands.train import set_thread_environment
from streams.replay import EventSource, source_of
from trainer.settings import TrainerSettings

VALUES = ("title", "taste")
# A first model of half a pass over the year, and refreshes of a sixth of one over what a cycle has: a minute
# and a few seconds of one core.
FIRST_STEPS, STEPS, CYCLES = 400, 40, 3
# Histories as long as the prompts of pairs (`trainer.dpo.max_items`), and no time budgets.
SETTINGS: dict[str, Any] = {"max_items": 20, "validation_users": 300, "max_seconds": None}
STRENGTHS = {"rates": (0.25, 0.5, 1.0, 2.0), "heavy": (2.0, 5.0, 10.0, 20.0)}


def main() -> None:
    """Run every variant with every seed in every kind of shop, or choose the controls' strengths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7, 8, 9])
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
    for seed in options.seeds:
        start = Start(seed, settings)
        for value in options.values:
            run = (
                chosen(value, start, options.variants)
                if options.choose
                else lineages(value, start, options, rows)
            )
            for row in run:
                print(json.dumps(row), flush=True)
                rows.append(row)
                if options.out:
                    with options.out.open("a") as out:
                        out.write(json.dumps(row) + "\n")
    if options.publish:
        publish(rows, "python -m benchmarks.lineages", RESULTS)


class Start:
    """What all shops of a seed begin with: items, and one first model that learned from the shop's year."""

    def __init__(self, seed: int, settings: TrainerSettings) -> None:
        self.seed, self.settings = seed, settings.model_copy(update={"seed": seed})

    @cached_property
    def year(self) -> EventSource:
        """The shop's log of purchases."""
        return source_of("online-retail")

    @cached_property
    def items(self) -> ShopItems:
        """What the shop sells."""
        return shop_items(self.year, self.settings)

    @cached_property
    def first(self) -> tuple[CycleTrainer, ModelVersion]:
        """The first model, before anybody visits, and its trainer."""
        trainer = CycleTrainer(self.items, self.settings, report_progress)
        shop = LineageShop(self.seed, VALUES[0], self.year, self.items)
        return trainer, trainer.first_version(shop, FIRST_STEPS)

    def shop(self, value: str) -> LineageShop:
        """A shop with the first model in service, after its first visits."""
        shop = LineageShop(self.seed, value, self.year, self.items)
        shop.start(self.first[1])
        return shop


def lineages(
    value: str, start: Start, options: argparse.Namespace, rows: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The cycles of each variant that `rows` do not have, from one start."""
    ended = {(row["value"], row["seed"], row["variant"]) for row in rows if row["cycle"] == options.cycles}
    missing = [name for name in options.variants if (value, start.seed, name) not in ended]
    first_shop = start.shop(value) if missing else None
    for name in missing:
        assert first_shop is not None
        shop, trainer = first_shop.copy(), start.first[0].copy()
        for cycle in range(1, options.cycles + 1):
            began = time.process_time()
            row = {"value": value, "seed": start.seed, "variant": name, "cycle": cycle}
            verdict = shop.try_out(trainer.candidates(shop, VARIANTS[name], STEPS))
            row |= {"did": verdict.verdict, "winner": verdict.winner, "sentence": verdict.sentence}
            if cycle == options.cycles:
                row |= asdict(shop.true_rates(shop.arms[CHAMPION]))
            shop.turn_tastes()
            yield row | {"cpu_seconds": round(time.process_time() - began, 1)}


def chosen(value: str, start: Start, variants: Sequence[str]) -> Iterator[dict[str, Any]]:
    """True rates of one cycle's fine-tuned model, and of what each variant makes of it at each strength."""
    shop, trainer = start.shop(value), start.first[0].copy()
    # As much as a trial leaves, so that what is counted and learned is as of a later cycle.
    shop.visit(SESSIONS_PER_LOOK * LOOKS)
    tuning = trainer.fine_tune(shop, STEPS)
    yield {"value": value, "seed": start.seed, "model": "sft"} | asdict(shop.true_rates(tuning.version))
    for name in variants:
        variant = VARIANTS[name]
        for strength in STRENGTHS.get(name, (variant.strength,)):
            beside = trainer.beside(shop, tuning, replace(variant, strength=strength))
            if beside:
                model = f"{name} {strength:g}" if name in STRENGTHS else name
                yield {"value": value, "seed": start.seed, "model": model} | asdict(shop.true_rates(beside))


if __name__ == "__main__":
    main()
