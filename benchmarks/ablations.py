"""What each part of the generator gives: one training for each row, everything else as in the first.

    python -m benchmarks.ablations amazon14-beauty --publish

Smaller and shorter than what `sidstream evaluate` trains (width 64, 10 epochs, one seed), so that a row takes
minutes; choices are made on the validation column. --rows trains some of them, --work keeps what is done
(a row that is there is not trained again).
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

from benchmarks.ensembles import Ensemble, distilled
from benchmarks.results import RESULTS, asks_for_data, line, put_table
from trainer.evaluation.datasets import load_dataset
from trainer.evaluation.generator_ranker import TrainedGenerator, TrainingRecipe, tuned_recipe
from trainer.evaluation.metrics import accuracy, target_ranks
from trainer.evaluation.ranker import MASKS, Head, Mask
from trainer.evaluation.sequences import Int64
from trainer.evaluation.splits import EvaluationSplit, Queries, leave_one_out
from trainer.offline.ranking import DENSE_WEIGHTS

BEGIN, END = "<!-- ablations -->\n", "<!-- end of ablations -->\n"
Figures = dict[tuple[str, str, Mask], dict[str, np.ndarray]]

# name -> its words, and what differs from the first row: settings of the trainer, of the codebook.
# The recipe has no titles: said again here, since a row's weights replace all of them.
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
# Two tokenisations besides the first row's: what they say together, and one model that learned it.
MEMBERS = ("base", "3x256", "rqvae")
ENSEMBLES = ("ensemble", "distilled")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    asked.add_argument("dataset", choices=("amazon14-beauty", "amazon14-toys"))
    asked.add_argument("--rows", help=f"with commas between: {', '.join((*ROWS, *ENSEMBLES))}; default: all")
    asked.add_argument("--epochs", type=int, default=10)
    asked.add_argument("--width", type=int, default=64)
    asked.add_argument("--seed", type=int, default=1)
    asked.add_argument("--users", type=int, default=6000, help="of validation and of test, drawn once")
    asks_for_data(asked)
    asked.add_argument("--work", type=Path, default=Path("ablations"), help="folder of what is done")
    asked.add_argument("--publish", action="store_true", help="put the table into docs/results")
    given = asked.parse_args()
    rows = given.rows.split(",") if given.rows else [*MEMBERS, *ENSEMBLES, *(set(ROWS) - set(MEMBERS))]
    wrong = [row for row in rows if row not in ROWS and row not in ENSEMBLES]
    if wrong:
        asked.error(f"there is no row {wrong[0]!r}: give some of {', '.join((*ROWS, *ENSEMBLES))}")
    given.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(given, leave_one_out(load_dataset(given.dataset, given.data)))
    for row in sorted(rows, key=[*ROWS, *ENSEMBLES].index):
        bench.measure(row)
    if given.publish:
        publish(bench.lines(), RESULTS)


class Bench:
    """Rows of one data set, seed and shape, each kept as a file of lines when it is done."""

    def __init__(self, given: argparse.Namespace, split: EvaluationSplit) -> None:
        self.given, self.split = given, split
        self._members: dict[str, TrainedGenerator] = {}
        self.command = (
            f"python -m benchmarks.ablations {given.dataset} --epochs {given.epochs} --width {given.width} "
            f"--users {given.users}"
        )

    def _path(self, row: str) -> Path:
        about = f"{self.given.dataset} {row} {self.given.epochs} {self.given.width} {self.given.seed}"
        return self.given.work / f"{row}-{hashlib.sha256(about.encode()).hexdigest()[:8]}.jsonl"

    def lines(self) -> list[dict[str, Any]]:
        """All lines of the rows that are done, in the order of the table."""
        done = [self._path(row) for row in (*ROWS, *ENSEMBLES)]
        return [json.loads(text) for path in done if path.exists() for text in path.read_text().splitlines()]

    def recipe_of(self, row: str) -> TrainingRecipe:
        """What a row trains."""
        plain = tuned_recipe(epochs=self.given.epochs)
        _, trainer, codebook = ROWS[row]
        shape = {"width": self.given.width, "patience": 100}
        return TrainingRecipe(plain.trainer | shape | trainer, plain.codebook | codebook, plain.candidates)

    def trained(self, row: str) -> TrainedGenerator:
        """A row's model; those of the ensemble are kept for it."""
        if row in self._members:
            return self._members[row]
        made = TrainedGenerator(self.recipe_of(row))
        made.fit(self.split, self.given.seed, lambda text: _tell(f"{row}: {text}"))
        if row in MEMBERS:
            self._members[row] = made
        return made

    def measure(self, row: str) -> None:
        """Train and count one row, unless it is there."""
        if self._path(row).exists():
            return
        began = time.monotonic()
        extra: list[dict[str, Any]] = []
        if row in ENSEMBLES:
            ensemble = Ensemble([self.trained(name) for name in MEMBERS])
            if row == "ensemble":
                figures = {
                    key: value
                    for part, queries in self._parts()
                    for key, value in _of_ensemble(ensemble, part, queries).items()
                }
                words = f"{len(MEMBERS)} tokenisations, mean of log-probabilities"
            else:
                made = distilled(
                    ensemble, self.recipe_of("base"), self.split, self.given.seed,
                    lambda text: _tell(f"{row}: {text}"),
                )  # fmt: skip
                figures, words = self._figures(made), "the ensemble, distilled into the first row"
        else:
            made = self.trained(row)
            figures, words = self._figures(made), ROWS[row][0]
            if row == "base":
                extra = self._weights(made)
        seconds = time.monotonic() - began
        lines = [
            self._line(words, f"{part} {metric}, {head}", mask, values, row)
            for (part, head, mask), metrics in figures.items()
            for metric, values in metrics.items()
        ]
        self._path(row).write_text("".join(json.dumps(one) + "\n" for one in [*lines, *extra]))
        _tell(f"{row}: done in {seconds:.0f} s")

    def _parts(self) -> list[tuple[str, Queries]]:
        return [("validation", self._drawn(self.split.valid)), ("test", self._drawn(self.split.test))]

    def _drawn(self, queries: Queries) -> Queries:
        """The same users for every row: beams of fifty for all of them would take longer than a training."""
        at = np.sort(np.random.default_rng(0).permutation(len(queries))[: self.given.users])
        return queries.take(at)

    def _figures(self, made: TrainedGenerator) -> Figures:
        found: Figures = {}
        heads: tuple[Head, ...] = ("beam", "reordered", "dense")
        for part, queries in self._parts():
            for mask in MASKS:
                for head in heads:
                    lists = made.rank(queries.histories, 10, mask, head)
                    found[part, head, mask] = _counted(lists, queries.targets)
        return found

    def _weights(self, made: TrainedGenerator) -> list[dict[str, Any]]:
        """The dense head's weight in the final score."""
        queries, lines = self._drawn(self.split.valid), []
        for weight in DENSE_WEIGHTS:
            lists = made.rank_mixed(queries.histories, 10, "seen", weight)
            for metric, values in _counted(lists, queries.targets).items():
                words = f"weight {weight} of the dense head"
                lines.append(self._line(words, f"validation {metric}, mixed", "seen", values, "weights"))
        return lines

    def _line(self, words: str, metric: str, mask: Mask, values: np.ndarray, row: str) -> dict[str, Any]:
        mean, error = float(values.mean()), float(values.std()) / math.sqrt(len(values))
        made = line(
            f"ablation {row}: {words}", self.given.dataset, f"sidstream-{row}", metric, round(mean, 4),
            self.given.seed, self.command, round(mean - 1.96 * error, 4), round(mean + 1.96 * error, 4), mask,
        )  # fmt: skip
        return made


def _of_ensemble(ensemble: Ensemble, part: str, queries: Queries) -> Figures:
    found: Figures = {}
    for mask in MASKS:
        for head in ("beam", "dense"):
            lists = ensemble.rank(queries.histories, 10, mask, head)
            found[part, head, mask] = _counted(lists, queries.targets)
    return found


def _counted(lists: Int64, targets: Int64) -> dict[str, np.ndarray]:
    found = accuracy(target_ranks(lists, targets))
    return {name: found[name] for name in ("HR@10", "NDCG@10")}


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


COLUMNS: tuple[tuple[str, str, str, Mask], ...] = (
    ("validation", "dense, seen", "dense", "seen"),
    ("validation", "dense, no mask", "dense", "none"),
    ("validation", "beam, seen", "beam", "seen"),
    ("test", "dense, seen", "dense", "seen"),
    ("test", "beam, seen", "beam", "seen"),
)


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A row each ablation, HR@10 / NDCG@10 a column."""
    found: dict[tuple[str, str, str | None], float] = {}
    words: dict[str, str] = {}
    for one in lines:
        found[one["model"], one["metric"], one["mask"]] = one["value"]
        words.setdefault(one["model"], one["claim"].partition(": ")[2])
    heads = [f"{part}: {name}" for part, name, _, _ in COLUMNS]
    made = ["| " + " | ".join(["", *heads]) + " |", "|" + "---|" * (len(heads) + 1)]
    for model, text in words.items():
        if model == "sidstream-weights":
            continue
        cells = []
        for part, _, head, mask in COLUMNS:
            hr, ndcg = (
                found.get((model, f"{part} {metric}, {head}", mask)) for metric in ("HR@10", "NDCG@10")
            )
            cells.append("" if hr is None or ndcg is None else f"{hr:.4f} / {ndcg:.4f}")
        made.append(f"| {text} | " + " | ".join(cells) + " |")
    weights = [one for one in lines if one["model"] == "sidstream-weights" and "NDCG" in one["metric"]]
    if weights:
        texts = [one["claim"].partition("weight ")[2].partition(" ")[0] for one in weights]
        made += ["", "Weight of the dense head in the final score, validation NDCG@10 (`seen`):", ""]
        made += ["| " + " | ".join(texts) + " |", "|" + "---|" * len(texts)]
        made.append("| " + " | ".join(f"{one['value']:.4f}" for one in weights) + " |")
    return made


def publish(lines: Sequence[dict[str, Any]], results: Path) -> None:
    """Write the lines and the page's table."""
    put_table(results / "ablations.md", BEGIN, END, table(lines))
    (results / "ablations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


if __name__ == "__main__":
    main()
