"""Claim: SFT on the newest part of the log after pretraining on all of it is not shown to rank better.

One budget of passes over the log for every variant, default settings, split in time. Test figures over all
items, past ones included. Prints one line of JSON a variant and seed: HR@10, NDCG@10, steps, seconds.

    python -m benchmarks.pretrain online-retail
    python -m benchmarks.pretrain rees46 --data /data
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.results import add_data_option
from trainer.evaluation.datasets import load_dataset
from trainer.evaluation.generator_ranker import GeneratorRanker, TrainedGenerator, TrainingRecipe
from trainer.evaluation.run import evaluate_ranker
from trainer.evaluation.splits import EvaluationSplit, split_by_time

# What is compared: (name, changes of the settings `trainer.pretrain`).
VARIANTS: tuple[tuple[str, dict[str, float]], ...] = (
    ("one stage", {}),
    ("newest .3", {"share": 0.67, "recent_share": 0.3}),
    ("newest .1", {"share": 0.67, "recent_share": 0.1}),
    ("newest .5", {"share": 0.67, "recent_share": 0.5}),
)


def measure(
    split: EvaluationSplit, name: str, pretrain: dict[str, float], epochs: int, seed: int
) -> dict[str, Any]:
    """One variant's figures with one seed."""
    trained = TrainedGenerator(TrainingRecipe({"epochs": epochs, "max_seconds": None, "pretrain": pretrain}))
    ranker = GeneratorRanker(name, trained, "mixed")

    def report_progress(text: str) -> None:
        print(f"{name}, seed {seed}: {text}", file=sys.stderr)

    run = evaluate_ranker(split, ranker, seed, ["none"], report_progress)[0]
    stages = [stage for stage in (trained.result.pretraining, trained.result) if stage]
    return {
        "claim": "not shown to be better", "dataset": split.dataset.name, "model": name, "seed": seed,
        "HR@10": float(run.target_metrics["HR@10"].mean()),
        "NDCG@10": float(run.target_metrics["NDCG@10"].mean()),
        "validation NDCG@10": [stage.quality.ndcg10 for stage in stages if stage.quality],
        "passes": [stage.epochs for stage in stages], "steps": [stage.steps for stage in stages],
        "seconds": sum(stage.seconds for stage in stages),
    }  # fmt: skip


def variants(names: list[str] | None) -> Iterator[tuple[str, dict[str, float]]]:
    """The variants of these names, in their order; all of them where none is named."""
    yield from ((name, changes) for name, changes in VARIANTS if not names or name in names)


def main() -> None:
    """Measure every variant with every seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset")
    add_data_option(parser)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--variant", action="append", help="only this one; may be given again")
    options = parser.parse_args()
    split = split_by_time(load_dataset(options.dataset, options.data))
    for seed in range(1, options.seeds + 1):
        for name, changes in variants(options.variant):
            print(json.dumps(measure(split, name, changes, options.epochs, seed)), flush=True)


if __name__ == "__main__":
    main()
