"""The table of tasks: its rows are settings that exist, its figures count what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.tasks import BEGIN, END, ROWS, figures, publish, table, weights
from tests.tiny_sequences import sequences
from trainer.evaluation import splits
from trainer.evaluation.generator_ranker import TrainedGenerator, TrainingRecipe, default_recipe
from trainer.settings import TaskWeights


@pytest.mark.parametrize("row", ROWS)
def test_a_row_leaves_out_one_task_or_all_of_them(row: str) -> None:
    trained = weights(row)
    TaskWeights.model_validate(trained)
    next_item_only = TaskWeights.model_validate(weights("next-item"))
    changed = {name for name in trained if trained[name] != getattr(next_item_only, name)}
    assert changed == {
        "all": {"purchase", "search", "summary", "sid_to_title", "title_to_sid"},
        "no-purchase": {"search", "summary", "sid_to_title", "title_to_sid"},
        "no-search": {"purchase", "summary", "sid_to_title", "title_to_sid"},
        "no-summary": {"purchase", "search", "sid_to_title", "title_to_sid"},
        "no-titles": {"purchase", "search", "summary"},
        "next-item": set(),
    }[row]  # fmt: skip
    assert next_item_only.purchase == 1.0


def row_line(row: str, metric: str, value: float, dataset: str = "rees46") -> dict[str, object]:
    return {
        "claim": f"tasks: {ROWS[row][0]}", "dataset": dataset, "metric": metric, "value": value,
        "high": value + 0.01,
    }  # fmt: skip


def test_the_table_has_a_row_each_training_and_the_columns_that_were_measured(tmp_path: Path) -> None:
    page = tmp_path / "tasks.md"
    page.write_text(f"before\n{BEGIN}{END}after\n")
    publish([row_line("all", "search HR@10", 0.5), row_line("all", "bought HR@10", 0.25)], tmp_path)
    publish([row_line("next-item", "search HR@10", 0.125, "online-retail")], tmp_path)
    publish([row_line("all", "search HR@10", 0.75), row_line("all", "bought HR@10", 0.25)], tmp_path)
    expected = [
        "| data set | trained on | bought HR@10 | search HR@10 |", "|---|---|---|---|",
        "| online-retail | the next item alone |  | 0.1250 ± 0.0100 |",
        "| rees46 | all tasks | 0.2500 ± 0.0100 | 0.7500 ± 0.0100 |",
    ]  # fmt: skip
    assert page.read_text() == f"before\n{BEGIN}" + "\n".join(expected) + f"\n{END}after\n"
    lines = [json.loads(text) for text in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert table(lines) == expected


@pytest.mark.learning
def test_figures_are_of_every_target_of_the_bought_ones_of_searches_and_of_summaries() -> None:
    rows = [[(user + at) % 12 for at in range(6)] for user in range(30)]
    when = [[at if at == 5 and user % 3 == 0 else -1 for at in range(6)] for user in range(30)]
    split = splits.split_by_time(sequences(*rows, ts=[range(6)] * 30, bought_ts=when), 4, 5)
    shape = {"width": 16, "heads": 2, "layers": 1, "epochs": 1, "max_seconds": None}
    trained = TrainedGenerator(
        TrainingRecipe(shape | {"weights": weights("all")}, {"levels": 2, "size": 8}, 12)
    )
    trained.fit(split, 1, lambda text: None)
    by_column = figures(trained, split.test)
    repeated = figures(trained, split.test)
    assert {name: len(values) for name, values in by_column.items()} == {
        "next item HR@10": 30, "bought HR@10": 10, "search HR@10": 30, "summary words": 30,
    }  # fmt: skip
    assert by_column["bought HR@10"].tolist() == by_column["next item HR@10"][::3].tolist()
    assert all(np.array_equal(by_column[name], repeated[name]) for name in by_column)
    # Ten of twelve items are found, whatever was learned.
    assert by_column["next item HR@10"].mean() > 0.5
    assert by_column["search HR@10"].mean() > 0.5
    assert set(np.round(by_column["summary words"] * 4, 6)) <= {0.0, 1.0, 2.0, 3.0, 4.0}


def test_a_default_model_of_so_many_epochs_has_no_budget_in_seconds() -> None:
    assert default_recipe(epochs=3).trainer == {"epochs": 3, "max_seconds": None}
    assert default_recipe(20.0, 3).trainer == {"epochs": 3, "max_seconds": 20.0}
    assert default_recipe().trainer == {}
