"""Claim: a model that never learns from a tenth of the users ranks for all users nearly as well.

Default settings, split in time; users are dealt as the update cycle deals its validation users, and nothing
of them is trained on. Test figures over all users' test events and over all items. Prints one line of JSON
for each share and seed: HR@10, NDCG@10, users left out, and the standard error that HR@10 of so many has.

    python -m benchmarks.validation_share online-retail --epochs 4
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.results import add_data_option, report_progress
from registry.hold_out import HoldOut
from trainer.evaluation.datasets import load_dataset
from trainer.evaluation.generator_ranker import GeneratorRanker, TrainedGenerator, TrainingRecipe
from trainer.evaluation.run import evaluate_ranker
from trainer.evaluation.splits import EvaluationSplit, split_by_time

SHARES = (0.0, 0.1, 0.05, 0.2)


def measure(split: EvaluationSplit, share: float, epochs: int, seed: int) -> dict[str, Any]:
    """The figures of one model that left out this share of the users."""
    hold_out = HoldOut(share=share)
    dealt = [hold_out.has(str(user)) for user in split.dataset.users]
    lengths = [0 if left_out else len(row) for row, left_out in zip(split.train, dealt, strict=True)]
    trained = TrainedGenerator(TrainingRecipe({"epochs": epochs, "max_seconds": None}))
    ranker = GeneratorRanker(f"{share:g} left out", trained, "mixed")
    run = evaluate_ranker(split.with_train_lengths(lengths), ranker, seed, ["none"], report_progress)[0]
    hit_rate = float(run.target_metrics["HR@10"].mean())
    users = sum(left_out and len(row) > 1 for row, left_out in zip(split.train, dealt, strict=True))
    return {
        "claim": "nearly as well", "dataset": split.dataset.name, "share": share, "seed": seed,
        "HR@10": hit_rate, "NDCG@10": float(run.target_metrics["NDCG@10"].mean()), "users": users,
        "standard error": (hit_rate * (1 - hit_rate) / users) ** 0.5 if users else None,
    }  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", default="1,2,3")
    add_data_option(parser)
    options = parser.parse_args()
    split = split_by_time(load_dataset(options.dataset, options.data))
    for seed in map(int, options.seeds.split(",")):
        for share in SHARES:
            print(json.dumps(measure(split, share, options.epochs, seed)), flush=True)


if __name__ == "__main__":
    main()
