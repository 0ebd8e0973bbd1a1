"""What each task gives to the others: a training of all tasks, one without each, one of the next item alone.

    python -m benchmarks.tasks rees46 --data /data --publish
    python -m benchmarks.tasks online-retail --publish

Default settings but for the weights, split in time, every item ranked, past ones included. --rows trains some
of the rows, --work keeps what is done (a row that is there is not trained again).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import (
    RESULTS,
    add_data_option,
    markdown_table,
    mean_line,
    put_table,
    read_lines,
    report_progress,
    write_lines,
)
from trainer.evaluation.datasets import load_dataset
from trainer.evaluation.generator_ranker import TrainedGenerator, TrainingRecipe
from trainer.evaluation.metrics import target_ranks
from trainer.evaluation.sequences import Float64
from trainer.evaluation.splits import EvaluationSplit, Queries, split_by_time
from trainer.evaluation.tasks import predict_words, search_items
from trainer.sequences.tasks import search_prompt, summary_prompt

BEGIN, END = "<!-- tasks -->\n", "<!-- end of tasks -->\n"
K = 10

# Task -> its weights in the row of all tasks, and those that leave it out.
TASKS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "purchase": ({"purchase": 5.0}, {"purchase": 1.0}),
    "search": ({"search": 0.3}, {"search": 0.0}),
    "summary": ({"summary": 0.1}, {"summary": 0.0}),
    "titles": ({"sid_to_title": 0.1, "title_to_sid": 0.1}, {"sid_to_title": 0.0, "title_to_sid": 0.0}),
}
# Row -> its words, and the tasks beside the next item.
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "all": ("all tasks", tuple(TASKS)),
    **{f"no-{task}": (f"without {task}", tuple(set(TASKS) - {task})) for task in TASKS},
    "next-item": ("the next item alone", ()),
}
COLUMNS = ("next item HR@10", "bought HR@10", "search HR@10", "summary words")


def weights(row: str) -> dict[str, float]:
    """The settings `trainer.weights` of a row."""
    trained: dict[str, float] = {}
    for task, (weights_with, weights_without) in TASKS.items():
        trained |= weights_with if task in ROWS[row][1] else weights_without
    return trained


def figures(trained: TrainedGenerator, queries: Queries) -> dict[str, Float64]:
    """Column -> the value of each query or history (N,). Columns that a data set cannot have are left out.

    A search has the history and 1 to 3 words of the target's title, the same ones for every row of the table.
    A summary has as many predicted words as the history has typical ones; its value is the share of the
    typical words among the predicted ones.
    """
    lists = trained.rank(queries.histories, K, "none", "mixed", queries.users)
    figures_by_column = {"next item HR@10": (target_ranks(lists, queries.targets) >= 0).astype(float)}
    if queries.bought is not None:
        figures_by_column["bought HR@10"] = figures_by_column["next item HR@10"][queries.bought]
    titles, words, codes, limits = (
        trained.rows.title_words,
        trained.rows.words,
        trained.catalogue.codes,
        trained.settings.tasks,
    )
    rng = np.random.default_rng(0)
    searches, targets, summary_prompts, typical_words = [], [], [], []
    for past, target in zip(queries.histories, queries.targets.tolist(), strict=True):
        history = codes[past[-limits.history :]]
        if words.typical([titles[target]], 1):
            searches.append(search_prompt(history, words.draw_query(titles[target], limits.query_words, rng)))
            targets.append(target)
        typical = words.typical([titles[item] for item in past[-limits.history :]], limits.summary_words)
        if typical:
            summary_prompts.append(summary_prompt(history))
            typical_words.append(typical)
    spelled = search_items(trained.model, searches, trained.sid_set, trained.catalogue, K)
    search_ranks = target_ranks(spelled, np.array(targets, np.int64))
    figures_by_column["search HR@10"] = (search_ranks >= 0).astype(float)
    predicted_words = predict_words(
        trained.model, summary_prompts, [len(row) for row in typical_words], trained.rows.prompt.first_word
    )
    figures_by_column["summary words"] = np.array(
        [
            len({*predicted} & {*typical}) / len(typical)
            for predicted, typical in zip(predicted_words, typical_words, strict=True)
        ]
    )
    return figures_by_column


class TasksBenchmark:
    """Rows of one data set and seed, each kept as a file of lines when it is done."""

    def __init__(self, options: argparse.Namespace, split: EvaluationSplit) -> None:
        self.options, self.split = options, split
        at = np.sort(np.random.default_rng(0).permutation(len(split.test))[: options.queries])
        # What was bought is rare: none of it is left out.
        if split.test.bought is not None:
            at = np.union1d(at, np.flatnonzero(split.test.bought))
        self.queries = split.test.take(at)
        limit = f" --max-seconds {options.max_seconds:g}" if options.max_seconds else ""
        self.command = f"python -m benchmarks.tasks {options.dataset} --epochs {options.epochs}{limit}"

    def rows(self) -> list[str]:
        """The rows that this data set can have: without clicks, all is bought."""
        return [row for row in ROWS if row != "no-purchase" or self.split.dataset.bought is not None]

    def _path(self, row: str) -> Path:
        about = f"{self.command} --queries {self.options.queries} --seed {self.options.seed}"
        return self.options.work / f"tasks-{row}-{hashlib.sha256(about.encode()).hexdigest()[:8]}.jsonl"

    def lines(self) -> list[dict[str, Any]]:
        """All lines of the rows that are done, in the order of the table."""
        return [row_line for row in ROWS for row_line in read_lines(self._path(row))]

    def measure(self, row: str) -> None:
        """Train and measure one row, unless its file exists."""
        if self._path(row).exists():
            return
        started = time.monotonic()
        settings = {"epochs": self.options.epochs, "max_seconds": self.options.max_seconds}
        trained = TrainedGenerator(TrainingRecipe(settings | {"weights": weights(row)}))
        trained.fit(self.split, self.options.seed, lambda text: report_progress(f"{row}: {text}"))
        lines = [self._line(row, name, values) for name, values in figures(trained, self.queries).items()]
        write_lines(self._path(row), lines)
        report_progress(
            f"{row}: {trained.result.epochs:.1f} epochs, done in {time.monotonic() - started:.0f} s"
        )

    def _line(self, row: str, column: str, values: Float64) -> dict[str, Any]:
        return mean_line(
            f"tasks: {ROWS[row][0]}", self.options.dataset, f"sidstream-{row}", column, values,
            self.options.seed, self.command, "none",
        )  # fmt: skip


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A row each training; a column each figure that some row has, with half its 95 % interval."""
    columns = [name for name in COLUMNS if any(row_line["metric"] == name for row_line in lines)]
    lines_of_row: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row_line in lines:
        row = row_line["dataset"], row_line["claim"].partition(": ")[2]
        lines_of_row.setdefault(row, {})[row_line["metric"]] = row_line
    rows = [
        [dataset, words, *(_cell(by_column.get(name)) for name in columns)]
        for (dataset, words), by_column in lines_of_row.items()
    ]
    return markdown_table(["data set", "trained on", *columns], rows)


def _cell(row_line: dict[str, Any] | None) -> str:
    if row_line is None:
        return ""
    return f"{row_line['value']:.4f} ± {row_line['high'] - row_line['value']:.4f}"


def publish(lines: Sequence[dict[str, Any]], results: Path) -> None:
    """Put the lines and the page's table in place of those of the same data sets."""
    file = results / "tasks.jsonl"
    measured = {row_line["dataset"] for row_line in lines}
    all_lines = [row_line for row_line in read_lines(file) if row_line["dataset"] not in measured]
    all_lines += lines
    put_table(results / "tasks.md", BEGIN, END, table(all_lines))
    write_lines(file, all_lines)


def main() -> None:
    """Measure the rows that are not there yet; print all lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", choices=("rees46", "online-retail"))
    parser.add_argument("--rows", help=f"with commas between: {', '.join(ROWS)}; default: all")
    add_data_option(parser)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--max-seconds", type=float, help="of each training; default: all epochs")
    parser.add_argument("--queries", type=int, default=1500, help="of the test, drawn once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("tasks"), help="folder of what is done")
    parser.add_argument("--publish", action="store_true", help="put the table into docs/results")
    options = parser.parse_args()
    bench = TasksBenchmark(options, split_by_time(load_dataset(options.dataset, options.data)))
    rows = options.rows.split(",") if options.rows else bench.rows()
    unknown_rows = [row for row in rows if row not in bench.rows()]
    if unknown_rows:
        parser.error(
            f"{options.dataset} has no row {unknown_rows[0]!r}: give some of {', '.join(bench.rows())}"
        )
    options.work.mkdir(parents=True, exist_ok=True)
    for row in rows:
        bench.measure(row)
    for row_line in bench.lines():
        print(json.dumps(row_line), flush=True)
    if options.publish:
        publish(bench.lines(), RESULTS)


if __name__ == "__main__":
    main()
