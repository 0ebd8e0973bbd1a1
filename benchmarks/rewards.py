"""Whether items follow what a request prefers, and what that costs those that prefer nothing.

    python -m benchmarks.rewards --epochs 1 --seeds 1 --publish

One model learns with rewards, one without, in equal passes over the training part; everything else is what
`sidstream train` makes. Users are those of the test part. Three claims:

- control: a single bin of a price or a commission is asked for, every bin for every history. Spearman's
  correlation of the bin that was asked for with the mean bin of the ten items, over all (history, bin) pairs
  and over the means of the bins; and the same of users of whom training has seen nothing.
- cost: HR@10 of requests that ask for nothing, beside the model without rewards; interval over users.
- front: HR@10, mean price bin and mean commission bin of the answers under several preferences, in shares of
  the highest bin, beside the model without rewards whose candidates are scored anew: log p + s * (weighted
  mean of the bins), s from 1 to 16, and beside MODPO, as published and with a next-item loss, and Reward
  Soups (benchmarks.reward_baselines). The volume that each set of points dominates above
  (0, 0, 0) (hypervolume, Zitzler and Thiele 1999).

The model with rewards is asked as SFT left it and after a round of the online stage
(trainer.rewards.online).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from benchmarks.results import RESULTS, line, markdown_table, put_table, write_lines
from benchmarks.reward_baselines import (
    NEXT_ITEM,
    average_soup,
    reward_training_set,
    train_modpo,
    train_soup_parts,
)
from registry.bundles.rewards import COMMISSION, PRICE, Rewards, reward_fields
from streams.events import Reward
from trainer.evaluation.datasets import load_dataset
from trainer.evaluation.generator_ranker import TrainedGenerator, TrainingRecipe, default_recipe
from trainer.evaluation.metrics import target_ranks
from trainer.evaluation.sequences import Float64, Int64
from trainer.evaluation.splits import EvaluationSplit, Queries, split_by_time
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline_checks.bootstrap import differences, intervals
from trainer.offline_checks.ranking import Candidates
from trainer.plots.png import png
from trainer.rewards.labels import item_bins, purchase_labels
from trainer.rewards.online import RewardEvidence, learn_from_own_answers

K = 10
ONLINE = "sidstream-rewards, online stage"
BEGIN, END = "<!-- rewards -->\n", "<!-- end of rewards -->\n"
PREFERENCES: tuple[dict[Reward, float], ...] = (
    {}, {"price": 1}, {"commission": 1}, {"price": 1, "commission": 1}, {"price": 3, "commission": 1},
    {"price": 1, "commission": 3},
)  # fmt: skip
# Interactions of the training part that the baselines are taught with, one a user.
TRAINING_INTERACTIONS = 3000
STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0)


class Point(NamedTuple):
    """What the answers under one preference bring: shares from 0 to 1, the more the better."""

    hit_rate: float
    price: float
    commission: float


def main() -> None:
    answers_under = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    answers_under.add_argument("--dataset", default="online-retail")
    answers_under.add_argument("--epochs", type=int, default=1)
    answers_under.add_argument("--seeds", default="1", help="with commas between")
    answers_under.add_argument("--targets", type=int, default=3000, help="of the test part, drawn once")
    answers_under.add_argument(
        "--histories", type=int, default=400, help="of them, for the control and the front"
    )
    answers_under.add_argument("--no-baselines", action="store_true", help="without MODPO and Reward Soups")
    answers_under.add_argument(
        "--publish", action="store_true", help="put lines, table and picture into docs/results"
    )
    options = answers_under.parse_args()
    split = split_by_time(load_dataset(options.dataset))
    command = f"python -m benchmarks.rewards --epochs {options.epochs} --seeds {options.seeds}"
    recipe = default_recipe(epochs=options.epochs)
    lines: list[dict[str, object]] = []
    fronts: dict[str, list[Point]] = {}
    for seed in map(int, options.seeds.split(",")):
        bench = RewardsBenchmark(split, recipe, seed, options.targets, options.histories)
        for claim, model, metric, value, low, high in bench.figures(not options.no_baselines):
            figure = line(claim, options.dataset, model, metric, value, seed, command, low, high, "none")
            print(json.dumps(figure), flush=True)
            lines.append(figure)
        # The first seed's is drawn.
        fronts = fronts or bench.fronts
    if options.publish:
        put_table(RESULTS / "rewards.md", BEGIN, END, table(lines))
        write_lines(RESULTS / "rewards.jsonl", lines)
        (RESULTS / "rewards.png").write_bytes(front_plot(fronts))


FigureLine = tuple[str, str, str, float, float | None, float | None]


class RewardsBenchmark:
    """The two models of one seed, and the requests that both are asked with."""

    def __init__(
        self, split: EvaluationSplit, recipe: TrainingRecipe, seed: int, targets: int, histories: int
    ) -> None:
        self.models, self.split, self.seed = {}, split, seed
        for name, enabled in (("sidstream-rewards", True), ("sidstream-no-rewards", False)):
            rewards = recipe.trainer.get("rewards", {}) | {"enabled": enabled}
            trained = TrainedGenerator(replace(recipe, trainer=recipe.trainer | {"rewards": rewards}))
            trained.fit(split, seed, partial(report_progress, name))
            self.models[name] = trained
        self.with_rewards, self.without_rewards = self.models.values()
        if self.with_rewards.rewards is None:
            raise ValueError("the items of this data set have no prices: there is nothing to ask for")
        self.rewards: Rewards = self.with_rewards.rewards
        assert split.dataset.offers is not None, "a catalogue with bins has prices"
        self.bins = {
            name: item_bins(self.rewards, name, split.dataset.offers) for name in (PRICE, COMMISSION)
        }
        self.highest_bin = max(len(edges) for edges in self.rewards.edges[PRICE].values())
        self.queries = sample_queries(split.test, targets)
        self.front_queries = sample_queries(self.queries, histories, seed=1)
        unseen = np.flatnonzero([not len(split.train[user]) for user in split.test.users])
        self.new_user_queries = sample_queries(split.test.take(unseen), histories, seed=1)
        self.fronts: dict[str, list[Point]] = {}
        self.online = self._online()

    def _online(self) -> TrainedGenerator:
        """The model with rewards after a round of answers of its own, kept whatever it costs."""
        first, offers = self.with_rewards, self.split.dataset.offers or []
        rewards = first.settings.rewards
        online = rewards.online.model_copy(update={"rounds": 1, "max_fall": 1.0})
        chosen = {"rewards": rewards.model_copy(update={"online": online})}
        trained, rows = copy.copy(first), copy.copy(first.rows)
        rows.settings = first.settings.model_copy(update=chosen)
        reward_values = RewardEvidence(self.rewards, first.context, offers, purchase_labels(rows.log, 0))
        model = copy.deepcopy(first.model)
        result = learn_from_own_answers(
            model,
            rows,
            first.sid_set,
            reward_values,
            first.result.quality,
            partial(report_progress, "online"),
        )
        report_progress("online", result.summary())
        trained.rank_with(model)
        return trained

    def figures(self, baselines: bool = True) -> Iterator[FigureLine]:
        """(claim, model, metric, value, low, high) of everything that is measured."""
        yield from self.control()
        yield from self.cost()
        yield from self.front(baselines)

    def control(self) -> Iterator[FigureLine]:
        """Every bin of each field, asked for every history."""
        for name, bins in self.bins.items():
            values = range(self.highest_bin + 1)
            about = f"items follow the {name} that is asked for", "sidstream-rewards"
            for queries, who in (
                (self.front_queries, ""),
                (self.new_user_queries, ", users that training has not seen"),
            ):
                if not len(queries):
                    continue
                lists = [self.answers_under({name: value}, of=queries) for value in values]
                mean_bins = np.array([bins[listed].mean(1) for listed in lists])
                requested_bins = np.broadcast_to(np.arange(len(mean_bins))[:, None], mean_bins.shape)
                yield (
                    *about,
                    f"spearman {name}, (history, bin) pairs{who}",
                    _correlation(requested_bins, mean_bins),
                    None,
                    None,
                )
                yield (
                    *about,
                    f"spearman {name}, bin means{who}",
                    _correlation(requested_bins[:, 0], mean_bins.mean(1)),
                    None,
                    None,
                )
                exact = [(bins[listed] == value).mean() for value, listed in zip(values, lists, strict=True)]
                share = float(np.mean(exact))
                yield *about, f"share in the {name} bin asked for @{K}{who}", share, None, None

    def cost(self) -> Iterator[FigureLine]:
        """Requests that ask for nothing."""
        models = self.models | {ONLINE: self.online}
        hits = {name: self._hits(trained) for name, trained in models.items()}
        claim = "a request without preferences is answered as well as without rewards"
        for name, model_hits in hits.items():
            yield claim, name, f"HR@{K}", *intervals(model_hits, self.queries.users)[0]
        for name in ("sidstream-rewards", ONLINE):
            difference = differences(hits[name], hits["sidstream-no-rewards"], self.queries.users)[0]
            yield claim, name, f"HR@{K} less that without rewards", *difference

    def _hits(self, trained: TrainedGenerator) -> Float64:
        lists = trained.rank(self.queries.histories, K, "none", "mixed", self.queries.users)
        return (target_ranks(lists, self.queries.targets) >= 0).astype(np.float64)[:, None]

    def front(self, baselines: bool) -> Iterator[FigureLine]:
        """Answers under several preferences, by conditions and by scores made anew."""
        self.fronts = {
            name: [
                self._point(self.answers_under(self.rewards.requested_rewards(weights), trained))
                for weights in PREFERENCES
            ]
            for name, trained in (("sidstream-rewards", self.with_rewards), (ONLINE, self.online))
        }
        self.fronts["sidstream-no-rewards, scored anew"] = self._scored_anew()
        self.fronts |= self._baselines() if baselines else {}
        for name, points in self.fronts.items():
            claim = "preferences buy more price and commission for the hits that they cost"
            yield claim, name, "hypervolume above (0, 0, 0)", hypervolume(points), None, None

    def _scored_anew(self) -> list[Point]:
        proposed = candidates(
            self.without_rewards, self.front_queries, self.without_rewards.profiles[self.front_queries.users]
        )
        score = proposed.score(self.without_rewards.ranking.dense_weight).numpy()
        points = []
        for weights in PREFERENCES:
            for strength in STRENGTHS if weights else (0.0,):
                added = sum(
                    (w * self.bins[name][proposed.items] / self.highest_bin for name, w in weights.items()),
                    0.0,
                )
                order = np.argsort(-(score + strength * added / max(1, sum(weights.values()))), kind="stable")
                points.append(self._point(np.take_along_axis(proposed.items.numpy(), order, 1)[:, :K]))
        return points

    def _baselines(self) -> dict[str, list[Point]]:
        """MODPO, a model a preference, and Reward Soups, an average a preference, from the model without."""
        trained = self.without_rewards
        long_enough = [row for row in self.split.train if len(row) > 1]
        sampled_rows = np.random.default_rng(self.seed).permutation(len(long_enough))[:TRAINING_INTERACTIONS]
        histories = [long_enough[row][:-1] for row in sampled_rows.tolist()]
        targets = np.array([long_enough[row][-1] for row in sampled_rows.tolist()], np.int64)
        training_set = reward_training_set(trained, histories, targets)
        reward_values = {name: np.maximum(bins, 0) / self.highest_bin for name, bins in self.bins.items()}
        parts = train_soup_parts(trained, training_set, reward_values, self.seed)
        points: dict[str, list[Point]] = {"MODPO": [], "MODPO, next item too": [], "Reward Soups": []}
        for weights in PREFERENCES:
            report_progress("baselines", str(weights))
            for name, next_item in (("MODPO", 0.0), ("MODPO, next item too", NEXT_ITEM)):
                points[name].append(
                    self._point_of_model(
                        train_modpo(trained, training_set, reward_values, weights, self.seed, next_item)
                    )
                )
            points["Reward Soups"].append(self._point_of_model(average_soup(parts, weights)))
        return points

    def _point_of_model(self, model: GeneratorForCausalLM) -> Point:
        other = copy.copy(self.without_rewards)
        other.rank_with(model)
        order = candidates(other, self.front_queries, other.profiles[self.front_queries.users]).order(
            other.ranking.dense_weight
        )
        return self._point(order[:, :K].numpy())

    def answers_under(
        self,
        conditions: Mapping[str, int],
        trained: TrainedGenerator | None = None,
        of: Queries | None = None,
    ) -> Int64:
        """(B, K) items for the few histories, or those of other queries, under conditions, of a model."""
        trained, of = trained or self.with_rewards, of or self.front_queries
        row = np.array([trained.context.row(reward_fields(conditions))], dtype=np.int32).repeat(
            len(of), axis=0
        )
        contexts = np.concatenate((trained.profiles[of.users], row), axis=1)
        lists: Int64 = candidates(trained, of, contexts).order(trained.ranking.dense_weight)[:, :K].numpy()
        return lists

    def _point(self, lists: Int64) -> Point:
        price, commission = (
            float(self.bins[name][lists].mean()) / self.highest_bin for name in (PRICE, COMMISSION)
        )
        return Point(float((target_ranks(lists, self.front_queries.targets) >= 0).mean()), price, commission)


def candidates(trained: TrainedGenerator, queries: Queries, contexts: np.ndarray) -> Candidates:
    """What both heads of a model propose for the queries under contexts (B, C)."""
    newest = [row[-trained.settings.max_items :] for row in queries.histories]
    with torch.no_grad():
        return trained.ranker.candidates(newest, trained.ranker.states(newest, contexts))


def sample_queries(queries: Queries, count: int, seed: int = 0) -> Queries:
    """`count` of the queries, the same for every model."""
    at = np.sort(np.random.default_rng(seed).permutation(len(queries))[:count])
    return queries.take(at)


def hypervolume(points: Sequence[Point]) -> float:
    """The volume between (0, 0, 0) and what the points reach in all three, in slices of the third."""
    volume, below = 0.0, 0.0
    for height in sorted({point[2] for point in points}):
        # Of a slice: what reaches its upper end, the widest first, each adding what is above the others.
        area, tall = 0.0, 0.0
        for wide, high in sorted(((p[0], p[1]) for p in points if p[2] >= height), reverse=True):
            area += wide * max(0.0, high - tall)
            tall = max(tall, high)
        volume += area * (height - below)
        below = height
    return volume


def front_plot(fronts: Mapping[str, Sequence[Point]]) -> bytes:
    """HR@10 over the mean bin of prices and of commissions, a mark a preference."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for at, name in enumerate((PRICE, COMMISSION)):
        axes = figure.add_subplot(1, 2, at + 1)
        for mark, (model, points) in zip("oPxsv^", fronts.items(), strict=False):
            axes.plot(
                [figure[at + 1] for figure in points],
                [figure.hit_rate for figure in points],
                mark,
                label=model,
            )
        axes.set_xlabel(f"mean {name} bin over the highest")
        axes.set_ylabel(f"HR@{K}")
    # Below the axes: six models' marks are all over them.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return png(figure)


def table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row a figure: its mean over the seeds, the seeds' values, and the interval of the first."""
    by_figure: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for figure in lines:
        by_figure.setdefault((figure["model"], figure["metric"]), []).append(figure)
    rows = []
    for (model, metric), of_seeds in by_figure.items():
        mean = sum(figure["value"] for figure in of_seeds) / len(of_seeds)
        seeds = ", ".join(f"{figure['value']:.4f}" for figure in of_seeds)
        first = of_seeds[0]
        bounds = "" if first["low"] is None else f"{first['low']:.4f} to {first['high']:.4f}"
        rows.append([model, metric, f"{mean:.4f}", seeds, bounds])
    return markdown_table(["model", "metric", "mean", "seeds", "95 %, first seed"], rows)


def _correlation(requested_bins: np.ndarray, mean_bins: np.ndarray) -> float:
    # What never changes follows nothing, and has no ranks to correlate.
    return float(spearmanr(requested_bins.ravel(), mean_bins.ravel()).statistic) if np.ptp(mean_bins) else 0.0


def report_progress(name: str, text: str) -> None:
    print(f"{name}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
