"""Claim: aligned to purchases, the model puts more of what is bought first, and keeps what is clicked.

    python -m benchmarks.alignment tmall2014 --data /data --publish

A real log, split in time. One fine-tuned model a seed; from it every loss over every scheme of pairs, by the
trainer's own code, its stop rules included. Test figures over all items, past ones included: HR@1 and HR@10
of the next click (all steps) and of the steps that were bought then or within a day, with the relative change
to the fine-tuned model and its interval (users are drawn again, `trainer.evaluation.bootstrap`); and how much
of what is spelled without a constraint is no SID.

Logs say what was clicked and bought, not what was shown. `purchased_over_clicked` pairs are the agents' own
rule over the log (`agents.attribution.pairs`). For the two schemes over what was shown, the fine-tuned
model's own ten best items stand in, at those steps whose item is among them: of those, what the user neither
clicked nor bought within the window.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.alignment_pairs import clicked_pairs, shown_pairs
from benchmarks.results import RESULTS, asks_for_data, line, put_table
from streams.events import PreferencePair, Scheme
from trainer.alignment.dpo import align
from trainer.alignment.rows import preference_rows
from trainer.evaluation.bootstrap import intervals
from trainer.evaluation.datasets import load_dataset
from trainer.evaluation.generator_ranker import TrainedGenerator, TrainingRecipe, default_recipe
from trainer.evaluation.metrics import accuracy, target_ranks
from trainer.evaluation.splits import EvaluationSplit, Queries, split_by_time
from trainer.offline.offline_check import held_out_probe
from trainer.offline.quality import evaluate_held_out
from trainer.offline.ranking import Candidates
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
RATES = "SFT, moved by items' rates of purchase"
PRIOR, FACTORS = 20.0, (0.0, 0.1, 0.25, 0.5, 1.0)
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
        kept = self.bought if what == "purchase" else np.ones(len(self.bought), bool)
        return self.hits[int(cut)][kept], self.users[kept]


def shop_recipe(name: str, seconds: float | None, epochs: int | None) -> TrainingRecipe:
    """What is fine-tuned: the default model, with codes of collaboration alone where a log has no texts."""
    plain = default_recipe(seconds, epochs)
    if name != "tmall2014":
        return plain
    # So few users, each with hundreds of steps, are soon known by heart: dropout as for the Amazon sets.
    changes = {"text_inputs": False, "max_words": 0, "dropout": 0.5, "lr": 2e-3, "fit_strength": True}
    return TrainingRecipe(plain.trainer | changes, {"collaborative": 1.0})


def measure(trained: TrainedGenerator, queries: Queries, note: str) -> Figures:
    """A model's figures on the test queries."""
    lists = trained.rank(queries.histories, 10, "none", "mixed")
    quality = evaluate_held_out(
        trained.model, trained.held_out, trained.catalogue, trained.sid_set, trained.settings, trained.ranking
    )
    return _figures(lists, queries, 1 - quality.validity, note)


def by_rates(trained: TrainedGenerator, split: EvaluationSplit, queries: Queries, invalid: float) -> Figures:
    """The fine-tuned model's candidates in the order of their score and the log of how often each is bought.

    What can be had without learning: a step on item i of the training part was bought in b_i of n_i cases,
    the score gets a log((b_i + PRIOR p) / (n_i + PRIOR)), p of all, a by the purchases of validation.
    """
    assert split.bought is not None, "the log has purchases"
    steps, sold = np.zeros(split.dataset.size), np.zeros(split.dataset.size)
    for items, bought in zip(split.train, split.bought, strict=True):
        np.add.at(steps, items, 1)
        np.add.at(sold, items, bought)
    rate = np.log((sold + PRIOR * sold.sum() / steps.sum()) / (steps + PRIOR))
    weight, moved = trained.ranking.dense_weight, torch.from_numpy(rate)
    assert split.valid.bought is not None
    sales = split.valid.take(np.flatnonzero(split.valid.bought))
    known = _candidates(trained, sales)

    def gain(factor: float) -> float:
        ranks = target_ranks(_moved(known, weight, moved, factor), sales.targets)
        return float(accuracy(ranks)["NDCG@10"].mean())

    best = max(FACTORS, key=gain)
    lists = _moved(_candidates(trained, queries), weight, moved, best)
    return _figures(lists, queries, invalid, f"factor {best}")


def _candidates(trained: TrainedGenerator, queries: Queries) -> Candidates:
    return trained.ranker.candidates([row[-trained.settings.max_items :] for row in queries.histories])


def _moved(found: Candidates, weight: float, rate: torch.Tensor, factor: float) -> Int64:
    score = found.score(weight) + factor * rate[found.items.clamp(min=0)]
    at = score.argsort(dim=1, descending=True, stable=True)[:, :10]
    listed = found.items.gather(1, at)
    return torch.where(score.gather(1, at) > -torch.inf, listed, -1).numpy()


def _figures(lists: Int64, queries: Queries, invalid: float, note: str) -> Figures:
    assert queries.bought is not None
    ranks = target_ranks(lists, queries.targets)
    hits = {cut: ((ranks >= 0) & (ranks < cut)).astype(np.float64) for cut in (1, 10)}
    return Figures(hits, queries.bought, queries.users, invalid, note)


def drawn(queries: Queries, count: int) -> Queries:
    """Up to `count` of the queries, and all whose target was bought."""
    assert queries.bought is not None
    at = np.random.default_rng(0).permutation(len(queries))[:count]
    return queries.take(np.union1d(at, np.flatnonzero(queries.bought)))


def main() -> None:
    """Measure every loss over every scheme with every seed."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("dataset", choices=("tmall2014", "rees46"))
    asks_for_data(asked)
    asked.add_argument("--seeds", type=int, default=3)
    asked.add_argument("--epochs", type=int)
    asked.add_argument("--max-seconds", type=float, help="of the fine-tuning; default: all epochs")
    asked.add_argument("--queries", type=int, default=4000, help="of the test, beside all that were bought")
    asked.add_argument("--part", choices=("valid", "test"), default="test")
    asked.add_argument("--loss", action="append", help="only this row; may be given again")
    asked.add_argument("--scheme", action="append", choices=SCHEMES)
    asked.add_argument("--set", action="append", default=[], help="of trainer.dpo, for example lr=0.0002")
    asked.add_argument("--publish", action="store_true", help="put the table into docs/results")
    given = asked.parse_args()
    split = split_by_time(load_dataset(given.dataset, given.data))
    queries = drawn(split.test if given.part == "test" else split.valid, given.queries)
    done: dict[str, list[Figures]] = {}
    for seed in range(1, given.seeds + 1):
        for name, figures in variants(given, split, queries, seed):
            done.setdefault(name, []).append(figures)
            _tell(f"seed {seed}, {name}: {_short(done['SFT'][-1], figures)}")
    command = (
        f"python -m benchmarks.alignment {given.dataset} --seeds {given.seeds} --queries {given.queries}"
    )
    for name in ("epochs", "max_seconds"):
        if getattr(given, name) is not None:
            command += f" --{name.replace('_', '-')} {getattr(given, name):g}"
    command += "".join(f" --set {one}" for one in given.set)
    made = lines(given.dataset, done, command)
    for one in made:
        print(json.dumps(one), flush=True)
    if given.publish:
        publish(given.dataset, made, RESULTS)


def variants(
    given: argparse.Namespace, split: EvaluationSplit, queries: Queries, seed: int
) -> Iterator[tuple[str, Figures]]:
    """The fine-tuned model of a seed, then everything that is aligned from it."""
    tuned = TrainedGenerator(shop_recipe(given.dataset, given.max_seconds, given.epochs))
    tuned.fit(split, seed, lambda text: _tell(f"seed {seed}: {text}"))
    plain = measure(tuned, queries, "")
    yield "SFT", plain
    yield RATES, by_rates(tuned, split, queries, plain.invalid)
    changes = dict(_value(one) for one in given.set)
    for scheme in SCHEMES:
        if given.scheme and scheme not in given.scheme:
            continue
        if scheme == "purchased_over_clicked":
            pairs = list(clicked_pairs(split, tuned))
        else:
            pairs = list(shown_pairs(split, tuned, scheme, seed, _ALL["max_pairs"]))
        for name, dpo in LOSSES.items():
            if (given.loss and name not in given.loss) or (not dpo.get("weight", 1) and scheme != SCHEMES[0]):
                continue
            began = time.monotonic()
            aligned, note = aligned_to(tuned, pairs, scheme, changes | dpo)
            yield f"{name}, {scheme}", measure(aligned, queries, note)
            _tell(f"{len(pairs)} pairs, {note} ({time.monotonic() - began:.0f} s)")


def aligned_to(
    tuned: TrainedGenerator, pairs: list[PreferencePair], scheme: Scheme, changes: dict[str, Any]
) -> tuple[TrainedGenerator, str]:
    """What the trainer makes of a model and pairs, and what it says of it."""
    given = _ALL | {"schemes": [scheme]} | changes
    dpo = tuned.settings.dpo.model_validate(tuned.settings.dpo.model_dump() | given)
    settings = tuned.settings.model_copy(update={"dpo": dpo})
    rows = preference_rows(pairs, "evaluation", tuned.sid_set.prompt, dpo)
    probe = held_out_probe(tuned.held_out, tuned.catalogue, tuned.sid_set, settings, tuned.ranking)
    with tempfile.TemporaryDirectory() as folder:
        model, result = align(
            tuned.model, tuned.tokenizer, rows, settings, Path(folder), sequences=tuned.rows, probe=probe
        )
    other = copy.copy(tuned)
    other.rank_with(model)
    return other, (
        f"{len(rows)} rows, {result.steps} steps, margin {result.margin:.3f}, drop {result.drop:.2f}, "
        f"{result.stopped}"
    )


def _value(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def _short(base: Figures, one: Figures) -> str:
    made = []
    for metric in METRICS:
        value, before = one.column(metric)[0].mean(), base.column(metric)[0].mean()
        made.append(f"{metric} {value:.4f} ({value / max(before, 1e-9) - 1:+.1%})")
    return ", ".join([*made, f"invalid {one.invalid:.3f}", one.note])


def lines(dataset: str, done: dict[str, list[Figures]], command: str) -> list[dict[str, Any]]:
    """A figure's mean over the seeds, its change to SFT's and the interval of that, relative to SFT's."""
    made = []
    for name, runs in done.items():
        for metric in METRICS:
            values = np.mean([run.column(metric)[0] for run in runs], axis=0)
            before = np.mean([run.column(metric)[0] for run in done["SFT"]], axis=0)
            users = runs[0].column(metric)[1]
            change = intervals((values - before)[:, None], users)[0]
            one = line(
                f"alignment: {name}", dataset, f"sidstream-{name}", metric, round(float(values.mean()), 4),
                len(runs), command, mask="none",
            )  # fmt: skip
            base = max(float(before.mean()), 1e-9)
            change_of = {"change": change.value, "change_low": change.low, "change_high": change.high}
            made.append(one | {key: round(value / base, 4) for key, value in change_of.items()})
        invalid = float(np.mean([run.invalid for run in runs]))
        made.append(line(
            f"alignment: {name}", dataset, f"sidstream-{name}", "invalid rate", round(invalid, 4), len(runs),
            command, mask="none",
        ) | {"notes": [run.note for run in runs]})  # fmt: skip
    return made


def publish(dataset: str, made: list[dict[str, Any]], folder: Path) -> None:
    """The lines of a data set beside those of others, and its table."""
    path = folder / "alignment.jsonl"
    old = path.read_text().splitlines() if path.exists() else []
    kept = [text for text in old if json.loads(text)["dataset"] != dataset]
    path.write_text("".join(text + "\n" for text in [*kept, *map(json.dumps, made)]))
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for one in made:
        rows.setdefault(one["claim"].removeprefix("alignment: "), {})[one["metric"]] = one
    table = [
        "| model, pairs | " + " | ".join(METRICS) + " | invalid |",
        "|---|" + "---|" * (len(METRICS) + 1),
    ]
    for name, figures in rows.items():
        cells = []
        for metric in METRICS:
            one = figures[metric]
            cell = f"{one['value']:.4f}"
            if name != "SFT":
                cell += f" ({one['change']:+.1%}, {one['change_low']:+.1%} to {one['change_high']:+.1%})"
            cells.append(cell)
        table.append(f"| {name} | {' | '.join(cells)} | {figures['invalid rate']['value']:.3f} |")
    put_table(folder / "alignment.md", BEGIN.format(dataset), END.format(dataset), table)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
