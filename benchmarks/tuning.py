"""Claim: the models of a table are tuned alike, on the validation part only.

    python -m benchmarks.tuning amazon14-toys --data /data --publish

Each family of models (the product's generator, SASRec, gSASRec) gets as many trials of the same budget on the
processor. The first trials of a family are its well-known settings, the others are drawn from its space
(random search, Bergstra and Bengio 2012). The trial with the best NDCG@10 on the validation part
(`trainer.evaluation.validation`) is what `sidstream evaluate --chosen-settings` trains; no test target is
looked at. A search that was cut off goes on after the trials that are published.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import (
    RESULTS,
    add_data_option,
    line,
    markdown_table,
    put_table,
    read_lines,
    report_progress,
    write_lines,
)
from trainer.baselines.sasrec import SasRec, SasRecSettings
from trainer.evaluation.datasets import dataset_source, load_dataset
from trainer.evaluation.generator_ranker import TrainedGenerator, TrainingRecipe, default_recipe, tuned_recipe
from trainer.evaluation.splits import LEAVE_ONE_OUT, EvaluationSplit, leave_one_out, split_by_time
from trainer.evaluation.validation import VALIDATION_USERS
from trainer.rankers import CHOSEN_SETTINGS

Settings = dict[str, Any]
# Not one of the seeds of a table, which are 1, 2 and so on.
SEED = 0
_NETWORK: dict[str, list[Any]] = {
    "lr": [5e-4, 1e-3, 2e-3, 4e-3],
    "dropout": [0.1, 0.2, 0.3, 0.5],
    "width": [64, 128],
    "layers": [1, 2],
    "samples": ["position", "prefix"],
}
SPACES: dict[str, dict[str, list[Any]]] = {
    "sidstream": _NETWORK | {"weight_decay": [0.0, 0.01], "max_words": [0, 512]},
    "sasrec": _NETWORK | {"schedule": ["constant", "cosine"]},
    "gsasrec": _NETWORK
    | {"schedule": ["constant", "cosine"], "negatives": [64, 256], "calibration": [0.5, 0.75, 1.0]},
}
# What each family is known to do well with: its defaults first.
KNOWN: dict[str, list[Settings]] = {
    "sidstream": [
        {"trainer": recipe.trainer | {"validation_users": VALIDATION_USERS}, "codebook": recipe.codebook}
        for recipe in (default_recipe(), tuned_recipe())
    ],
    "sasrec": [{}, {"samples": "prefix", "schedule": "cosine"}],
    "gsasrec": [{}, {"samples": "prefix", "schedule": "cosine"}],
}
_BEGIN, _END = "<!-- table -->\n", "<!-- end -->\n"


def main() -> None:
    """Search, and print a line for each trial."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("--trials", type=int, default=3, help="of each family")
    parser.add_argument("--cpu-seconds", type=float, default=30.0, help="budget of one trial")
    parser.add_argument("--publish", action="store_true", help="write the trials and the chosen settings")
    add_data_option(parser)
    options = parser.parse_args()
    source = dataset_source(options.dataset)
    splitter = leave_one_out if source.splits[0] == LEAVE_ONE_OUT else split_by_time
    split = splitter(load_dataset(options.dataset, options.data))
    command = f"python -m benchmarks.tuning {options.dataset} --trials {options.trials} "
    command += f"--cpu-seconds {options.cpu_seconds:g}"
    finished = read_lines(RESULTS / "tuning.jsonl") if options.publish else []
    for family in SPACES:
        for trial, settings in enumerate(trial_settings(family, options.trials), 1):
            measured = {"trial": trial, "settings": settings, "cpu_seconds": options.cpu_seconds}
            if any(is_trial(row, options.dataset, family, measured) for row in finished):
                continue
            report_progress(f"{options.dataset}, {family}, trial {trial}: {settings}")
            ndcg = validation_ndcg(family, settings, split, options.cpu_seconds)
            row = measured | line(
                f"search, {split.kind}", options.dataset, family, "validation NDCG@10", round(ndcg, 5),
                SEED, command,
            )  # fmt: skip
            print(json.dumps(row), flush=True)
            if options.publish:
                publish(row, RESULTS, CHOSEN_SETTINGS)


def trial_settings(family: str, trials: int) -> Iterator[Settings]:
    """The settings of each trial of a family; the same ones at each call."""
    known = KNOWN[family][:trials]
    yield from known
    random = np.random.default_rng((SEED, list(SPACES).index(family)))
    for _ in range(trials - len(known)):
        drawn = {name: values[random.integers(len(values))] for name, values in SPACES[family].items()}
        if family != "sidstream":
            yield drawn
            continue
        # The rest is of the recipe that was tuned on Beauty, whose limits leave the budget to decide.
        recipe = tuned_recipe()
        yield {"trainer": recipe.trainer | drawn, "codebook": recipe.codebook}


def is_trial(row: dict[str, Any], dataset: str, family: str, measured: dict[str, Any]) -> bool:
    """Whether a published line is the trial that would be measured."""
    same_run = row["dataset"] == dataset and row["model"] == family
    return same_run and all(row[name] == value for name, value in measured.items())


def validation_ndcg(family: str, settings: Settings, split: EvaluationSplit, cpu_seconds: float) -> float:
    """NDCG@10 on the validation part after a training of so many seconds on the processor."""

    def progress(text: str) -> None:
        report_progress(f"  {text}")

    if family == "sidstream":
        trained = TrainedGenerator(TrainingRecipe(**settings, cpu_seconds=cpu_seconds))
        trained.fit(split, SEED, progress)
        return trained.validation_ndcg
    loss = "softmax" if family == "sasrec" else "gbce"
    own = asdict(SasRecSettings()) | settings | {"loss": loss, "cpu_seconds": cpu_seconds}
    ranker = SasRec(SasRecSettings(**own))
    ranker.fit(split, SEED, progress)
    return ranker.validation_ndcg


def publish(row: dict[str, Any], folder: Path, chosen_file: Path) -> None:
    """Put a trial into `tuning.jsonl` and `tuning.md` of `folder`, and the best ones into `chosen_file`.

    It takes the place of the same trial of an earlier search; trials of another budget leave with it.
    """

    def of_search(other: dict[str, Any]) -> bool:
        return (other["dataset"], other["model"]) == (row["dataset"], row["model"])

    kept = [
        other
        for other in read_lines(folder / "tuning.jsonl")
        if not of_search(other)
        or (other["cpu_seconds"] == row["cpu_seconds"] and other["trial"] != row["trial"])
    ]
    rows = sorted([*kept, row], key=lambda other: (other["dataset"], other["model"], other["trial"]))
    chosen = {
        dataset: {family: leader["settings"] for family, leader in families.items()}
        for dataset, families in best_trials(rows).items()
    }
    put_table(folder / "tuning.md", _BEGIN, _END, table(rows))
    write_lines(folder / "tuning.jsonl", rows)
    chosen_file.write_text(json.dumps(chosen, indent=1) + "\n")


def best_trials(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The line of the best trial of each family, by data set."""
    best: dict[str, dict[str, dict[str, Any]]] = {}
    for other in rows:
        families = best.setdefault(other["dataset"], {})
        leader = families.get(other["model"])
        if leader is None or other["value"] > leader["value"]:
            families[other["model"]] = other
    return best


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A row a trial."""
    best = best_trials(rows)
    return markdown_table(
        ["data set", "model", "trial", "CPU seconds", "validation NDCG@10", "chosen", "settings"],
        [
            [
                other["dataset"], other["model"], str(other["trial"]), f"{other['cpu_seconds']:g}",
                f"{other['value']:.4f}", "yes" if best[other["dataset"]][other["model"]] is other else "",
                f"`{json.dumps(other['settings'])}`",
            ]
            for other in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
