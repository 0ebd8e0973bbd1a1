"""Claim: aligned to purchases, the model puts more of what is bought first, and keeps what is clicked.

    python -m benchmarks.alignment tmall2014 --data /data --publish

A real log, split in time. One fine-tuned model a seed; from it every loss over every scheme of pairs, by the
trainer's own code, its stop rules included. Test figures over all items, past ones included: HR@1 and HR@10
of the next click (all steps) and of the steps that were bought then or within a day, with the relative change
to the fine-tuned model and its interval over users and seeds (`trainer.offline_checks.bootstrap`); and how
much of what is spelled without a constraint is no SID.

Logs say what was clicked and bought, not what was shown. `purchased_over_clicked` pairs are the agents' own
rule over the log (`agents.attribution.pairs`). For the two schemes over what was shown, the fine-tuned
model's own ten best items stand in, at those steps whose item is among them: of those, what the user neither
clicked nor bought within the window.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.alignment_pairs import clicked_pairs, shown_pairs
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
from streams.events import PreferencePair, Scheme
from trainer.alignment.dpo import align
from trainer.alignment.rows import preference_rows
from trainer.evaluation.datasets import load_dataset
from trainer.evaluation.generator_ranker import TrainedGenerator, TrainingRecipe, default_recipe
from trainer.evaluation.metrics import accuracy, target_ranks
from trainer.evaluation.sequences import Float64
from trainer.evaluation.splits import EvaluationSplit, Queries, split_by_time
from trainer.offline_checks.bootstrap import Interval, relative_changes, relative_changes_over_seeds
from trainer.offline_checks.offline_check import held_out_probe
from trainer.offline_checks.quality import evaluate_held_out
from trainer.offline_checks.ranking import Candidates
from trainer.sequences.batches import Int64

BEGIN, END = "<!-- {} -->\n", "<!-- end of {} -->\n"
SCHEMES: tuple[Scheme, ...] = ("purchased_over_clicked", "purchased_over_shown", "clicked_over_shown")
# Settings of `trainer.dpo` for each row, beside `_ALL`.
LOSSES: dict[str, dict[str, Any]] = {
    "SFT, as many steps more": {"weight": 0.0, "sft_weight": 0.0},
    "plain DPO": {"loss": "dpo", "sft_weight": 0.0, "replay_weight": 0.0},
    "DPO": {"loss": "dpo"},
    "S-DPO": {"loss": "softmax_dpo"},
    "beta-DPO": {"loss": "dpo", "dynamic_beta": True},
    "S-DPO + beta": {"loss": "softmax_dpo", "dynamic_beta": True},
}
# Settings of all rows beside the defaults.
_ALL: dict[str, Any] = {"max_pairs": 4000, "max_seconds": None}
# A row that learns nothing: the fine-tuned model's candidates, moved by how often each item is bought.
PURCHASE_RATES = "SFT, moved by items' rates of purchase"
PRIOR_STEPS, FACTORS = 20.0, (0.0, 0.1, 0.25, 0.5, 1.0)
METRICS = ("click HR@1", "click HR@10", "purchase HR@1", "purchase HR@10")


@dataclass
class Figures:
    """One model on one seed: hits of every query, whose it was, and the share of answers that are no SID."""

    hits: dict[int, np.ndarray]  # cut -> (B,) float64
    bought: np.ndarray
    users: np.ndarray
    invalid: float
    note: str

    def column(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Hits (B',) and users (B',) of a metric."""
        what, _, cut = metric.partition(" HR@")
        other_lines = self.bought if what == "purchase" else np.ones(len(self.bought), bool)
        return self.hits[int(cut)][other_lines], self.users[other_lines]


def dataset_recipe(name: str, seconds: float | None, epochs: int | None) -> TrainingRecipe:
    """What is fine-tuned: the default model, with codes of collaboration alone where a log has no texts."""
    baseline = default_recipe(seconds, epochs)
    if name != "tmall2014":
        return baseline
    # So few users, each with hundreds of steps, are soon known by heart: dropout as for the Amazon sets.
    changes = {"text_inputs": False, "max_words": 0, "dropout": 0.5, "lr": 2e-3, "fit_strength": True}
    return TrainingRecipe(baseline.trainer | changes, {"collaborative": 1.0})


def measure(trained: TrainedGenerator, queries: Queries, note: str) -> Figures:
    """A model's figures on the test queries."""
    lists = trained.rank(queries.histories, 10, "none", "mixed")
    quality = evaluate_held_out(
        trained.model, trained.held_out, trained.catalogue, trained.sid_set, trained.ranking
    )
    return _figures(lists, queries, 1 - quality.validity, note)


def reranked_by_purchase_rate(
    trained: TrainedGenerator, split: EvaluationSplit, queries: Queries, invalid: float
) -> Figures:
    """The fine-tuned model's candidates in the order of their score and the log of how often each is bought.

    What can be had without learning: a step on item i of the training part was bought in b_i of n_i cases,
    the score gets a log((b_i + PRIOR p) / (n_i + PRIOR)), p of all, a by the purchases of validation.
    """
    assert split.bought is not None, "the log has purchases"
    steps, purchases = np.zeros(split.dataset.size), np.zeros(split.dataset.size)
    for items, bought in zip(split.train, split.bought, strict=True):
        np.add.at(steps, items, 1)
        np.add.at(purchases, items, bought)
    rate = np.log((purchases + PRIOR_STEPS * purchases.sum() / steps.sum()) / (steps + PRIOR_STEPS))
    weight, log_rate = trained.ranking.dense_weight, torch.from_numpy(rate)
    assert split.valid.bought is not None
    sales = split.valid.take(np.flatnonzero(split.valid.bought))
    sale_candidates = _candidates(trained, sales)

    def validation_ndcg(factor: float) -> float:
        ranks = target_ranks(_top_items(sale_candidates, weight, log_rate, factor), sales.targets)
        return float(accuracy(ranks)["NDCG@10"].mean())

    best = max(FACTORS, key=validation_ndcg)
    lists = _top_items(_candidates(trained, queries), weight, log_rate, best)
    return _figures(lists, queries, invalid, f"factor {best}")


def _candidates(trained: TrainedGenerator, queries: Queries) -> Candidates:
    return trained.ranker.candidates([row[-trained.settings.max_items :] for row in queries.histories])


def _top_items(candidates: Candidates, weight: float, rate: torch.Tensor, factor: float) -> Int64:
    score = candidates.score(weight) + factor * rate[candidates.items.clamp(min=0)]
    at = score.argsort(dim=1, descending=True, stable=True)[:, :10]
    listed = candidates.items.gather(1, at)
    return torch.where(score.gather(1, at) > -torch.inf, listed, -1).numpy()


def _figures(lists: Int64, queries: Queries, invalid: float, note: str) -> Figures:
    assert queries.bought is not None
    ranks = target_ranks(lists, queries.targets)
    hits = {cut: ((ranks >= 0) & (ranks < cut)).astype(np.float64) for cut in (1, 10)}
    return Figures(hits, queries.bought, queries.users, invalid, note)


def sample_queries(queries: Queries, count: int) -> Queries:
    """Up to `count` of the queries, and all whose target was bought."""
    assert queries.bought is not None
    at = np.random.default_rng(0).permutation(len(queries))[:count]
    return queries.take(np.union1d(at, np.flatnonzero(queries.bought)))


def main() -> None:
    """Measure every loss over every scheme with every seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", choices=("tmall2014", "rees46"))
    add_data_option(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--max-seconds", type=float, help="of the fine-tuning; default: all epochs")
    parser.add_argument("--queries", type=int, default=4000, help="of the test, beside all that were bought")
    parser.add_argument("--part", choices=("valid", "test"), default="test")
    parser.add_argument("--loss", action="append", help="only this row; may be given again")
    parser.add_argument("--scheme", action="append", choices=SCHEMES)
    parser.add_argument("--set", action="append", default=[], help="of trainer.dpo, for example lr=0.0002")
    parser.add_argument("--publish", action="store_true", help="put the table into docs/results")
    options = parser.parse_args()
    split = split_by_time(load_dataset(options.dataset, options.data))
    queries = sample_queries(split.test if options.part == "test" else split.valid, options.queries)
    runs_by_variant: dict[str, list[Figures]] = {}
    for seed in range(1, options.seeds + 1):
        for name, figures in measured_variants(options, split, queries, seed):
            runs_by_variant.setdefault(name, []).append(figures)
            report_progress(f"seed {seed}, {name}: {_progress_text(runs_by_variant['SFT'][-1], figures)}")
    command = f"python -m benchmarks.alignment {options.dataset} --seeds {options.seeds}"
    command += f" --queries {options.queries}"
    for name in ("epochs", "max_seconds"):
        if getattr(options, name) is not None:
            command += f" --{name.replace('_', '-')} {getattr(options, name):g}"
    command += "".join(f" --set {figure}" for figure in options.set)
    result_lines = lines(options.dataset, runs_by_variant, command)
    for figure in result_lines:
        print(json.dumps(figure), flush=True)
    if options.publish:
        publish(options.dataset, result_lines, RESULTS)


def measured_variants(
    options: argparse.Namespace, split: EvaluationSplit, queries: Queries, seed: int
) -> Iterator[tuple[str, Figures]]:
    """The fine-tuned model of a seed, then everything that is aligned from it."""
    tuned = TrainedGenerator(dataset_recipe(options.dataset, options.max_seconds, options.epochs))
    tuned.fit(split, seed, lambda text: report_progress(f"seed {seed}: {text}"))
    baseline = measure(tuned, queries, "")
    yield "SFT", baseline
    yield PURCHASE_RATES, reranked_by_purchase_rate(tuned, split, queries, baseline.invalid)
    changes = dict(_setting(figure) for figure in options.set)
    for scheme in SCHEMES:
        if options.scheme and scheme not in options.scheme:
            continue
        if scheme == "purchased_over_clicked":
            pairs = list(clicked_pairs(split, tuned))
        else:
            pairs = list(shown_pairs(split, tuned, scheme, seed, _ALL["max_pairs"]))
        for name, dpo in LOSSES.items():
            if (options.loss and name not in options.loss) or (
                not dpo.get("weight", 1) and scheme != SCHEMES[0]
            ):
                continue
            began = time.monotonic()
            aligned, note = align_on_pairs(tuned, pairs, scheme, changes | dpo)
            yield f"{name}, {scheme}", measure(aligned, queries, note)
            report_progress(f"{len(pairs)} pairs, {note} ({time.monotonic() - began:.0f} s)")


def align_on_pairs(
    tuned: TrainedGenerator, pairs: list[PreferencePair], scheme: Scheme, changes: dict[str, Any]
) -> tuple[TrainedGenerator, str]:
    """What the trainer makes of a model and pairs, and what it says of it."""
    dpo_changes = _ALL | {"schemes": [scheme]} | changes
    dpo = tuned.settings.dpo.model_validate(tuned.settings.dpo.model_dump() | dpo_changes)
    settings = tuned.settings.model_copy(update={"dpo": dpo})
    rows = preference_rows(pairs, "evaluation", tuned.sid_set.prompt, dpo)
    probe = held_out_probe(tuned.held_out, tuned.catalogue, tuned.sid_set, settings, tuned.ranking)
    with tempfile.TemporaryDirectory() as folder:
        model, result = align(
            tuned.model, tuned.tokenizer, rows, settings, Path(folder), sequences=tuned.rows, probe=probe
        )
    aligned = copy.copy(tuned)
    aligned.rank_with(model)
    return aligned, (
        f"{len(rows)} rows, {result.steps} steps, margin {result.margin:.3f}, drop {result.drop:.2f}, "
        f"{result.stopped}"
    )


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def _progress_text(base: Figures, figure: Figures) -> str:
    parts = []
    for metric in METRICS:
        value, before = figure.column(metric)[0].mean(), base.column(metric)[0].mean()
        parts.append(f"{metric} {value:.4f} ({value / max(before, 1e-9) - 1:+.1%})")
    return ", ".join([*parts, f"invalid {figure.invalid:.3f}", figure.note])


def lines(dataset: str, runs_by_variant: dict[str, list[Figures]], command: str) -> list[dict[str, Any]]:
    """A figure's mean over the seeds, its change to SFT's and the interval of that, relative to SFT's."""
    result_lines = []
    for name, runs in runs_by_variant.items():
        for metric in METRICS:
            values = [run.column(metric)[0][:, None] for run in runs]
            before = [run.column(metric)[0][:, None] for run in runs_by_variant["SFT"]]
            change = _change(values, before, runs[0].column(metric)[1])
            figure = line(
                f"alignment: {name}", dataset, f"sidstream-{name}", metric, round(float(np.mean(values)), 4),
                len(runs), command, mask="none",
            )  # fmt: skip
            change_of = {"change": change.value, "change_low": change.low, "change_high": change.high}
            result_lines.append(figure | {
                key: round(value, 4) if math.isfinite(value) else None for key, value in change_of.items()
            })  # fmt: skip
        invalid = float(np.mean([run.invalid for run in runs]))
        result_lines.append(line(
            f"alignment: {name}", dataset, f"sidstream-{name}", "invalid rate", round(invalid, 4), len(runs),
            command, mask="none",
        ) | {"notes": [run.note for run in runs]})  # fmt: skip
    return result_lines


def _change(values: list[Float64], before: list[Float64], users: Int64) -> Interval:
    """The relative change of the means over the seeds, each (B, 1) a seed."""
    if len(values) > 1:
        return relative_changes_over_seeds(values, before, users)[0]
    return relative_changes(values[0], before[0], users)[0]


def publish(dataset: str, result_lines: list[dict[str, Any]], folder: Path) -> None:
    """The lines of a data set beside those of others, and its table."""
    file = folder / "alignment.jsonl"
    other_lines = [row for row in read_lines(file) if row["dataset"] != dataset]
    write_lines(file, [*other_lines, *result_lines])
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for figure in result_lines:
        rows.setdefault(figure["claim"].removeprefix("alignment: "), {})[figure["metric"]] = figure
    table_rows = []
    for name, figures in rows.items():
        cells = []
        for metric in METRICS:
            figure = figures[metric]
            cell = f"{figure['value']:.4f}"
            if name != "SFT" and figure["change"] is not None:
                high = "no bound" if figure["change_high"] is None else f"{figure['change_high']:+.1%}"
                cell += f" ({figure['change']:+.1%}, {figure['change_low']:+.1%} to {high})"
            cells.append(cell)
        table_rows.append([name, *cells, f"{figures['invalid rate']['value']:.3f}"])
    table = markdown_table(["model, pairs", *METRICS, "invalid"], table_rows)
    put_table(folder / "alignment.md", BEGIN.format(dataset), END.format(dataset), table)


if __name__ == "__main__":
    main()
