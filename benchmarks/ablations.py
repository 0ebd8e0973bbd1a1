"""What each part of the generator gives: one training for each row, everything else as in the first.

    python -m benchmarks.ablations amazon14-beauty --publish

Smaller and shorter than what `sidstream evaluate` trains (width 64, 10 epochs, one seed), so that a row takes
minutes; choices are made on the validation column. --rows trains some of them, --work keeps what is done
(a row that is there is not trained again).
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ensembles import Ensemble, distil
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
from trainer.evaluation.generator_ranker import TrainedGenerator, TrainingRecipe, tuned_recipe
from trainer.evaluation.metrics import accuracy, target_ranks
from trainer.evaluation.ranker import MASKS, Head, Mask
from trainer.evaluation.sequences import Int64
from trainer.evaluation.splits import EvaluationSplit, Queries, leave_one_out
from trainer.offline_checks.served_lists import DENSE_WEIGHTS

BEGIN, END = "<!-- ablations -->\n", "<!-- end of ablations -->\n"
Figures = dict[tuple[str, str, Mask], dict[str, np.ndarray]]

# Name -> description, and what differs from the first row: settings of the trainer and of the codebook.
# The recipe has no title tasks; a row with weights repeats that, since its weights replace all of them.
_NO_TITLES = {"sid_to_title": 0.0, "title_to_sid": 0.0}
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "base": ("4 x 256 by k-means, half collaborative; own vectors and texts; dropout .5", {}, {}),
    "dropout-.2": ("dropout .2", {"dropout": 0.2}, {}),
    "dropout-.35": ("dropout .35", {"dropout": 0.35}, {}),
    "prefix": ("every prefix a sample", {"samples": "prefix"}, {}),
    "3x256": ("3 x 256 codes", {}, {"levels": 3}),
    "4x128": ("4 x 128 codes", {}, {"size": 128}),
    "4x512": ("4 x 512 codes", {}, {"size": 512}),
    "rqvae": ("RQ-VAE in place of k-means", {}, {"method": "rqvae"}),
    "text-codes": ("codes from texts alone", {}, {"collaborative": 0.0}),
    "collaborative-codes": ("codes from collaboration alone", {}, {"collaborative": 1.0}),
    "codes-only": ("input: codes alone", {"item_vectors": False, "text_inputs": False}, {}),
    "codes-text": ("input: codes and texts", {"item_vectors": False}, {}),
    "codes-own": ("input: codes and own vectors", {"text_inputs": False}, {}),
    "members": ("3 seeds, merged into one generator", {"members": 3}, {}),
    "smoothing-.1": (".1 label smoothing, along the code tree", {"smoothing": 0.1}, {}),
    "no-sid": ("no loss of the SID", {"weights": {"next_sid": 0.0} | _NO_TITLES}, {}),
    "no-dense": ("no loss of the dense head", {"weights": {"next_item": 0.0} | _NO_TITLES}, {}),
}  # fmt: skip
# Models of three tokenisations: their mean, and one model that learns from it.
MEMBERS = ("base", "3x256", "rqvae")
ENSEMBLES = ("ensemble", "distilled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dataset", choices=("amazon14-beauty", "amazon14-toys"))
    parser.add_argument("--rows", help=f"with commas between: {', '.join((*ROWS, *ENSEMBLES))}; default: all")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--users", type=int, default=6000, help="of validation and of test, drawn once")
    add_data_option(parser)
    parser.add_argument("--work", type=Path, default=Path("ablations"), help="folder of what is done")
    parser.add_argument("--publish", action="store_true", help="put the table into docs/results")
    options = parser.parse_args()
    rows = options.rows.split(",") if options.rows else [*MEMBERS, *ENSEMBLES, *(set(ROWS) - set(MEMBERS))]
    unknown_rows = [row for row in rows if row not in ROWS and row not in ENSEMBLES]
    if unknown_rows:
        parser.error(f"there is no row {unknown_rows[0]!r}: give some of {', '.join((*ROWS, *ENSEMBLES))}")
    options.work.mkdir(parents=True, exist_ok=True)
    bench = AblationBenchmark(options, leave_one_out(load_dataset(options.dataset, options.data)))
    for row in sorted(rows, key=[*ROWS, *ENSEMBLES].index):
        bench.measure(row)
    if options.publish:
        publish(bench.lines(), RESULTS)


class AblationBenchmark:
    """Rows of one data set, seed and shape, each kept as a file of lines when it is done."""

    def __init__(self, options: argparse.Namespace, split: EvaluationSplit) -> None:
        self.options, self.split = options, split
        self._members: dict[str, TrainedGenerator] = {}
        self.command = (
            f"python -m benchmarks.ablations {options.dataset} --epochs {options.epochs} "
            f"--width {options.width} --users {options.users}"
        )

    def _path(self, row: str) -> Path:
        about = f"{self.options.dataset} {row} {self.options.epochs} {self.options.width} {self.options.seed}"
        return self.options.work / f"{row}-{hashlib.sha256(about.encode()).hexdigest()[:8]}.jsonl"

    def lines(self) -> list[dict[str, Any]]:
        """All lines of the rows that are done, in the order of the table."""
        return [row_line for row in (*ROWS, *ENSEMBLES) for row_line in read_lines(self._path(row))]

    def recipe_of(self, row: str) -> TrainingRecipe:
        """What a row trains."""
        plain = tuned_recipe(epochs=self.options.epochs)
        _, trainer, codebook = ROWS[row]
        shape = {"width": self.options.width, "patience": 100}
        return TrainingRecipe(plain.trainer | shape | trainer, plain.codebook | codebook, plain.candidates)

    def trained(self, row: str) -> TrainedGenerator:
        """The model of a row; those that the ensembles need are cached."""
        if row in self._members:
            return self._members[row]
        trained = TrainedGenerator(self.recipe_of(row))
        trained.fit(self.split, self.options.seed, lambda text: report_progress(f"{row}: {text}"))
        if row in MEMBERS:
            self._members[row] = trained
        return trained

    def measure(self, row: str) -> None:
        """Train and measure one row, unless its file exists."""
        if self._path(row).exists():
            return
        started = time.monotonic()
        weight_lines: list[dict[str, Any]] = []
        if row in ENSEMBLES:
            ensemble = Ensemble([self.trained(name) for name in MEMBERS])
            if row == "ensemble":
                figures = {
                    key: value
                    for part, queries in self._parts()
                    for key, value in _ensemble_figures(ensemble, part, queries).items()
                }
                words = f"{len(MEMBERS)} tokenisations, mean of log-probabilities"
            else:
                trained = distil(
                    ensemble, self.recipe_of("base"), self.split, self.options.seed,
                    lambda text: report_progress(f"{row}: {text}"),
                )  # fmt: skip
                figures, words = self._figures(trained), "the ensemble, distilled into the first row"
        else:
            trained = self.trained(row)
            figures, words = self._figures(trained), ROWS[row][0]
            if row == "base":
                weight_lines = self._weight_lines(trained)
        seconds = time.monotonic() - started
        lines = [
            self._line(words, f"{part} {metric}, {head}", mask, values, row)
            for (part, head, mask), metrics in figures.items()
            for metric, values in metrics.items()
        ]
        write_lines(self._path(row), [*lines, *weight_lines])
        report_progress(f"{row}: done in {seconds:.0f} s")

    def _parts(self) -> list[tuple[str, Queries]]:
        return [("validation", self._sampled(self.split.valid)), ("test", self._sampled(self.split.test))]

    def _sampled(self, queries: Queries) -> Queries:
        """The same users for every row: beams of fifty for all of them would take longer than a training."""
        at = np.sort(np.random.default_rng(0).permutation(len(queries))[: self.options.users])
        return queries.take(at)

    def _figures(self, trained: TrainedGenerator) -> Figures:
        figures: Figures = {}
        heads: tuple[Head, ...] = ("beam", "reordered", "dense")
        for part, queries in self._parts():
            for mask in MASKS:
                for head in heads:
                    lists = trained.rank(queries.histories, 10, mask, head)
                    figures[part, head, mask] = _accuracy(lists, queries.targets)
        return figures

    def _weight_lines(self, trained: TrainedGenerator) -> list[dict[str, Any]]:
        """The dense head's weight in the final score."""
        queries, lines = self._sampled(self.split.valid), []
        for weight in DENSE_WEIGHTS:
            lists = trained.rank_mixed(queries.histories, 10, "seen", weight)
            for metric, values in _accuracy(lists, queries.targets).items():
                words = f"weight {weight} of the dense head"
                lines.append(self._line(words, f"validation {metric}, mixed", "seen", values, "weights"))
        return lines

    def _line(self, words: str, metric: str, mask: Mask, values: np.ndarray, row: str) -> dict[str, Any]:
        return mean_line(
            f"ablation {row}: {words}", self.options.dataset, f"sidstream-{row}", metric, values,
            self.options.seed, self.command, mask,
        )  # fmt: skip


def _ensemble_figures(ensemble: Ensemble, part: str, queries: Queries) -> Figures:
    figures: Figures = {}
    for mask in MASKS:
        for head in ("beam", "dense"):
            lists = ensemble.rank(queries.histories, 10, mask, head)
            figures[part, head, mask] = _accuracy(lists, queries.targets)
    return figures


def _accuracy(lists: Int64, targets: Int64) -> dict[str, np.ndarray]:
    figures = accuracy(target_ranks(lists, targets))
    return {name: figures[name] for name in ("HR@10", "NDCG@10")}


COLUMNS: tuple[tuple[str, str, str, Mask], ...] = (
    ("validation", "dense, seen", "dense", "seen"),
    ("validation", "dense, no mask", "dense", "none"),
    ("validation", "beam, seen", "beam", "seen"),
    ("test", "dense, seen", "dense", "seen"),
    ("test", "beam, seen", "beam", "seen"),
)


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A row each ablation, HR@10 / NDCG@10 a column."""
    figures: dict[tuple[str, str, str | None], float] = {}
    words: dict[str, str] = {}
    for row_line in lines:
        figures[row_line["model"], row_line["metric"], row_line["mask"]] = row_line["value"]
        words.setdefault(row_line["model"], row_line["claim"].partition(": ")[2])
    heads = [f"{part}: {name}" for part, name, _, _ in COLUMNS]
    rows = []
    for model, text in words.items():
        if model == "sidstream-weights":
            continue
        cells = []
        for part, _, head, mask in COLUMNS:
            hr, ndcg = (
                figures.get((model, f"{part} {metric}, {head}", mask)) for metric in ("HR@10", "NDCG@10")
            )
            cells.append("" if hr is None or ndcg is None else f"{hr:.4f} / {ndcg:.4f}")
        rows.append([text, *cells])
    page = markdown_table(["", *heads], rows)
    weights = [
        row_line
        for row_line in lines
        if row_line["model"] == "sidstream-weights" and "NDCG" in row_line["metric"]
    ]
    if weights:
        texts = [row_line["claim"].partition("weight ")[2].partition(" ")[0] for row_line in weights]
        page += ["", "Weight of the dense head in the final score, validation NDCG@10 (`seen`):", ""]
        page += markdown_table(texts, [[f"{row_line['value']:.4f}" for row_line in weights]])
    return page


def publish(lines: Sequence[dict[str, Any]], results: Path) -> None:
    """Write the lines and the page's table."""
    put_table(results / "ablations.md", BEGIN, END, table(lines))
    write_lines(results / "ablations.jsonl", lines)


if __name__ == "__main__":
    main()
