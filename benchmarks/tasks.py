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
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import RESULTS, asks_for_data, line, put_table
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
    made: dict[str, float] = {}
    for task, (there, absent) in TASKS.items():
        made |= there if task in ROWS[row][1] else absent
    return made


def figures(made: TrainedGenerator, queries: Queries) -> dict[str, Float64]:
    """Column -> what each query, or each history, gets (N,). What a data set does not tell is left out.

    A search has the history and 1 to 3 words of the target's title, the same ones for every row of the table.
    A summary is right by the share of the words most typical of the history that are said, where as many are
    said as there are.
    """
    lists = made.rank(queries.histories, K, "none", "mixed", queries.users)
    found = {"next item HR@10": (target_ranks(lists, queries.targets) >= 0).astype(float)}
    if queries.bought is not None:
        found["bought HR@10"] = found["next item HR@10"][queries.bought]
    titles, words, codes, limits = (
        made.rows.title_words,
        made.rows.words,
        made.catalogue.codes,
        made.settings.tasks,
    )
    rng = np.random.default_rng(0)
    searches, targets, heard, wanted = [], [], [], []
    for past, target in zip(queries.histories, queries.targets.tolist(), strict=True):
        history = codes[past[-limits.history :]]
        if words.typical([titles[target]], 1):
            searches.append(search_prompt(history, words.draw_query(titles[target], limits.query_words, rng)))
            targets.append(target)
        typical = words.typical([titles[item] for item in past[-limits.history :]], limits.summary_words)
        if typical:
            heard.append(summary_prompt(history))
            wanted.append(typical)
    spelled = search_items(made.model, searches, made.sid_set, made.catalogue, K)
    found["search HR@10"] = (target_ranks(spelled, np.array(targets, np.int64)) >= 0).astype(float)
    said = predict_words(made.model, heard, [len(row) for row in wanted], made.rows.prompt.first_word)
    found["summary words"] = np.array(
        [len({*one} & {*other}) / len(other) for one, other in zip(said, wanted, strict=True)]
    )
    return found


class Bench:
    """Rows of one data set and seed, each kept as a file of lines when it is done."""

    def __init__(self, given: argparse.Namespace, split: EvaluationSplit) -> None:
        self.given, self.split = given, split
        at = np.sort(np.random.default_rng(0).permutation(len(split.test))[: given.queries])
        # What was bought is rare: none of it is left out.
        if split.test.bought is not None:
            at = np.union1d(at, np.flatnonzero(split.test.bought))
        self.queries = split.test.take(at)
        limit = f" --max-seconds {given.max_seconds:g}" if given.max_seconds else ""
        self.command = f"python -m benchmarks.tasks {given.dataset} --epochs {given.epochs}{limit}"

    def rows(self) -> list[str]:
        """The rows that this data set can have: without clicks, all is bought."""
        return [row for row in ROWS if row != "no-purchase" or self.split.dataset.bought is not None]

    def _path(self, row: str) -> Path:
        about = f"{self.command} --queries {self.given.queries} --seed {self.given.seed}"
        return self.given.work / f"tasks-{row}-{hashlib.sha256(about.encode()).hexdigest()[:8]}.jsonl"

    def lines(self) -> list[dict[str, Any]]:
        """All lines of the rows that are done, in the order of the table."""
        done = [self._path(row) for row in ROWS]
        return [json.loads(text) for path in done if path.exists() for text in path.read_text().splitlines()]

    def measure(self, row: str) -> None:
        """Train and count one row, unless it is there."""
        if self._path(row).exists():
            return
        began = time.monotonic()
        settings = {"epochs": self.given.epochs, "max_seconds": self.given.max_seconds}
        made = TrainedGenerator(TrainingRecipe(settings | {"weights": weights(row)}))
        made.fit(self.split, self.given.seed, lambda text: _tell(f"{row}: {text}"))
        lines = [self._line(row, name, values) for name, values in figures(made, self.queries).items()]
        self._path(row).write_text("".join(json.dumps(one) + "\n" for one in lines))
        _tell(f"{row}: {made.result.epochs:.1f} epochs, done in {time.monotonic() - began:.0f} s")

    def _line(self, row: str, column: str, values: Float64) -> dict[str, Any]:
        mean, error = float(values.mean()), float(values.std()) / math.sqrt(len(values))
        return line(
            f"tasks: {ROWS[row][0]}", self.given.dataset, f"sidstream-{row}", column, round(mean, 4),
            self.given.seed, self.command, round(mean - 1.96 * error, 4), round(mean + 1.96 * error, 4),
            "none",
        )  # fmt: skip


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A row each training; a column each figure that some row has, with half its 95 % interval."""
    columns = [name for name in COLUMNS if any(one["metric"] == name for one in lines)]
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for one in lines:
        row = one["dataset"], one["claim"].partition(": ")[2]
        found.setdefault(row, {})[one["metric"]] = one
    made = ["| " + " | ".join(["data set", "trained on", *columns]) + " |", "|" + "---|" * (len(columns) + 2)]
    for (dataset, words), of in found.items():
        cells = [
            f"{of[name]['value']:.4f} ± {of[name]['high'] - of[name]['value']:.4f}" if name in of else ""
            for name in columns
        ]
        made.append("| " + " | ".join([dataset, words, *cells]) + " |")
    return made


def publish(lines: Sequence[dict[str, Any]], results: Path) -> None:
    """Put the lines and the page's table in place of those of the same data sets."""
    kept = results / "tasks.jsonl"
    before = [json.loads(text) for text in kept.read_text().splitlines()] if kept.exists() else []
    fresh = {one["dataset"] for one in lines}
    whole = [one for one in before if one["dataset"] not in fresh] + list(lines)
    put_table(results / "tasks.md", BEGIN, END, table(whole))
    kept.write_text("".join(json.dumps(one) + "\n" for one in whole))


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure the rows that are not there yet; print all lines."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("dataset", choices=("rees46", "online-retail"))
    asked.add_argument("--rows", help=f"with commas between: {', '.join(ROWS)}; default: all")
    asks_for_data(asked)
    asked.add_argument("--epochs", type=int, default=4)
    asked.add_argument("--max-seconds", type=float, help="of each training; default: all epochs")
    asked.add_argument("--queries", type=int, default=1500, help="of the test, drawn once")
    asked.add_argument("--seed", type=int, default=1)
    asked.add_argument("--work", type=Path, default=Path("tasks"), help="folder of what is done")
    asked.add_argument("--publish", action="store_true", help="put the table into docs/results")
    given = asked.parse_args()
    bench = Bench(given, split_by_time(load_dataset(given.dataset, given.data)))
    rows = given.rows.split(",") if given.rows else bench.rows()
    wrong = [row for row in rows if row not in bench.rows()]
    if wrong:
        asked.error(f"{given.dataset} has no row {wrong[0]!r}: give some of {', '.join(bench.rows())}")
    given.work.mkdir(parents=True, exist_ok=True)
    for row in rows:
        bench.measure(row)
    for one in bench.lines():
        print(json.dumps(one), flush=True)
    if given.publish:
        publish(bench.lines(), RESULTS)


if __name__ == "__main__":
    main()
