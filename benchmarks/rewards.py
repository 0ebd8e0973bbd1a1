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

from benchmarks.results import RESULTS, line, put_table
from benchmarks.reward_baselines import NEXT_ITEM, lesson, modpo, soup, soup_parts
from registry.bundles.rewards import COMMISSION, PRICE, Rewards, said
from streams.events import Reward
from trainer.evaluation.bootstrap import differences, intervals
from trainer.evaluation.datasets import load_dataset
from trainer.evaluation.generator_ranker import TrainedGenerator, TrainingRecipe, default_recipe
from trainer.evaluation.metrics import target_ranks
from trainer.evaluation.sequences import Float64, Int64
from trainer.evaluation.splits import EvaluationSplit, Queries, split_by_time
from trainer.generator.model import GeneratorForCausalLM
from trainer.offline.ranking import Candidates
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
LESSONS = 3000
STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0)


class Point(NamedTuple):
    """What the answers under one preference bring: shares from 0 to 1, the more the better."""

    hit_rate: float
    price: float
    commission: float


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    asked.add_argument("--dataset", default="online-retail")
    asked.add_argument("--epochs", type=int, default=1)
    asked.add_argument("--seeds", default="1", help="with commas between")
    asked.add_argument("--targets", type=int, default=3000, help="of the test part, drawn once")
    asked.add_argument("--histories", type=int, default=400, help="of them, for the control and the front")
    asked.add_argument("--no-baselines", action="store_true", help="without MODPO and Reward Soups")
    asked.add_argument(
        "--publish", action="store_true", help="put lines, table and picture into docs/results"
    )
    given = asked.parse_args()
    split = split_by_time(load_dataset(given.dataset))
    command = f"python -m benchmarks.rewards --epochs {given.epochs} --seeds {given.seeds}"
    recipe = default_recipe(epochs=given.epochs)
    lines: list[dict[str, object]] = []
    fronts: dict[str, list[Point]] = {}
    for seed in map(int, given.seeds.split(",")):
        bench = Bench(split, recipe, seed, given.targets, given.histories)
        for claim, model, metric, value, low, high in bench.figures(not given.no_baselines):
            one = line(claim, given.dataset, model, metric, value, seed, command, low, high, "none")
            print(json.dumps(one), flush=True)
            lines.append(one)
        # The first seed's is drawn.
        fronts = fronts or bench.fronts
    if given.publish:
        put_table(RESULTS / "rewards.md", BEGIN, END, table(lines))
        (RESULTS / "rewards.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        (RESULTS / "rewards.png").write_bytes(picture(fronts))


Line = tuple[str, str, str, float, float | None, float | None]


class Bench:
    """The two models of one seed, and the requests that both are asked with."""

    def __init__(
        self, split: EvaluationSplit, recipe: TrainingRecipe, seed: int, targets: int, histories: int
    ) -> None:
        self.models, self.split, self.seed = {}, split, seed
        for name, enabled in (("sidstream-rewards", True), ("sidstream-no-rewards", False)):
            rewards = recipe.trainer.get("rewards", {}) | {"enabled": enabled}
            made = TrainedGenerator(replace(recipe, trainer=recipe.trainer | {"rewards": rewards}))
            made.fit(split, seed, partial(_tell, name))
            self.models[name] = made
        self.with_, self.without = self.models.values()
        if self.with_.rewards is None:
            raise ValueError("the items of this data set have no prices: there is nothing to ask for")
        self.rewards: Rewards = self.with_.rewards
        assert split.dataset.offers is not None, "a catalogue with bins has prices"
        self.bins = {
            name: item_bins(self.rewards, name, split.dataset.offers) for name in (PRICE, COMMISSION)
        }
        self.top = max(len(edges) for edges in self.rewards.edges[PRICE].values())
        self.queries = drawn(split.test, targets)
        self.few = drawn(self.queries, histories, seed=1)
        unseen = np.flatnonzero([not len(split.train[user]) for user in split.test.users])
        self.strangers = drawn(split.test.take(unseen), histories, seed=1)
        self.fronts: dict[str, list[Point]] = {}
        self.online = self._online()

    def _online(self) -> TrainedGenerator:
        """The model with rewards after a round of answers of its own, kept whatever it costs."""
        first, offers = self.with_, self.split.dataset.offers or []
        rewards = first.settings.rewards
        online = rewards.online.model_copy(update={"rounds": 1, "max_fall": 1.0})
        chosen = {"rewards": rewards.model_copy(update={"online": online})}
        made, rows = copy.copy(first), copy.copy(first.rows)
        rows.settings = first.settings.model_copy(update=chosen)
        worth = RewardEvidence(self.rewards, first.context, offers, purchase_labels(rows.log, 0))
        model = copy.deepcopy(first.model)
        result = learn_from_own_answers(
            model, rows, first.sid_set, worth, first.result.quality, partial(_tell, "online")
        )
        _tell("online", result.summary())
        made.rank_with(model)
        return made

    def figures(self, baselines: bool = True) -> Iterator[Line]:
        """(claim, model, metric, value, low, high) of everything that is measured."""
        yield from self.control()
        yield from self.cost()
        yield from self.front(baselines)

    def control(self) -> Iterator[Line]:
        """Every bin of each field, asked for every history."""
        for name, bins in self.bins.items():
            values = range(self.top + 1)
            about = f"items follow the {name} that is asked for", "sidstream-rewards"
            for queries, who in ((self.few, ""), (self.strangers, ", users that training has not seen")):
                if not len(queries):
                    continue
                lists = [self.asked({name: value}, of=queries) for value in values]
                got = np.array([bins[one].mean(1) for one in lists])
                wanted = np.broadcast_to(np.arange(len(got))[:, None], got.shape)
                yield *about, f"spearman {name}, (history, bin) pairs{who}", _rho(wanted, got), None, None
                yield *about, f"spearman {name}, bin means{who}", _rho(wanted[:, 0], got.mean(1)), None, None
                exact = [(bins[one] == value).mean() for value, one in zip(values, lists, strict=True)]
                share = float(np.mean(exact))
                yield *about, f"share in the {name} bin asked for @{K}{who}", share, None, None

    def cost(self) -> Iterator[Line]:
        """Requests that ask for nothing."""
        models = self.models | {ONLINE: self.online}
        hits = {name: self._hits(made) for name, made in models.items()}
        claim = "a request without preferences is answered as well as without rewards"
        for name, some in hits.items():
            yield claim, name, f"HR@{K}", *intervals(some, self.queries.users)[0]
        for name in ("sidstream-rewards", ONLINE):
            found = differences(hits[name], hits["sidstream-no-rewards"], self.queries.users)[0]
            yield claim, name, f"HR@{K} less that without rewards", *found

    def _hits(self, made: TrainedGenerator) -> Float64:
        lists = made.rank(self.queries.histories, K, "none", "mixed", self.queries.users)
        return (target_ranks(lists, self.queries.targets) >= 0).astype(np.float64)[:, None]

    def front(self, baselines: bool) -> Iterator[Line]:
        """Answers under several preferences, by conditions and by scores made anew."""
        self.fronts = {
            name: [self._point(self.asked(self.rewards.wanted(one), made)) for one in PREFERENCES]
            for name, made in (("sidstream-rewards", self.with_), (ONLINE, self.online))
        }
        self.fronts["sidstream-no-rewards, scored anew"] = self._scored_anew()
        self.fronts |= self._baselines() if baselines else {}
        for name, points in self.fronts.items():
            claim = "preferences buy more price and commission for the hits that they cost"
            yield claim, name, "hypervolume above (0, 0, 0)", hypervolume(points), None, None

    def _scored_anew(self) -> list[Point]:
        found = candidates(self.without, self.few, self.without.profiles[self.few.users])
        score = found.score(self.without.ranking.dense_weight).numpy()
        made = []
        for weights in PREFERENCES:
            for strength in STRENGTHS if weights else (0.0,):
                added = sum((w * self.bins[name][found.items] / self.top for name, w in weights.items()), 0.0)
                order = np.argsort(-(score + strength * added / max(1, sum(weights.values()))), kind="stable")
                made.append(self._point(np.take_along_axis(found.items.numpy(), order, 1)[:, :K]))
        return made

    def _baselines(self) -> dict[str, list[Point]]:
        """MODPO, a model a preference, and Reward Soups, an average a preference, from the model without."""
        made = self.without
        known = [row for row in self.split.train if len(row) > 1]
        drawn_rows = np.random.default_rng(self.seed).permutation(len(known))[:LESSONS]
        histories = [known[row][:-1] for row in drawn_rows.tolist()]
        targets = np.array([known[row][-1] for row in drawn_rows.tolist()], np.int64)
        seen = lesson(made, histories, targets)
        worth = {name: np.maximum(bins, 0) / self.top for name, bins in self.bins.items()}
        parts = soup_parts(made, seen, worth, self.seed)
        found: dict[str, list[Point]] = {"MODPO": [], "MODPO, next item too": [], "Reward Soups": []}
        for weights in PREFERENCES:
            _tell("baselines", str(weights))
            for name, next_item in (("MODPO", 0.0), ("MODPO, next item too", NEXT_ITEM)):
                found[name].append(self._of(modpo(made, seen, worth, weights, self.seed, next_item)))
            found["Reward Soups"].append(self._of(soup(parts, weights)))
        return found

    def _of(self, model: GeneratorForCausalLM) -> Point:
        other = copy.copy(self.without)
        other.rank_with(model)
        order = candidates(other, self.few, other.profiles[self.few.users]).order(other.ranking.dense_weight)
        return self._point(order[:, :K].numpy())

    def asked(
        self, conditions: Mapping[str, int], made: TrainedGenerator | None = None, of: Queries | None = None
    ) -> Int64:
        """(B, K) items for the few histories, or those of other queries, under conditions, of a model."""
        made, of = made or self.with_, of or self.few
        row = np.array([made.context.row(said(conditions))], dtype=np.int32).repeat(len(of), axis=0)
        contexts = np.concatenate((made.profiles[of.users], row), axis=1)
        lists: Int64 = candidates(made, of, contexts).order(made.ranking.dense_weight)[:, :K].numpy()
        return lists

    def _point(self, lists: Int64) -> Point:
        price, commission = (float(self.bins[name][lists].mean()) / self.top for name in (PRICE, COMMISSION))
        return Point(float((target_ranks(lists, self.few.targets) >= 0).mean()), price, commission)


def candidates(made: TrainedGenerator, queries: Queries, contexts: np.ndarray) -> Candidates:
    """What both heads of a model propose for the queries under contexts (B, C)."""
    newest = [row[-made.settings.max_items :] for row in queries.histories]
    with torch.no_grad():
        return made.ranker.candidates(newest, made.ranker.states(newest, contexts))


def drawn(queries: Queries, count: int, seed: int = 0) -> Queries:
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


def picture(fronts: Mapping[str, Sequence[Point]]) -> bytes:
    """HR@10 over the mean bin of prices and of commissions, a mark a preference."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for at, name in enumerate((PRICE, COMMISSION)):
        axes = figure.add_subplot(1, 2, at + 1)
        for mark, (model, points) in zip("oPxsv^", fronts.items(), strict=False):
            axes.plot([one[at + 1] for one in points], [one.hit_rate for one in points], mark, label=model)
        axes.set_xlabel(f"mean {name} bin over the highest")
        axes.set_ylabel(f"HR@{K}")
    # Below the axes: six models' marks are all over them.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return png(figure)


def table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row a figure: its mean over the seeds, the seeds' values, and the interval of the first."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in lines:
        found.setdefault((one["model"], one["metric"]), []).append(one)
    made = ["| model | metric | mean | seeds | 95 %, first seed |", "|---|---|---|---|---|"]
    for (model, metric), some in found.items():
        mean = sum(one["value"] for one in some) / len(some)
        seeds = ", ".join(f"{one['value']:.4f}" for one in some)
        first = some[0]
        bounds = "" if first["low"] is None else f"{first['low']:.4f} to {first['high']:.4f}"
        made.append(f"| {model} | {metric} | {mean:.4f} | {seeds} | {bounds} |")
    return made


def _rho(wanted: np.ndarray, got: np.ndarray) -> float:
    # What never changes follows nothing, and has no ranks to correlate.
    return float(spearmanr(wanted.ravel(), got.ravel()).statistic) if np.ptp(got) else 0.0


def _tell(name: str, text: str) -> None:
    print(f"{name}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
